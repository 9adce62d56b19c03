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
another estimator, not offered here. Other numbers of steps than 50 rescale the cut. Official sampler: DDIM, 50 steps, eta 1, guidance 5
(`stochastic=True` with `eta=1`).

Logged: `reward`; `truncation`, the mean number of steps with gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rl.reward_maps import RewardMap

OFFICIAL_STEPS = 50
# Of HPS, whose best is 1; for aesthetics the official map is `distance` to 10.
OFFICIAL_MAP = RewardMap("shortfall", target=1.0, scale=0.01)
MAX_DRAWS = 1000
STRATEGIES = ("gaussian", "uniform", "fixed")


def truncation(
    num_steps: int, generator: torch.Generator | None = None, *, strategy: str = "gaussian", mean: float = 42.0, std: float = 5.0, fixed: int = 49
) -> int:
    """The first solver step with gradient, drawn once a roll-out, in [1, num_steps - 1]; 0 for a chain of one step.

    As in the official code, cuts lie in 1 to 49 of 50 steps and a normal draw beyond them is repeated: a clamp would leave a tenth of
    the roll-outs with one step. Only a `fixed` cut may be 0, the whole chain.

    Args:
        strategy: `gaussian`, the official default; `uniform`; `fixed`.
        mean, std, fixed: in steps of the official 50, rescaled to `num_steps`.

    Raises:
        ValueError: an unknown strategy, a fixed cut that is no step, or a normal distribution that hardly ever gives one.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    if strategy == "fixed":
        if not 0 <= fixed < OFFICIAL_STEPS:
            raise ValueError(f"A fixed cut lies in [0, {OFFICIAL_STEPS - 1}], in steps of {OFFICIAL_STEPS}, got {fixed}.")
        return fixed * num_steps // OFFICIAL_STEPS
    if num_steps == 1:
        return 0
    if strategy == "uniform":
        return int(torch.randint(1, num_steps, (), generator=generator))
    for _ in range(MAX_DRAWS):
        step = int(mean + std * float(torch.randn((), generator=generator)))
        if 1 <= step < OFFICIAL_STEPS:
            return max(1, step * num_steps // OFFICIAL_STEPS)
    raise ValueError(f"{MAX_DRAWS} draws of a normal distribution with mean {mean} and std {std} gave no step from 1 to {OFFICIAL_STEPS - 1}.")


def grad_steps(num_steps: int, cut: int) -> list[int]:
    """The steps from `cut` on."""
    return list(range(cut, num_steps))


def alignprop_loss(reward: Tensor, reward_map: RewardMap = OFFICIAL_MAP) -> Tensor:
    """The mapped reward, (B,): 0.01 (1 - reward) officially. With Adam the factor changes the clipping alone."""
    return reward_map(reward)
