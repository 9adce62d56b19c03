r"""AlignProp: reward back-propagation with a random truncation (https://arxiv.org/abs/2310.03739).

A differentiable reward is back-propagated through the denoising chain, LoRA and checkpointing keep it in memory. Gradients through
the whole chain collapse samples onto the reward's favourites, those through its end leave the composition alone; so the step before
which the gradient is cut is drawn anew for each roll-out:

$$ \nabla_\theta J = \mathbb E_{c} \sum_{k=c}^{T-1} \Big(\frac{\partial x_{k+1}}{\partial v_k}\frac{\partial v_k}{\partial\theta}\Big)^{\!\top} a_{k+1},
\qquad c \sim \mathcal N(42, 5^2) \text{ of } 50 \text{ steps} $$

which is DRaFT-(T - c) with a random c.

Against the official code (mihirp1998/AlignProp, b22918a): it detaches the outputs before c, ours makes those calls without a graph: the same
gradient, since earlier states hold no parameter, for a fraction of the memory. Its reward sees images that were brought to [0, 1]
twice, so in [0.5, 1]; ours once. TRL's AlignPropTrainer drew a new cut inside the step loop, an independent decision a step: that is
another estimator, not offered here. Official sampler: DDIM, 50 steps, eta 1, guidance 5 (`stochastic=True` with `eta=1`).

Logged: `reward`; `truncation`, the mean number of steps with gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

OFFICIAL_STEPS = 50
STRATEGIES = ("gaussian", "uniform", "fixed")


def truncation(
    num_steps: int, generator: torch.Generator | None = None, *, strategy: str = "gaussian", mean: float = 42.0, std: float = 5.0, fixed: int = 49
) -> int:
    """The first solver step with gradient, drawn once a roll-out, in [0, num_steps - 1].

    Args:
        strategy: `gaussian`, the official default; `uniform` over the chain; `fixed`.
        mean, std, fixed: in steps of the official 50, rescaled to `num_steps`.

    Raises:
        ValueError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    if strategy == "uniform":
        return int(torch.randint(num_steps, (), generator=generator))
    step = fixed if strategy == "fixed" else mean + std * float(torch.randn((), generator=generator))
    return min(num_steps - 1, max(0, int(step * num_steps / OFFICIAL_STEPS)))


def grad_steps(num_steps: int, cut: int) -> list[int]:
    """The steps from `cut` on."""
    return list(range(cut, num_steps))


def alignprop_loss(loss: Tensor, *, coefficient: float = 0.01) -> Tensor:
    """coefficient * loss, (B,).

    Args:
        loss: (B,), the reward's map: `rl.reward_maps.shortfall` for HPS, whose best is 1; `distance` to 10 for aesthetics.
        coefficient: 0.01 officially; with Adam it changes the clipping alone.
    """
    return coefficient * loss
