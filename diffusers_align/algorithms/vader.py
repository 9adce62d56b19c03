r"""VADER: video diffusion alignment by reward gradients (https://arxiv.org/abs/2407.08737).

Reward models of images, of video and text, of objects know more than preference data for videos could teach. Their gradients go
back through the end of the sampling chain, as in DRaFT, and through a few decoded frames, which is what makes a video fit into
memory:

$$ \nabla_\theta J = \mathbb E\, \frac{1}{|F|} \sum_{f \in F} \sum_{k=c}^{T-1} \Big(\frac{\partial x_{k+1}}{\partial v_k}
\frac{\partial v_k}{\partial\theta}\Big)^{\!\top} a^{(f)}_{k+1}, \qquad a^{(f)}_T = \nabla_{x_T} r(\mathrm{decode}_f(x_T)) $$

with c the last step, a random or a chosen one, F a random frame, the ends and the middle, or every other one.

Against the official code (mihirp1998/VADER, adaf2ef): it switches the LoRA's `requires_grad` at c, ours makes the calls before it without a
graph; the gradient is the same. It decodes frames one by one; an autoencoder that is causal in time needs the latents before a frame as
well, which the roll-out's `frames` sees to. Official: DDIM of 50 steps, eta 1, LoRA of rank 8 to 16, learning rate 2e-4, no penalty;
it is stopped by hand.

The map's target, 1, is the best of HPS. The distance to it pulls rewards of a larger scale down: they need `--reward_target`, or `--reward_map none`,
and a run whose rewards begin above the target says so.

Logged: `reward`, over the decoded frames; `truncation`, steps with gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rl.reward_maps import RewardMap

OFFICIAL_STEPS = 50
OFFICIAL_MAP = RewardMap("distance", target=1.0)
BACKPROP_MODES = ("last", "random", "specific")
FRAME_MODES = ("random", "ends", "alternate", "all")


def grad_steps(num_steps: int, generator: torch.Generator | None = None, *, mode: str = "last", specific: int = 15) -> list[int]:
    """The steps from the cut on.

    Args:
        mode: `last` step alone; `random`, a cut uniform over the chain, drawn once a roll-out; `specific`.
        specific: the cut in steps of the official 50, rescaled.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in BACKPROP_MODES:
        raise ValueError(f"Unknown mode {mode!r}; choose one of {', '.join(BACKPROP_MODES)}.")
    if mode == "random":
        cut = int(torch.randint(num_steps, (), generator=generator))
    else:
        cut = num_steps - 1 if mode == "last" else min(num_steps - 1, specific * num_steps // OFFICIAL_STEPS)
    return list(range(cut, num_steps))


def vader_loss(reward: Tensor, reward_map: RewardMap = OFFICIAL_MAP) -> Tensor:
    """The mapped reward of the decoded frames, (B,): |1 - HPS| officially."""
    return reward_map(reward)


def frame_indices(num_frames: int, generator: torch.Generator | None = None, *, mode: str = "random") -> list[int]:
    """Which frames of a video to decode and score: a `random` one, first, middle and last (`ends`), `alternate` ones, or `all`.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in FRAME_MODES:
        raise ValueError(f"Unknown mode {mode!r}; choose one of {', '.join(FRAME_MODES)}.")
    if mode == "random":
        return [int(torch.randint(num_frames, (), generator=generator))]
    if mode == "ends":
        return sorted({0, num_frames // 2, num_frames - 1})
    return list(range(0, num_frames, 2 if mode == "alternate" else 1))
