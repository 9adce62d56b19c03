r"""SPO: step-aware preference optimization (https://arxiv.org/abs/2406.04314).

An image's preference says little of a single step: the better image may have come from worse steps. SPO draws k candidates for
the next state from one and the same state, has each judged by a clean image predicted from it, and takes best and worst as that
step's pair. Sampling goes on from one of the candidates at random, so that the next pair shares its state too and the states are
those of the policy.

$$ L_k = -\log\sigma\Big(\beta\Big[\log\frac{p_\theta(x^w_{k+1} | x_k)}{p_{ref}(x^w_{k+1} | x_k)}
- \log\frac{p_\theta(x^l_{k+1} | x_k)}{p_{ref}(x^l_{k+1} | x_k)}\Big]\Big) \quad\text{if}\quad \tanh\tfrac{s^w - s^l}{2} > \delta $$

with log-probabilities as means over dimensions, clipped as in D3PO, and beta = 10. tanh is the difference of the two softmax probabilities: scores s must
be on a scale on which a difference of 1 means something, as logits of a preference model are.

Against the official code (RockeyCoss/SPO, 27a8642): k = 4, delta = 0.3 (SD 1.5) or k = 2, delta = 0.4 (SDXL), from solver step 4 of 20 on, clip 0.1 of
either side (`clip="official"`); the default holds one side only, as D3PO's does. Any score of a predicted clean image will do; the official one is a
preference model that was trained on predictions from noised images (`train_reward.py --step_aware`).

Logged: `kept`, the share of states whose pair is kept; `score_gap`, mean best minus worst; `accuracy`, `margin`, `clip_fraction` as for D3PO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .d3po import d3po_loss


@dataclass(frozen=True)
class StepPairs:
    """Of N states, which of the k candidates make the pair.

    Attributes:
        winner, loser: (N,) indices of candidates.
        keep: (N,) bool: whether the scores differ enough.
        gap: (N,) best minus worst score, 0 where fewer than two candidates could be scored.
    """

    winner: Tensor
    loser: Tensor
    keep: Tensor
    gap: Tensor


def step_pairs(scores: Tensor, *, threshold: float = 0.3) -> StepPairs:
    """Best and worst candidate of each state.

    Args:
        scores: (N, k), higher is better; candidates of NaN are in no pair.
        threshold: delta, the least difference of the two softmax probabilities; 0.3 for SD 1.5 and 0.4 for SDXL in the
            official configs.

    Raises:
        ValueError: fewer than two candidates.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"A pair needs the scores (N, k) of k >= 2 candidates from each state, got {tuple(scores.shape)}.")
    best, winner = scores.nan_to_num(-torch.inf).max(1)
    worst, loser = scores.nan_to_num(torch.inf).min(1)
    gap = torch.where((~scores.isnan()).any(1), best - worst, 0)
    return StepPairs(winner, loser, torch.tanh(gap / 2) > threshold, gap)


def resample(num_states: int, num_candidates: int, generators: list[torch.Generator]) -> Tensor:
    """Which candidate each state goes on from, (N,), uniform: the step-wise resampler.

    Args:
        generators: one a state, so that a sample's path depends on neither the batch nor the number of processes.
    """
    if len(generators) != num_states:
        raise ValueError(f"{num_states} states need a generator each, got {len(generators)}.")
    return torch.stack([torch.randint(num_candidates, (), generator=g, device=g.device).cpu() for g in generators])


def spo_loss(
    log_prob_w: Tensor,
    log_prob_l: Tensor,
    ref_log_prob_w: Tensor,
    ref_log_prob_l: Tensor,
    *,
    per_dim: int,
    beta: float = 10.0,
    clip: str = "one_sided",
    clip_range: float = 0.1,
) -> Tensor:
    """The loss of each kept pair at one solver step, (B,).

    Args:
        log_prob_w, log_prob_l: (B,) nats, summed over dimensions, of the two candidates, both by the transition from their common state.
        ref_log_prob_w, ref_log_prob_l: (B,), the reference's, without gradient.
        per_dim: number of dimensions of the action; 1 for the true ratio.
        beta: 10, the official default (500 for LPO).
        clip, clip_range: as for D3PO's `step_logit`.
    """
    options = {"beta": beta, "clip": clip, "clip_range": clip_range}
    return d3po_loss(log_prob_w, log_prob_l, ref_log_prob_w, ref_log_prob_l, per_dim=per_dim, **options)
