r"""MixGRPO: SDE steps in a window that slides along the trajectory, ODE steps elsewhere (https://arxiv.org/abs/2507.21802).

Only the window's steps are stochastic, and only they are trained: fewer steps cost less, and a sample's reward has fewer
causes. The window starts where the noise is strongest, since structure comes first, and moves to finer steps as training goes on.

$$ L = \mathbb E\Big[\tfrac1{|W_n|}\sum_{t\in W_n}\max(-A\rho_t, -A\,\mathrm{clip}(\rho_t, 1-c, 1+c))\Big], \qquad W_n = [l_n, l_n + w) $$

The loss is Flow-GRPO's; this module says where the window lies at training iteration n. Written from the paper; the windows are those of the official
code (Tencent-Hunyuan/MixGRPO, e5cdd6a, for academic use only). Its faster variant, which takes the ODE steps behind the window with a
higher-order solver, is not here: a trajectory has one scheduler.

Logged: as for Flow-GRPO.
"""

from __future__ import annotations

import math
import random


def window_at(
    iteration: int,
    *,
    size: int,
    first: int,
    end: int,
    strategy: str = "progressive",
    interval: int = 25,
    stride: int = 1,
    decay: float = 0.1,
    threshold: int = 13,
    seed: int = 0,
) -> tuple[int, int]:
    """The window (start, stop) of a training iteration: the same for every group and process, and after a resume.

    Args:
        size: its number of steps; 4 in the paper.
        first, end: it lies within the solver steps first to end - 1; behind the last place it starts over at the first.
        strategy: "progressive" stays `interval` iterations at a place; "exp_decay" stays
            interval * exp(-decay * max(0, place - threshold)), rounded up; "random" draws a place for each iteration.
        interval, stride, decay, threshold: 25, 1, 0.1 and 13 of 25 steps in the paper.

    Raises:
        ValueError: the window has no room, or the strategy is unknown.
    """
    if not 0 < size <= end - first:
        raise ValueError(f"Solver steps {first} to {end - 1} have no room for a window of {size}.")
    places = list(range(first, end - size + 1, stride))
    if strategy == "random":
        start = random.Random(f"{seed}/{iteration}/window").choice(places)
    elif strategy in ("progressive", "exp_decay"):
        rate = decay if strategy == "exp_decay" else 0.0
        stays = [math.ceil(interval * math.exp(-rate * max(0, place - threshold))) for place in places]
        left = iteration % sum(stays)
        start = next(place for place, until in zip(places, _running_sums(stays)) if left < until)
    else:
        raise ValueError(f"Unknown strategy {strategy!r}; choose random, progressive or exp_decay.")
    return start, start + size


def _running_sums(values: list[int]) -> list[int]:
    return [sum(values[: i + 1]) for i in range(len(values))]
