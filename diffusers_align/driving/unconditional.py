"""The rows of a denoiser's calls that guidance pushes away from: classifier-free guidance's without the prompt.

They are found by what the pipeline makes of them. The derivative of a step's mean by a row of the denoiser's output is negative, relative to that by all
rows together, where the guided output counts the row negatively: u + s (c - u) counts c by s and u by 1 - s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..condition import Condition
from ..trajectory import Trajectory
from ..transition import GaussianTransition
from .call_rows import Call, Index, flat_output, put_together
from .replacements import replaced
from .tape import forced_pass, kind_of_call

if TYPE_CHECKING:
    from .driver import Driver

Place = tuple[int, int]  # solver step, number of the call in it
NO_ROWS = (
    "{} has no rows without the prompt that could go without a gradient: {}. "
    "Leave out --no-unconditional_gradient; in Python, Forwards(unconditional_gradient=False)."
)
# Of a driver, by kind of call and number of samples, what was found at each solver step.
_KNOWN: WeakKeyDictionary[Driver, dict[tuple, dict[int, dict[Place, Index]]]] = WeakKeyDictionary()


def held_rows(driver: Driver, trajectory: Trajectory, wanted: list[int], condition: Condition) -> dict[Place, Index]:
    """The rows that the guided output counts negatively, of each denoiser call of the solver steps `wanted`. Found once for each kind of call, by one
    replay without a graph of the denoiser.

    Raises:
        ValueError: there are none at any of the steps, guidance is no sum of rows, or the denoiser's rows cannot be asked by themselves.
    """
    known = _KNOWN.setdefault(driver, {}).setdefault((kind_of_call(trajectory), len(condition)), {})
    if new := [k for k in wanted if k not in known]:
        _look(driver, trajectory, new, condition, known)
    found = {place: rows for k in wanted for place, rows in known[k].items()}
    if not found:
        raise ValueError(NO_ROWS.format(driver.calls.name, "these calls are not guided, or by a scale of at most 1"))
    return found


def ask_apart(forward: Callable, call: Call, held: Index) -> Any:
    """What `forward` makes of a call, without a graph for the rows `held`."""
    if not held:
        return call.ask(forward)
    free = [row for row in range(call.rows) if row not in set(held)]
    parts = [(free, call.take(free).ask(forward))] if free else []
    with torch.no_grad():
        parts.append((held, call.take(held).ask(forward)))
    return put_together(parts, call.rows)


def _look(driver: Driver, trajectory: Trajectory, wanted: list[int], condition: Condition, known: dict[int, dict[Place, Index]]) -> None:
    seen: list[tuple[Callable, Call, Any, Tensor]] = []
    at = [0]

    def needs_denoiser(k: int) -> bool:
        if k != at[0]:
            at[0] = k
            seen.clear()
        return k in wanted

    def call(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        own = Call(args, kwargs)
        with torch.no_grad():
            output = own.ask(forward)
        if at[0] not in wanted:
            return output
        leaves, form = flat_output(output, own.rows)
        own_rows = next((i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim and len(x) == own.rows), None)
        if own_rows is None:
            raise ValueError(NO_ROWS.format(driver.calls.name, "its denoiser returns no tensor of rows"))
        end = leaves[own_rows].detach().requires_grad_()
        seen.append((forward, own, output, end))
        leaves[own_rows] = end.clone()
        return pytree.tree_unflatten(leaves, form)

    def stepped(k: int, kernel: GaussianTransition) -> None:
        gradients = torch.autograd.grad(kernel.mean.sum(), [end for *_, end in seen], retain_graph=True, materialize_grads=True)
        known[k] = {}
        for number, (gradient, (forward, own, output, _)) in enumerate(zip(gradients, seen)):
            if rows := _negative(driver.calls.name, gradient, sum(float(x.sum()) for x in gradients)):
                _check_apart(driver.calls.name, forward, own, output, rows)
                known[k][k, number] = rows

    with ExitStack() as stack, torch.enable_grad():
        for module in driver.denoisers.values():
            stack.enter_context(replaced(module, "forward", call))
        forced_pass(driver, trajectory, stepped, wanted, condition, needs_denoiser)


def _negative(name: str, gradient: Tensor, total: float) -> Index:
    """The rows that count negatively everywhere."""
    each = gradient.flatten(1).float() * (1.0 if total > 0 else -1.0)
    least, most = each.amin(1), each.amax(1)
    small = 1e-3 * float(each.abs().max())
    if bool(((least < -small) & (most > small)).any()):
        raise ValueError(NO_ROWS.format(name, "its guidance is no weighted sum of them (it is rescaled, or cut off, by what it makes)"))
    return (least < -small).nonzero().flatten().tolist()


@torch.no_grad()
def _check_apart(name: str, forward: Callable, call: Call, output: Any, held: Index) -> None:
    try:
        apart = ask_apart(forward, call, held)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(NO_ROWS.format(name, f"its denoiser refuses a part of them ({type(error).__name__}: {str(error).splitlines()[:1]})")) from error
    for a, b in zip(flat_output(apart, call.rows)[0], flat_output(output, call.rows)[0]):
        if isinstance(b, Tensor) and error_of(a, b) > 0:
            raise ValueError(NO_ROWS.format(name, "its denoiser takes them for others without those with the prompt"))


def error_of(actual: Any, expected: Tensor) -> float:
    """How far `actual` is from `expected` beyond rounding for another number of rows, relative to its norm; 0 if no further."""
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return float("inf")
    error = float((actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))
    return error if not error <= (1e-4 if expected.dtype == torch.float32 else 2e-2) else 0.0
