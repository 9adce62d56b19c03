r"""DanceGRPO: GRPO for diffusion and flow models with constant noise (https://arxiv.org/abs/2505.07818).

Flow-GRPO's loss on another rollout: an SDE whose noise is the same at every time (the scheduler's `sde_type="dance_grpo"`,
eta = 0.3), one initial noise for all samples of a prompt, a random share of the steps, and of each group only its best and worst
samples, which say most about what to do and what to avoid.

$$ L = \mathbb E_{i \in \mathrm{best} \cup \mathrm{worst}}\big[\max(-A_i\rho_{i,t}, -A_i\,\mathrm{clip}(\rho_{i,t}, 1-c, 1+c))\big], \qquad
A_i = \frac{r_i - \mathrm{mean}_G\, r}{\mathrm{std}_G\, r} $$

Advantages are relative to the whole group and divided by its own std (`std_ddof` 1, torch's default, in the official code).
Against that code (XueZeyue/DanceGRPO, 15cc71d): 1e-4 rather than 1e-8 is added to that std, which keeps rounding noise among tied rewards
small; the noise table is the pipeline's own, where that code always shifts by 3; the reward sees the final sample, not the clean
sample that the last step predicts; timesteps keep their fractions; samples that were not selected are replayed with advantage 0,
so that batches keep their shapes and ratios start at exactly 1.

Logged: as for Flow-GRPO.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_and_worst(advantages: Tensor, groups: Tensor, keep: int) -> Tensor:
    """The advantages of each group's `keep` // 2 best and as many worst samples, (N,); 0 for the others.

    What is kept grows by N over its number, so that a mean over all samples is the mean over those kept.

    Args:
        advantages: (N,).
        groups: (N,) integers.
        keep: even; 8 of 12 in the official recipe (four best, four worst).

    Raises:
        ValueError: `keep` is odd, not positive, or more than a group has.
    """
    if keep < 2 or keep % 2 or keep > int(groups.unique(return_counts=True)[1].min()):
        raise ValueError(f"best_of_n must be even, at least 2 and at most the group's size, got {keep}.")
    kept = torch.zeros_like(advantages)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        order = members[advantages[members].argsort(stable=True)]
        chosen = torch.cat([order[: keep // 2], order[len(order) - keep // 2 :]])
        kept[chosen] = advantages[chosen] * (len(members) / keep)
    return kept
