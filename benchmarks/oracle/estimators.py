r"""Bias and variance of gradient estimators, by adding up all paths of a chain that has few: nothing is drawn.

The gradient is that of a table's logits. An estimator is $g = \sum_k A_k \nabla \log \pi(x_{k+1} \mid x_k)$ of one path with its advantages $A_k$; its bias is
$\mathbb E g - \nabla J$, its variance $\mathbb E |g|^2 - |\mathbb E g|^2$. What theory says of generalised advantages is computed apart, by
recursions over states:

* With $V = V^\pi + e$ the bias is that of $f_k(x') = (1 - \lambda)\, e_{k+1}(x') + \lambda\, \mathbb E[f_{k+1} \mid x']$ in the place of the advantage: none at
  $\lambda = 1$, whatever V, and none at any $\lambda$ with $V^\pi$. The error in the state itself is a baseline's and has no bias.
* With $V^\pi$ the TD errors are uncorrelated, so $\mathbb E[A_k^2 \mid x_k, x_{k+1}] = \delta_k^2 + \lambda^2 S_{k+1}$ with
  $S_k = \mathbb E[\delta_k^2 + \lambda^2 S_{k+1} \mid x_k]$: the variance rises with $\lambda$.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from diffusers_align.algorithms.dense_grpo import step_gains
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.rl import gae, terminal_rewards
from diffusers_align.rl.chain import marginals

from .problem import Problem, log_probs, problem, reward_of

LAMBDAS = (0.0, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class AllPaths:
    """Every path of a policy.

    Attributes:
        problem, policy: (K, G, G) of the policy.
        states: (N, K + 1), N = G^(K + 1).
        probability: (N,).
        rewards: (N, K), the gains of the clean estimates' reward, as DenseGRPO has them.
        scores: (N, K, P), the gradient of each step's log-probability by the logits.
    """

    problem: Problem
    policy: Tensor
    states: Tensor
    probability: Tensor
    rewards: Tensor
    scores: Tensor


def all_paths(points: int = 5, steps: int = 3, seed: int = 0) -> AllPaths:
    """Of a policy that has moved away from the pretrained model."""
    held = problem(points, tuple(torch.linspace(1, 0.1, steps + 1).tolist()))
    generator = torch.Generator().manual_seed(seed)
    logits = held.chain.kernels.clamp(min=1e-3).log() + torch.randn(held.chain.kernels.shape, generator=generator, dtype=torch.float64)
    policy = logits.softmax(-1)
    states = torch.tensor(list(product(range(points), repeat=steps + 1)))
    log_probability = held.chain.initial.log()[states[:, 0]] + log_probs(policy.log(), states).sum(1)
    completions = reward_of(held.chain.clean)[torch.arange(steps + 1), states]
    return AllPaths(held, policy, states, log_probability.exp(), step_gains(completions), _scores(logits, states))


def _scores(logits: Tensor, states: Tensor) -> Tensor:
    """By the shipped loss, whose gradient at an advantage of 1 is minus the score's."""
    steps, points, _ = logits.shape
    scores = torch.zeros(len(states), steps, logits.numel()).to(logits)
    for k, x, to in product(range(steps), range(points), range(points)):
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(reinforce_loss(leaf.log_softmax(-1)[k, x, to][None], torch.ones(1).to(logits)).sum(), leaf)
        scores[(states[:, k] == x) & (states[:, k + 1] == to), k] = -gradient.flatten()
    return scores


def exact_gradient(paths: AllPaths) -> Tensor:
    """Of the mean reward, (P,), by differentiating the marginals."""
    logits = paths.policy.log().requires_grad_()
    final = marginals(paths.problem.chain.initial, logits.softmax(-1))[-1]
    return torch.autograd.grad(final @ paths.problem.reward, logits)[0].flatten()


def moments(paths: AllPaths, advantages: Tensor) -> tuple[Tensor, float]:
    """Mean (P,) and variance of the estimator with these advantages (N, K)."""
    estimates = torch.einsum("nk,nkp->np", advantages, paths.scores)
    mean = paths.probability @ estimates
    return mean, float(paths.probability @ estimates.square().sum(1) - mean.square().sum())


def exact_values(paths: AllPaths) -> Tensor:
    """V_k(x) of the policy with the gains as rewards, (K + 1, G): what is still to come, the sample's reward less that of the clean estimate."""
    values = [paths.problem.reward]
    for kernel in reversed(paths.policy.unbind()):
        values.append(kernel @ values[-1])
    return torch.stack(values[::-1]) - reward_of(paths.problem.chain.clean)


def along(values: Tensor, states: Tensor) -> Tensor:
    """Of a table (K + 1, G), the entries of each path's states before its last, (N, K)."""
    return values[torch.arange(states.shape[1] - 1), states[:, :-1]]


def wrong_values(paths: AllPaths, seed: int = 1, size: float = 0.5) -> Tensor:
    """The exact ones with an error of `size`, (K + 1, G); there is nothing to be wrong about at the end."""
    error = size * torch.randn(paths.policy.shape[:2], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return exact_values(paths) + torch.cat([error, torch.zeros_like(error[:1])])


def estimators(paths: AllPaths) -> dict[str, Tensor]:
    """Advantages (N, K) of all paths by the name of the estimator."""
    total = paths.rewards.sum(1)
    final = terminal_rewards(total, paths.rewards.shape[1])
    nothing, mean = torch.zeros_like(paths.rewards), torch.full_like(paths.rewards, float(paths.probability @ total))
    found = {
        "return": gae(final, nothing, lam=1.0),
        "return, constant baseline": gae(final, nothing, lam=1.0) - mean,
        "reward to go": gae(paths.rewards, nothing, lam=1.0),
    }
    for name, values in (("V exact", exact_values(paths)), ("V wrong", wrong_values(paths))):
        found |= {f"GAE {lam:g}, {name}": gae(paths.rewards, along(values, paths.states), lam=lam) for lam in LAMBDAS}
    return found


# --- what theory says --------------------------------------------------------------------------------------------------


def bias_in_theory(paths: AllPaths, lam: float) -> Tensor:
    """Of generalised advantages with `wrong_values`, (P,): the first recursion of the page above."""
    error = wrong_values(paths) - exact_values(paths)
    visits, credit, rows = marginals(paths.problem.chain.initial, paths.policy), torch.zeros_like(error[0]), []
    for k in reversed(range(len(paths.policy))):
        later = paths.policy[k + 1] @ credit if k + 1 < len(paths.policy) else torch.zeros_like(credit)
        credit = (1 - lam) * error[k + 1] + lam * later
        centred = credit - paths.policy[k] @ credit[:, None]
        rows.append(visits[k][:, None] * paths.policy[k] * centred)
    return torch.stack(rows[::-1]).flatten()


def variance_in_theory(paths: AllPaths, lam: float) -> float:
    """Of generalised advantages with exact values: the second recursion."""
    chain, values, visits = paths.problem.chain, exact_values(paths), marginals(paths.problem.chain.initial, paths.policy)
    completions, spread, total = reward_of(chain.clean), torch.zeros_like(values[0]), 0.0
    for k in reversed(range(len(paths.policy))):
        error = completions[k + 1] - completions[k][:, None] + values[k + 1] - values[k][:, None]  # (x, x')
        square = error.square() + lam**2 * spread
        length = 1 - 2 * paths.policy[k] + paths.policy[k].square().sum(-1, keepdim=True)  # |score|^2
        total += float((visits[k][:, None] * paths.policy[k] * length * square).sum())
        spread = (paths.policy[k] * square).sum(-1)
    return total - float(exact_gradient(paths).square().sum())


def table(paths: AllPaths) -> list[dict[str, float | str]]:
    """A row an estimator: bias and variance as shares of the squared gradient, and what theory says of them, NaN where it is not computed."""
    exact = exact_gradient(paths)
    scale, rows = float(exact.square().sum()), []
    for name, advantages in estimators(paths).items():
        mean, variance = moments(paths, advantages)
        bias, said = float((mean - exact).norm()), 0.0
        if "wrong" in name:
            said = float(bias_in_theory(paths, float(name.split()[1].rstrip(","))).norm())
        known = variance_in_theory(paths, float(name.split()[1].rstrip(","))) if "exact" in name else float("nan")
        rows.append({"name": name, "bias": bias / scale**0.5, "bias_said": said / scale**0.5, "variance": variance / scale, "variance_said": known / scale})
    return rows
