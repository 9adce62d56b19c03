r"""Reward-weighted regression: fine-tuning on samples in proportion to how good they are.

Samples are drawn once, or in rounds, and scored; the model is trained on them as in pretraining, each weighted by its reward. With
weights exp(r / tau) the samples' distribution p becomes p(x) exp(r(x) / tau): for a Gaussian N(mu, S) and the reward cx, exactly
N(mu + cS/tau, S).

$$ L = \mathbb E\big[w(r)\, L_\theta\big] + w_{pre}\,\mathbb E_{pre}\big[L_\theta\big] + w_{kl}\, \tfrac1D\|f_\theta - f_{ref}\|^2,
\qquad w_i = N\,\mathrm{softmax}(r / \tau)_i $$

Sources: for diffusion, the baseline RWR of DDPO (https://arxiv.org/abs/2305.13301); with rewards in [0, 1] as weights and a pretraining
term, https://arxiv.org/abs/2302.12192; the best of each prompt, RAFT (https://arxiv.org/abs/2304.06767).

Against DDPO's code (jannerm/ddpo, f0b6ca7): its temperature multiplies the reward (0.2); here it divides, as a temperature does, so
its 0.2 is 5. It regresses the guided prediction; here guidance is off in training, as in pretraining. Few samples may bear all
the weight: the effective sample size is reported, and refused below 1 %. The Flow-GRPO paper found RWR to stall where online
methods go on.

Logged: `weighted_error`, mean of w L; `effective_samples`, $(\sum w)^2 / \sum w^2$; `samples_for_90_percent` of the weight; `max_weight`; `ref_distance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..rl.diagnostics import effective_sample_size
from ..rl.importance import refuse_spread

KINDS = ("softmax", "rank", "top_k", "top_q", "exp_clipped", "raw")


def reward_weights(
    rewards: Tensor,
    groups: Tensor | None = None,
    *,
    kind: str = "softmax",
    scope: str = "global",
    temperature: float = 1.0,
    top_k: int = 1,
    top_q: float = 0.1,
    max_weight: float = 20.0,
    force: bool = False,
) -> Tensor:
    r"""The weights (N,), float64: 0 where the reward is NaN, with mean 1 over the others (`raw` excepted).

    Args:
        rewards: (N,), higher is better.
        groups: (N,) integers; samples of one prompt share theirs. For `scope="prompt"`.
        kind: `softmax`, exp(r / temperature); `rank`, the same of ranks spread over [0, 1], which no outlier can sway; `top_k`
            and `top_q`, the best number or share alone, ties at the border by equal parts; `exp_clipped`,
            min(exp((r - mean) / temperature), max_weight) (AWR, https://arxiv.org/abs/1910.00177); `raw`, r itself, which must
            lie in [0, 1], and not normalised (https://arxiv.org/abs/2302.12192).
        scope: `global`, or `prompt`: prompts then weigh alike however good their samples are, each by its number of samples. Where the
            samples of a prompt are a group, as in Flow-GRPO's fine-tuning script, that is its softmax over the group.
        temperature: DIVIDES; towards 0 the best sample alone, towards infinity plain fine-tuning. 1 is our choice: rewards
            have a scale of their own; 5 is DDPO's, whose code multiplies by 0.2.
        top_k, top_q: 1, best of n; 0.1, DDPO's 90th percentile.
        max_weight: 20, AWR's, before normalisation.
        force: allow an effective sample size below 1 %.

    Raises:
        ValueError: an unknown kind or scope, a parameter out of its range, no groups, no reward that could be scored, raw
            rewards outside [0, 1] or all 0, or an effective sample size below 1 %.
    """
    _check(kind, scope, groups, temperature, top_k, top_q)
    scored = ~rewards.isnan()
    if not bool(scored.any()):
        raise ValueError("No sample could be scored: all rewards are NaN.")
    own = rewards[scored].double()
    if kind == "raw":
        if bool((own < 0).any() or (own > 1).any()):
            raise ValueError(f"Raw weights must lie in [0, 1], got {own.min():g} to {own.max():g}: rescale the rewards, or choose softmax.")
        if not bool(own.any()):
            raise ValueError("Raw weights are all 0: nothing would be learned. Rescale the rewards, or choose softmax.")
        return torch.zeros_like(rewards, dtype=torch.float64).masked_scatter(scored, own)
    of_scope: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda r: (r / temperature).softmax(0),
        "rank": lambda r: (_ranks(r) / temperature).softmax(0),
        "top_k": lambda r: _best(r, min(top_k, len(r))),
        "top_q": lambda r: _best(r, math.ceil(top_q * len(r))),
        "exp_clipped": lambda r: ((r - r.mean()) / temperature).exp().clamp(max=max_weight),
    }
    weights, labels = torch.empty_like(own), torch.zeros_like(own) if scope == "global" else groups[scored]
    for label in labels.unique():
        members = labels == label
        weight = of_scope[kind](own[members])
        weights[members] = weight * (len(weight) / weight.sum())
    _refuse_collapse(weights, force)
    return torch.zeros_like(rewards, dtype=torch.float64).masked_scatter(scored, weights)


def _check(kind: str, scope: str, groups: Tensor | None, temperature: float, top_k: int, top_q: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"Unknown kind {kind!r}; choose one of {', '.join(KINDS)}.")
    if scope not in ("global", "prompt"):
        raise ValueError(f'scope is "global" or "prompt", got {scope!r}.')
    if scope == "prompt" and groups is None:
        raise ValueError('scope="prompt" needs `groups`, which samples share a prompt.')
    if not (temperature > 0 and top_k >= 1 and 0 < top_q <= 1):
        raise ValueError(f"temperature > 0, top_k >= 1 and 0 < top_q <= 1 are needed, got {temperature}, {top_k}, {top_q}.")


def _ranks(rewards: Tensor) -> Tensor:
    """From 0 for the worst to 1 for the best; ties share their mean rank."""
    _, place, ties = rewards.unique(return_inverse=True, return_counts=True)
    mean_rank = ties.cumsum(0) - (ties.double() + 1) / 2
    return mean_rank[place] / max(1, len(rewards) - 1)


def _best(rewards: Tensor, number: int) -> Tensor:
    """1 for the `number` best; those that tie at the border share what is left of it."""
    border = rewards.sort(descending=True).values[number - 1]
    above, at = rewards > border, rewards == border
    return above.double() + at.double() * (number - above.sum()) / at.sum()


def _refuse_collapse(weights: Tensor, force: bool) -> None:
    effective = float(effective_sample_size(weights.log()))
    if effective < 0.01 * len(weights) and not force:
        raise ValueError(
            f"The weights are those of {effective:.3g} samples out of {len(weights)}: training would copy a handful. Raise the temperature, "
            'use scope="prompt", kind="rank" or kind="exp_clipped", or pass force to go on.'
        )


def weight_statistics(weights: Tensor) -> dict[str, float]:
    """The logged numbers of the weights (N,), some of them positive: `effective_samples`, `samples_for_90_percent`, `max_weight`."""
    falling = weights.double().sort(descending=True).values
    # The last sum is the total itself, so that rounding cannot ask for one sample more than there are.
    sums = falling.cumsum(0)
    return {
        "effective_samples": float(effective_sample_size(falling.log())),
        "samples_for_90_percent": float((sums < 0.9 * sums[-1] * (1 - 1e-12)).sum() + 1),
        "max_weight": float(falling[0]),
    }


def reward_weighted_loss(
    error: Tensor,
    weight: Tensor,
    ref_distance: Tensor | float = 0.0,
    pretraining_error: Tensor | float = 0.0,
    *,
    kl_weight: float = 0.0,
    pretrain_weight: float = 0.0,
) -> Tensor:
    """The loss of each sample, (B,).

    Args:
        error: (B,) mean squared error of the model's output at a noised sample.
        weight: (B,), of `reward_weights`, without gradient.
        ref_distance: (B,) mean squared difference of the outputs of model and reference there.
        pretraining_error: (B,) or a number, the error on real images.
        kl_weight, pretrain_weight: weights of these two, both 0: plain RWR.

    Raises:
        ValueError: one of them is of other samples.
    """
    refuse_spread(error, weight=weight, ref_distance=ref_distance, pretraining_error=pretraining_error)
    return weight.to(error) * error + kl_weight * ref_distance + pretrain_weight * pretraining_error
