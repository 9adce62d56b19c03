"""Policy gradients on the chain: the shipped losses on paths that the table draws itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_align.algorithms.ddpo import ddpo_loss
from diffusers_align.algorithms.dpok import dpok_loss
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.rl import batch_advantages, gae, group_advantages, terminal_rewards, trust_region_step
from diffusers_align.rl.chain import marginals, path_divergence
from diffusers_align.rl.mdp import divergence, soft_policy
from diffusers_align.rl.trust_region import flat_gradient

from .problem import Paths, Problem, learn, log_probs, roll_out

GROUP = 16


def priced_returns(problem: Problem, paths: Paths) -> Tensor:
    """What follows each step, (N, K): the reward of the sample, and the price of each step, beta times its log-ratio to the pretrained model."""
    ratios = paths.log_prob - log_probs(problem.chain.kernels.log(), paths.states)
    rewards = terminal_rewards(problem.reward[paths.final], problem.chain.num_steps) - problem.beta * ratios
    return gae(rewards, torch.zeros_like(rewards), lam=1.0)


def kl_at(problem: Problem, log_policy: Tensor, paths: Paths) -> Tensor:
    """KL to the pretrained model at the visited states, (N, K), as the scripts' `--kl_weight` has it: the states themselves are not differentiated."""
    steps = torch.arange(problem.chain.num_steps)
    return divergence(log_policy.exp(), problem.chain.kernels)[steps, paths.states[:, :-1]]


def best_of_visited_states(problem: Problem, beta: float) -> Tensor:
    r"""The policy (K, G, G) where a policy gradient with the KL at visited states stands still: $\pi_k \propto p_k\, e^{Q^\pi_k / \beta}$ with the plain
    values of the policy itself, which do not know what later steps will pay. It is not p*'s."""
    values, policy = problem.reward, []
    for kernel in reversed(problem.chain.kernels.unbind()):
        policy.append(soft_policy(values.expand_as(kernel), kernel, beta))
        values = policy[-1] @ values
    return torch.stack(policy[::-1])


def reinforce(problem: Problem, seed: int, *, updates: int = 300, batch: int = 2048) -> Tensor:
    """One update a roll-out; the price is part of the reward."""

    def loss(log_policy: Tensor, generator: torch.Generator) -> Tensor:
        paths = roll_out(problem.chain, log_policy.detach().exp(), batch, generator)
        advantage = priced_returns(problem, paths)
        return reinforce_loss(log_probs(log_policy, paths.states), advantage - advantage.mean(0)).sum(1).mean()

    return learn(problem, loss, seed, updates=updates)


def reused(
    problem: Problem,
    seed: int,
    rollouts: int,
    batch: int,
    advantages: Callable[[Paths], Tensor],
    loss: Callable[[Tensor, Paths, Tensor], Tensor],
    reuse: int = 4,
) -> Tensor:
    """Several updates a roll-out: `loss` of the table, of paths that a table of up to `reuse` - 1 updates ago has drawn, and of their advantages."""
    held: list[tuple[Paths, Tensor]] = []

    def of_update(log_policy: Tensor, generator: torch.Generator) -> Tensor:
        if len(held) % reuse == 0:
            paths = roll_out(problem.chain, log_policy.detach().exp(), batch, generator)
            held.append((paths, advantages(paths)))
        else:
            held.append(held[-1])
        return loss(log_policy, *held[-1]).sum(1).mean()

    return learn(problem, of_update, seed, updates=reuse * rollouts)


def ppo(problem: Problem, seed: int, *, rollouts: int = 150, batch: int = 2048, clip_range: float = 0.2) -> Tensor:
    """DDPO with importance sampling; the price is part of the reward, and advantages are normalised at each step."""

    def loss(log_policy: Tensor, paths: Paths, advantage: Tensor) -> Tensor:
        return ddpo_loss(log_probs(log_policy, paths.states), paths.log_prob, advantage, per_dim=1, clip_range=clip_range)

    return reused(problem, seed, rollouts, batch, lambda paths: batch_advantages(priced_returns(problem, paths)), loss)


def dpok(problem: Problem, seed: int, *, rollouts: int = 100, batch: int = 2048) -> Tensor:
    """A baseline (here the mean of the batch) and the KL at the visited states."""

    def advantages(paths: Paths) -> Tensor:
        rewards = problem.reward[paths.final]
        return (rewards - rewards.mean())[:, None]

    def loss(log_policy: Tensor, paths: Paths, advantage: Tensor) -> Tensor:
        options = {"per_dim": 1, "clip_range": 0.2, "reward_weight": 1.0, "kl_weight": problem.beta}
        return dpok_loss(log_probs(log_policy, paths.states), paths.log_prob, advantage, kl_at(problem, log_policy, paths), **options)

    return reused(problem, seed, rollouts, batch, advantages, loss)


def flow_grpo(problem: Problem, seed: int, *, rollouts: int = 100, batch: int = 2048) -> Tensor:
    """Groups of 16 and their mean, which shrinks the advantages by 15/16: the optimum is that of beta 16/15."""

    def advantages(paths: Paths) -> Tensor:
        return group_advantages(problem.reward[paths.final], torch.arange(batch) // GROUP, normalise=False)[:, None]

    def loss(log_policy: Tensor, paths: Paths, advantage: Tensor) -> Tensor:
        own = flow_grpo_loss(log_probs(log_policy, paths.states), paths.log_prob, advantage, per_dim=1, clip_range=0.2)
        return own + problem.beta * kl_at(problem, log_policy, paths)

    return reused(problem, seed, rollouts, batch, advantages, loss)


# --- TRPO, and what it promises ----------------------------------------------------------------------------------------


def trpo(problem: Problem, seed: int, *, rollouts: int = 60, batch: int = 4096, max_kl: float = 0.05) -> tuple[Tensor, list[dict[str, float]]]:
    """The policy (K, G, G) after `rollouts` steps, each allowed less KL than the one before, and each step's report with the two sides of the
    monotone bound."""
    logits, generator, reports = problem.chain.kernels.log().clone().requires_grad_(), torch.Generator().manual_seed(seed), []
    for rollout in range(rollouts):
        before = logits.detach().softmax(-1)
        paths = roll_out(problem.chain, before, batch, generator)
        advantage = priced_returns(problem, paths)
        advantage = advantage - advantage.mean(0)
        visits = marginals(problem.chain.initial, before)[:-1]

        def surrogate(paths=paths, advantage=advantage) -> Tensor:
            ratio = (log_probs(logits.log_softmax(-1), paths.states) - paths.log_prob).exp()
            return -(ratio * advantage).sum(1).mean()

        def kl(before=before, visits=visits) -> Tensor:
            return (visits * divergence(before, logits.softmax(-1))).sum()

        def product(vector: Tensor, kl=kl) -> Tensor:
            slope = flat_gradient(kl(), [logits], create_graph=True)
            return flat_gradient(slope.dot(vector), [logits])

        def evaluate(surrogate=surrogate, kl=kl) -> tuple[float, float]:
            with torch.no_grad():
                return surrogate().item(), kl().item()

        def start(surrogate=surrogate) -> tuple[float, Tensor]:
            return surrogate().item(), flat_gradient(surrogate(), [logits])

        allowed = max_kl * (1 - rollout / rollouts) ** 2
        report = trust_region_step([logits], start, product, evaluate, max_kl=allowed, cg_iterations=20, damping=1e-4)
        reports.append(report | {"max_kl": allowed} | monotone_bound(problem, before, logits.detach().softmax(-1)))
    return logits.detach().softmax(-1), reports


def monotone_bound(problem: Problem, old: Tensor, new: Tensor) -> dict[str, float]:
    r"""Both sides of TRPO's bound (https://arxiv.org/abs/1502.05477, theorem 1 and eq. 8), exactly, for K steps without a discount:
    $\eta(\pi') \ge L_\pi(\pi') - 2 K (K - 1)\,\epsilon\,\alpha^2$ with $\epsilon = \max |A_\pi|$ and $\alpha^2 \le \max_s \mathrm{KL}(\pi \| \pi') / 2$.

    The reward of a step is that of the priced problem under the old policy. There $4 \epsilon \gamma \alpha^2 / (1 - \gamma)^2$ is the sum over time of
    $4 \epsilon \alpha^2 t \gamma^t$, which for t < K and $\gamma = 1$ is $2 K (K - 1)\,\epsilon\,\alpha^2$.
    """
    chain, steps = problem.chain, problem.chain.num_steps
    price = -problem.beta * (old / chain.kernels).log()
    values, advantages = problem.reward, []
    for k in reversed(range(steps)):
        q = price[k] + values
        values = (old[k] * q).sum(-1)
        advantages.append(q - values[:, None])
    advantage = torch.stack(advantages[::-1])
    visits, visits_new = marginals(chain.initial, old)[:-1], marginals(chain.initial, new)[:-1]
    before = chain.initial @ values
    promised = before + (visits[:, :, None] * new * advantage).sum()
    after = before + (visits_new[:, :, None] * new * advantage).sum()
    slack = 2 * steps * (steps - 1) * advantage.abs().max() * divergence(old, new).max() / 2
    return {"before": float(before), "after": float(after), "surrogate_gain": float(promised - before), "lower_bound": float(promised - slack)}


def dpok_bound(problem: Problem, policy: Tensor) -> tuple[float, float]:
    """KL of the samples and of the paths to the pretrained model's: DPOK penalises the second, which is the larger one
    (https://arxiv.org/abs/2305.16381, section 4)."""
    samples = divergence(problem.samples_of(policy), problem.reference)
    return float(samples), float(path_divergence(problem.chain.initial, policy, problem.chain.kernels))
