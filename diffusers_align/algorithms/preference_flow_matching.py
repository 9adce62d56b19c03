r"""PFM: preference flow matching (https://arxiv.org/abs/2405.19806).

The generator is never touched, and may be an API: a second, small model learns a flow that carries less preferred outputs $y_0$ to more
preferred ones $y_1$ of the same prompt c, and is applied to whatever the generator makes. Straight lines between the two are the
training set of a vector field, whose ODE moves the distribution of losers to that of winners; applied to fresh samples, and
again to its own results, it raises the preference at each pass:

$$ L = \mathbb E_{t \sim U[0,1],\,(y_0, y_1, c)} \tfrac1D \big\| v_\theta(y_t, t, c) - (y_1 - y_0) \big\|^2, \qquad
y_t = (1 - t)\, y_0 + t\, y_1 + \sigma \epsilon, \qquad \frac{dy}{dt} = v_\theta(y, t, c) $$

Against the official code (jadehaus/preference-flow-matching, bfc47b8): it pairs each mini-batch anew by exact optimal transport, across
prompts, so that sources flow to winners of other prompts (half of them, for two overlapping prompts). Here the data's own pairs are
the default, and the two other couplings stay within a prompt. Its adaptive solver (dopri5) gives way to fixed steps. $\sigma$ is
0.1 there; `sigma` is 0 here, which keeps both ends of the line the data themselves, and is in units of y.

Two limits: training starts from losers, use from fresh samples, which are better than that on average, so passes overshoot; and each
further pass starts further from the data. One or two passes (two on the paper's images), or `strength` below 1, are the safe choice.

Logged: `loss` and `eval_loss`, the matching error on training and held-out pairs (it does not fall to 0: what remains is the spread of
winners that share a $y_t$); after training, on outputs of held-out prompts, the reward before and after and the win rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..rl.matching import matching_error

Field = Callable[[float, Tensor], Tensor]  # (t, y) -> dy/dt
COUPLINGS = ("paired", "independent", "ot")


def interpolate(y0: Tensor, y1: Tensor, t: Tensor, *, sigma: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """The point at times t (B,) in [0, 1] on the lines from y0 to y1 (B, *D), exactly y0 and y1 at their ends, plus `sigma` times `noise`."""
    t = t.to(y0).reshape(-1, *[1] * (y0.ndim - 1))
    point = (1 - t) * y0 + t * y1
    return point if noise is None else point + sigma * noise


def pfm_loss(velocity: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
    """The matching error of `velocity` (B, *D), the field at the interpolated points, per dimension: (B,)."""
    return matching_error(velocity, y1 - y0)


# --- which target each source goes to --------------------------------------------------------------------------------------


def couple(coupling: str, y0: Tensor, y1: Tensor, prompts: Sequence[Hashable] | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """For each source of y0 (N, *D), the row of its target in y1 (N, *D): (N,) integers, on the CPU.

    Args:
        coupling: `paired`, row by row, as in the data; `independent`, a random permutation of each prompt's targets; `ot`, drawn from
            the plan of `transport_plan` between each prompt's sources and targets.
        prompts: of the N pairs. Of all pairs to train on, not of a batch: where a prompt has one pair, all couplings are `paired`.

    Raises:
        ValueError: an unknown coupling; or no prompts, without which the other couplings would carry images to those of other prompts.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"Unknown coupling {coupling!r}; choose one of {', '.join(COUPLINGS)}.")
    index = torch.arange(len(y0))
    if coupling == "paired":
        return index
    if prompts is None or len(prompts) != len(y0):
        raise ValueError(
            f"The coupling {coupling!r} needs the prompt of each of the {len(y0)} pairs: across prompts it would learn to turn images into "
            "those of other prompts. Pass them, or use 'paired'."
        )
    members: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(i)
    for group in members.values():
        rows = torch.tensor(group)
        if coupling == "independent":
            chosen = torch.randperm(len(rows), generator=generator)
        else:
            chosen = torch.multinomial(transport_plan(y0[rows], y1[rows]), 1, generator=generator)[:, 0]
        index[rows] = rows[chosen]
    return index


def transport_plan(y0: Tensor, y1: Tensor, *, regularization: float = 0.05, iterations: int = 100) -> Tensor:
    """The entropic optimal transport of squared distances by Sinkhorn's iterations (https://arxiv.org/abs/1306.0895), (n, n), rows sum to 1.

    Args:
        y0, y1: (n, *D).
        regularization: of the entropy, in units of the mean squared distance; towards 0 the plan becomes the exact assignment.
    """
    a, b = y0.flatten(1).double().cpu(), y1.flatten(1).double().cpu()
    cost = torch.cdist(a, b).square()
    log_plan = -cost / (regularization * cost.mean()).clamp(min=torch.finfo(cost.dtype).tiny)
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
    return log_plan.exp()


# --- the flow --------------------------------------------------------------------------------------------------------------


def euler_step(field: Field, t: float, y: Tensor, dt: float) -> Tensor:
    """Order 1, one evaluation."""
    return y + dt * field(t, y)


def heun_step(field: Field, t: float, y: Tensor, dt: float) -> Tensor:
    """Order 2, two evaluations."""
    first = field(t, y)
    return y + dt / 2 * (first + field(t + dt, y + dt * first))


def rk4_step(field: Field, t: float, y: Tensor, dt: float) -> Tensor:
    """Order 4, four evaluations: the classical Runge-Kutta step."""
    k1 = field(t, y)
    k2 = field(t + dt / 2, y + dt / 2 * k1)
    k3 = field(t + dt / 2, y + dt / 2 * k2)
    k4 = field(t + dt, y + dt * k3)
    return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


SOLVERS = {"euler": euler_step, "heun": heun_step, "rk4": rk4_step}


def transport(
    field: Field,
    y: Tensor,
    *,
    num_steps: int = 10,
    solver: str = "heun",
    strength: float = 1.0,
    iterations: int = 1,
    reverse: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Carry y (B, *D) along the flow of `field(t, y)`: towards what is preferred, or back.

    Args:
        num_steps: solver steps of a pass, of equal length; 10 as in the official code.
        strength: where a pass ends, t in [0, 1]; 0 returns y itself.
        iterations: passes, each of which starts from t = 0 at the result of the one before (the paper's iterative PFM).
        reverse: from t = `strength` down to 0, which undoes a pass up to the solver's error.
        on_step: called after each solver step.

    Raises:
        ValueError: an unknown solver, a strength outside [0, 1], fewer than one step or pass.
    """
    if solver not in SOLVERS:
        raise ValueError(f"Unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}.")
    if not (0 <= strength <= 1 and math.isfinite(strength)):
        raise ValueError(f"strength says where on the way from 0 to 1 to stop, got {strength}. Use iterations to go further.")
    if num_steps < 1 or iterations < 1:
        raise ValueError(f"At least one solver step and one iteration are needed, got {num_steps} and {iterations}.")
    if strength == 0:
        return y
    start, dt = (strength, -strength / num_steps) if reverse else (0.0, strength / num_steps)
    for _ in range(iterations):
        for k in range(num_steps):
            y = SOLVERS[solver](field, start + k * dt, y, dt)
            on_step()
    return y
