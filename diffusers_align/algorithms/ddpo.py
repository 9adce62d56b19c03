r"""DDPO-IS: denoising diffusion policy optimization with importance sampling (https://arxiv.org/abs/2305.13301, eq. 6).

Several optimizer steps are made on one rollout. The ratio of the current to the sampling policy corrects for the difference,
and PPO's clip keeps it near 1:

$$ L = \mathbb E\big[\max(-A\rho_t, -A\,\mathrm{clip}(\rho_t, 1-c, 1+c))\big], \qquad
\rho_t = \exp\tfrac1D\big(\log p_\theta(x_{t-1}|x_t,c) - \log p_{old}(x_{t-1}|x_t,c)\big) $$

As in the official code (kvablack/ddpo-pytorch, 1958463), the log-probability is averaged over its D dimensions and c = 1e-4. What is
different: log-probabilities are taken in float32 of the latents as stored, per-prompt statistics are part of checkpoints. Where the
scheduler's `set_alpha_to_one` is true (not for SD 1.5 and SDXL), its last step ends at the alpha of timestep 0 and is scored; ours ends at
alpha 1, as the sampler does, and has no noise there and no log-probability.

A step's log-probability answers to the weights by the move of its mean over its noise. Where few steps end close to the clean sample, the last one with
noise may answer ten times as much as the others and rule the gradient: of six steps, `--sde_window 0 5` leaves it to the solver
(`training/online/ruling_steps.py`; benchmarks/README.md, "Which step an update is about").

Logged: `reward`, mean of the epoch's samples; `ratio_error`, |ratio - 1| before the epoch's first update, 0 if the replay is the
rollout; `clip_fraction` and `approx_kl` of the last update.
"""

from __future__ import annotations

from torch import Tensor

from ..rl.importance import clipped_surrogate, importance_ratio


def ddpo_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, per_dim: int, clip_range: float = 1e-4) -> Tensor:
    """The clipped loss of one denoising step, (B,).

    Args:
        log_prob, old_log_prob: (B,) nats, summed over dimensions; the second without gradient.
        advantage: (B,), without gradient.
        per_dim: number of dimensions of the action; 1 for the true ratio.
        clip_range: 1e-4, the official default.
    """
    return clipped_surrogate(importance_ratio(log_prob, old_log_prob, per_dim), advantage, clip_range)
