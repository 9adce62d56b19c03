r"""Best-of-n and search over the initial noise (inference-time scaling, https://arxiv.org/abs/2501.09732).

The simplest alignment there is: draw N samples of a prompt and keep the one that the reward likes best. Random search is the same.
Zero-order search goes on from the best noise so far, to others near it, round by round:

$$ x^* = \arg\max_{i \le N} r(x^{(i)}), \qquad z' = c\, z + \sqrt{1 - c^2}\, \epsilon, \quad \epsilon \sim \mathcal N(0, I) $$

Best-of-n is at most $\log N - (N - 1)/N$ nats away from the pretrained model, and hard to beat at equal cost. Neighbours
have the law of fresh noise, so that no round leaves what the model was trained on, and the cosine c. The paper leaves the radius open; c is 0.95
here, a distance of a third of the noise's norm.

Reported: `rewards` of all candidates in the order drawn, `chosen` of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best(rewards: Tensor) -> Tensor:
    """Index of each row's largest reward, (P, N) -> (P,); the first of equals, and NaN only where a row has nothing else."""
    return torch.where(torch.isnan(rewards), -torch.inf, rewards).argmax(1)


def neighbour(pivot: Tensor, fresh: Tensor, *, cosine: float = 0.95) -> Tensor:
    """Noise near `pivot`, of the same shape and law, made with `fresh` noise of the same scale.

    Args:
        cosine: 1 is the pivot, 0 fresh noise.
    """
    if not 0 <= cosine <= 1:
        raise ValueError(f"cosine must lie between 0 (fresh noise) and 1 (the pivot itself), got {cosine:g}.")
    return cosine * pivot + math.sqrt(1 - cosine**2) * fresh
