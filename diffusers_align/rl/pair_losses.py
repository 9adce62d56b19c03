r"""What a pair of samples says: losses of the logit z by which the winner is preferred, and pairs from scores.

A label p is the probability that the first sample is the better one, so a loss f(z) of certain labels becomes
$p f(z) + (1 - p) f(-z)$: cDPO's for f = -log sigma. Ties are p = 1/2, which holds z at 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

PAIR_LOSSES = ("sigmoid", "hinge", "ipo", "dmpo")


def pair_loss(
    logit: Tensor,
    *,
    kind: str = "sigmoid",
    label: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    ipo_tau: float = 0.5,
    dmpo_alpha: float = 0.01,
) -> Tensor:
    r"""The loss of preference logits z, (B,).

    Args:
        logit: (B,).
        kind: `sigmoid`, $-\log\sigma(z)$ (DPO, https://arxiv.org/abs/2305.18290); `hinge`, max(0, 1 - z) (SLiC,
            https://arxiv.org/abs/2305.10425); `ipo`, $(z - 1/2\tau)^2$ (https://arxiv.org/abs/2310.12036); `dmpo`,
            $\mathrm{KL}(\mathrm{Bern}(\sigma(z)) \| \mathrm{Bern}(1 - \alpha))$ (https://arxiv.org/abs/2507.07510).
        label: (B,) or a number in [0, 1], the probability that the winner is the better one; 1 if absent.
        label_smoothing: the share of labels that are wrong, in [0, 1/2]; 0 as in DPO.
        ipo_tau: the logit that IPO aims at is 1 / (2 tau): 1 at 0.5, our choice, a preference of 73 %.
        dmpo_alpha: 0.01, the official code's (AIDC-AI/Diffusion-SDPO, 84fb241); DMPO aims at logit(1 - alpha).

    Raises:
        ValueError: an unknown kind, or a label that is no probability.
    """
    losses = {
        "sigmoid": lambda z: -F.logsigmoid(z),
        "hinge": lambda z: F.relu(1 - z),
        "ipo": lambda z: (z - 1 / (2 * ipo_tau)).square(),
        "dmpo": lambda z: _bernoulli_kl(z, dmpo_alpha),
    }
    if kind not in losses:
        raise ValueError(f"Unknown kind {kind!r}; choose one of {', '.join(PAIR_LOSSES)}.")
    if label is None and label_smoothing == 0:
        return losses[kind](logit)
    p = torch.as_tensor(1.0 if label is None else label, dtype=logit.dtype, device=logit.device)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("A label is the probability in [0, 1] that the winner is the better one: 1 certain, 0.5 a tie.")
    p = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return p * losses[kind](logit) + (1 - p) * losses[kind](-logit)


def _bernoulli_kl(z: Tensor, alpha: float) -> Tensor:
    """KL of Bern(sigma(z)) from Bern(1 - alpha), finite for any z."""
    gain, loss = F.logsigmoid(z) - math.log1p(-alpha), F.logsigmoid(-z) - math.log(alpha)
    return torch.sigmoid(z) * gain + torch.sigmoid(-z) * loss


def plackett_luce_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    r"""The negative log-likelihood of rankings, (B,), in the model of Plackett and Luce: the best is chosen first, then the best of the rest ...

    $$ -\sum_i \log \frac{e^{s_i}}{\sum_{j:\ r_j \ge r_i} e^{s_j}} $$

    Of two samples it is the logistic loss of their difference. Samples of equal rank are each chosen from all that were left before any of
    them (Breslow's form of the partial likelihood, https://doi.org/10.2307/2529620), which pulls their scores together.
    Source: R. L. Plackett, The analysis of permutations, JRSS C 24 (1975).

    Args:
        scores: (B, K), higher is better.
        ranks: (B, K), 1 is the best; NaN where a ranking has fewer than K samples, whatever the score there.

    Raises:
        ValueError: the shapes differ.
    """
    if scores.shape != ranks.shape:
        raise ValueError(f"Scores and ranks need one shape, got {tuple(scores.shape)} and {tuple(ranks.shape)}.")
    there = ~ranks.isnan()
    scores = torch.where(there, scores, 0)
    left = there[:, None] & (ranks[:, None] >= ranks[:, :, None])  # (B, i, j): j was still there when i was chosen
    left = left | ~there[:, :, None]  # keeps the sums of absent ones finite
    total = scores[:, None].expand_as(left).masked_fill(~left, -torch.inf).logsumexp(-1)
    return torch.where(there, total - scores, 0).sum(-1)


def ranked_pairs(scores: Tensor, groups: Tensor, *, kind: str = "all", min_gap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pairs of samples of one prompt, as indices (P,) of the better and (P,) of the worse one.

    Ties and samples that could not be scored (NaN) are in no pair.

    Args:
        scores: (N,), higher is better.
        groups: (N,) integers; samples of one prompt share theirs.
        kind: `all` pairs of a group (D3PO), or its `extremes`, best against worst (online DPO).
        min_gap: pairs whose scores differ by no more than this are left out.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("all", "extremes"):
        raise ValueError(f'kind is "all" or "extremes", got {kind!r}.')
    winners, losers = [], []
    for group in groups.unique():
        members = torch.nonzero((groups == group) & ~scores.isnan()).flatten()
        if kind == "extremes" and len(members) > 1:
            members = members[torch.stack([scores[members].argmax(), scores[members].argmin()])]
        first, second = torch.nonzero(scores[members, None] - scores[None, members] > min_gap).unbind(1)
        winners.append(members[first])
        losers.append(members[second])
    return torch.cat(winners), torch.cat(losers)
