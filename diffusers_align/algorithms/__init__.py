"""One module per algorithm; each opens with the algorithm's page. Imports torch only.

Route A, at inference: `guidance` (gradients of a reward: DPS, LGD-MC, FreeDoM, MPGD, universal, TFG, FlowChef ...), `noise_optimization` (of
the initial noise: ReNO, DNO, D-Flow), `best_of_n` (and search over noise), `particle_steering` (sequential Monte Carlo), `svdd` (the best candidate
of each step), `value_steering` (a learned Q-function picks the noise of each step).

Route B, differentiable rewards: `refl` (one predicted clean sample), `draft` (the chain or its end), `alignprop` (a random cut), `vader`
(videos), `drtune` (stopped inputs), `srpo` (any noise level, relative rewards), `continuous_adjoint` (one step's memory),
`adjoint_matching` (memoryless SDE, regression on pulled-back gradients), `discrete_adjoint_matching` (the same over tokens).

Route C, online reinforcement learning: `reinforce` (DDPO-SF), `ddpo` (DDPO-IS), `dpok` (value baseline, KL), `flow_grpo`;
its variants: `flow_cps` (clean rollouts), `dance_grpo` (constant noise, best and worst), `mix_grpo` (sliding window), `grpo_guard`
(normalised ratios); with more of each rollout: `dense_grpo` (a reward for every step), `mv_grpo` (several captions);
on the forward process: `diffusion_nft`, `advantage_weighted_matching`.

Route D, pairs: `diffusion_dpo` (also IPO, hinge, DMPO, soft labels), `mapo` (no reference), `linear_dpo` (linear utility), `dspo` (score
matching), `inpo` (at inverted latents), all with `diffusion_sdpo` (a safeguard for winners); on exact log-probabilities: `d3po`
(trajectories), `spo` (steps from one state).
Route E, likes and dislikes: `diffusion_kto`. Route F, scored samples: `reward_weighted_regression`.
Route G, closed generators: `preference_flow_matching` (a flow from less to more preferred outputs).
"""
