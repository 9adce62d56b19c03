r"""ReFL: reward feedback learning from the clean sample predicted in mid-denoising (https://arxiv.org/abs/2304.05977).

The sampler walks without gradient to a random step late in the chain. There the model's prediction of the clean sample is good
enough to be scored, so it is decoded and the reward's gradient goes back through that one denoiser call. A hinge stops the
push where the reward model is satisfied:

$$ L = \lambda\, \mathbb E_{k \sim U[k_0, k_1]}\, \max\big(0,\, m - r(\mathrm{decode}(\hat x_0(\mathrm{sg}(x_k); \theta)), c)\big) $$

A roll-out with `grad_steps=[k]` and `stop_step=k`.

Against the official code (THUDM/ImageReward, ReFL.py, c1392c6): the loss is the same, margin 2 on a reward normalised to mean 0 and
standard deviation 1, scale 1e-3. Its window, steps 30 to 39 of 40, is here a fraction of any number of steps. It samples without
classifier-free guidance (`guidance_scale=1`). The paper adds a pre-training loss on captioned images, which the code leaves out,
and whose users report models worse than the base: give `train_refl.py` such images (`--pretrain_dataset_name`), or watch a second
reward. With Adam the scale changes the weight against other terms and the clipping alone.

Logged: `reward` of the predicted clean samples, below that of finished ones; `hinge_inactive`, the share beyond the margin, which
has no gradient: 1 is the end of training; `step`, the mean k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rl.reward_maps import RewardMap

# A margin of two standard deviations of ImageReward.
OFFICIAL_MAP = RewardMap("hinge", target=2.0, scale=1e-3)


def middle_step(num_steps: int, generator: torch.Generator | None = None, *, window: tuple[float, float] = (0.75, 0.975)) -> int:
    """The solver step to predict from, uniform over the steps between two fractions of the chain, both included; the next one where none
    lies between them, and the last at most.

    Args:
        window: (0.75, 0.975) is the official 30 to 39 of 40.

    Raises:
        ValueError: the fractions are not ordered within [0, 1].
    """
    if not 0 <= window[0] <= window[1] <= 1:
        raise ValueError(f"The window must be two fractions in order within [0, 1], got {window}.")
    first = min(num_steps - 1, math.ceil(window[0] * num_steps - 1e-9))
    last = max(first, min(num_steps - 1, math.floor(window[1] * num_steps + 1e-9)))
    return int(torch.randint(first, last + 1, (), generator=generator))


def refl_loss(reward: Tensor, reward_map: RewardMap = OFFICIAL_MAP) -> Tensor:
    """scale * max(0, margin - reward), (B,), or another map.

    Args:
        reward: (B,), of the predicted clean samples, with gradient; NaN stays NaN.
    """
    return reward_map(reward)
