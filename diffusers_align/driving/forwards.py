"""How a replay evaluates the denoiser: several solver steps in one forward, the unconditional rows of guidance without a gradient.

A first walk of the pipeline, without its denoiser, collects what the denoiser would be asked at each step: the states are known from the record. In a
second one, the first step of a group evaluates the calls of the whole group as one, and each step gets its rows. A step's `backward` ends at these rows;
behind the group's last step the sum goes on through the denoiser, once. So the pipeline's loop, its guidance and the callback are those of any replay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ..condition import Condition
from ..trajectory import Trajectory
from ..transition import GaussianTransition
from .call_rows import Call, Index, flat_output, joined, parted
from .denoiser_gates import is_looked_into
from .replacements import replaced
from .scheduler_hook import Step
from .steps_apart import GraphOfSteps, SharedGraph
from .tape import forced_pass, kind_of_call
from .unconditional import ask_apart, error_of, held_rows

if TYPE_CHECKING:
    from .driver import Driver

OnStep = Callable[[int, GaussianTransition], None]
Asked = dict[int, list[tuple[nn.Module, Call]]]

ONE_STEP = "{} cannot be replayed with several solver steps in one forward: {}. Leave them one by one (steps=1; in scripts, no --replay_steps_per_forward)."
CARRIED = (
    "{}'s steps hang together by what it carries from one to the next (the momentum of its guidance, say), so that a replay walks them apart: leave out "
    "--replay_steps_per_forward and --no-unconditional_gradient."
)
# Of a driver, the kinds of call whose joint forward was compared with single ones.
_COMPARED: WeakKeyDictionary[Driver, set[tuple]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Forwards:
    """How `Policy.replay` evaluates the denoiser.

    Attributes:
        steps: solver steps, as they follow each other among those replayed, in one forward. Kernels and gradients are the same up to rounding; activations
            take so many times the memory. `on_step` calls `backward`, which then adds to the parameters' gradient behind the last step of a forward only.
        unconditional_gradient: without it, the rows that count negatively in the guided output (classifier-free guidance's without the prompt) have no
            graph. Their forward costs no backward; the gradient is biased.
    """

    steps: int = 1
    unconditional_gradient: bool = True

    def force(self, driver: Driver, trajectory: Trajectory, on_step: OnStep, wanted: Collection[int], condition: Condition) -> None:
        """One pass of the pipeline with the recorded actions forced, as `tape.force`.

        Raises:
            ValueError: what `tape.force` raises; the pipeline's denoiser cannot be asked for several steps at once, or its guidance has no rows of its own.
        """
        order, name = sorted(wanted), driver.calls.name
        if driver.calls.takes_gradients:
            raise ValueError(ONE_STEP.format(name, "it differentiates through its denoiser in each call, to move its latents"))
        held = {} if self.unconditional_gradient or not torch.is_grad_enabled() else held_rows(driver, trajectory, order, condition)
        asked = _asked(driver, trajectory, order, condition) if self.steps > 1 else {}
        groups = [order[i : i + self.steps] for i in range(0, len(order), self.steps)]
        kind, compared = (kind_of_call(trajectory), self.steps), _COMPARED.setdefault(driver, set())
        walk = _Walk(name, asked, groups, held, on_step, compare=self.steps > 1 and kind not in compared)
        with ExitStack() as stack:
            for module in driver.denoisers.values():
                stack.enter_context(replaced(module, "forward", partial(walk.call, module)))
            try:
                forced_pass(driver, trajectory, walk.stepped, wanted, condition, walk.needs_denoiser)
            except SharedGraph:
                raise ValueError(CARRIED.format(name)) from None
        compared.add(kind)


@torch.no_grad()
def _asked(driver: Driver, trajectory: Trajectory, wanted: list[int], condition: Condition) -> Asked:
    """What the denoisers are asked at each of the steps, in a walk in which they do not run."""
    found: Asked = {k: [] for k in wanted}
    at = [0]

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if at[0] in found:
            found[at[0]].append((module, Call(args, kwargs)))

    def follow(step: Step) -> Tensor:
        tape = trajectory if step.child == 0 else trajectory.children[step.child - 1]
        at[0] += step.child == 0
        step.skip()
        return step.like(tape.actions[:, step.k])

    with ExitStack() as stack:
        for module in driver.denoisers.values():
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        driver.drive(condition, follow, needs_denoiser=lambda k: False)
    return found


class _Walk:
    """A pass that evaluates each group's calls as one.

    Args:
        asked: the calls of each step, where groups have several.
        held: of (step, number of the call) its rows without a gradient.
        compare: hold the first joint forward to single ones.
    """

    def __init__(self, name: str, asked: Asked, groups: list[list[int]], held: dict[tuple[int, int], Index], on_step: OnStep, compare: bool):
        self.name, self.asked, self.held, self.on_step, self.compare = name, asked, held, on_step, compare
        self.group_of = {k: group for group in groups for k in group}
        self._step = self._number = 0
        self._ready: dict[tuple[int, int], Any] = {}
        self._open: list[tuple[Tensor, Tensor]] = []
        self._graphs, self._first_hook = GraphOfSteps(), RemovableHandle.next_id

    def needs_denoiser(self, step: int) -> bool:
        """For the driver: real calls at the steps replayed."""
        if step != self._step:
            self._step, self._number = step, 0
        return step in self.group_of

    def call(self, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """In the place of a denoiser's `forward`."""
        if self._step not in self.group_of:
            return forward(*args, **kwargs)
        own, place = Call(args, kwargs), (self._step, self._number)
        self._number += 1
        if not self.asked:
            return self._with_ends([self._evaluated(forward, own, [place])])[0]
        if place not in self._ready:
            self._evaluate(module, forward, own, place)
        _, expected = self.asked[place[0]][place[1]]
        if not own.is_same(expected):
            raise ValueError(ONE_STEP.format(self.name, "what it asks the denoiser depends on the denoiser's own answers"))
        return self._ready.pop(place)

    def stepped(self, k: int, kernel: GaussianTransition) -> None:
        """An `on_step` that goes on through the denoiser behind a group's last step."""
        if torch.is_grad_enabled():
            self._graphs.look(kernel.mean)
        self.on_step(k, kernel)
        if k == self.group_of[k][-1]:
            ends = [(output, end.grad) for output, end in self._open if end.grad is not None]
            self._open.clear()
            if ends:
                torch.autograd.backward(*map(list, zip(*ends)))

    def _evaluate(self, module: nn.Module, forward: Callable, own: Call, place: tuple[int, int]) -> None:
        """The call with those of its number at the later steps of its group, where they are of the same module and form."""
        step, number = place
        group = [k for k in self.group_of[step] if k >= step and len(self.asked[k]) > number]
        like = [k for k in group if self.asked[k][number][0] is module and self.asked[k][number][1].is_like(own)]
        calls = [self.asked[k][number][1] for k in like]
        if not calls or like[0] != step or is_looked_into(module, self._first_hook):
            raise ValueError(ONE_STEP.format(self.name, "it looks into the denoiser, or asks it otherwise than it would without its answers"))
        try:
            joint = joined(calls)
        except ValueError as error:
            raise ValueError(ONE_STEP.format(self.name, str(error))) from None
        if self.compare and len(calls) > 1:
            self._hold_to_single(forward, joint, calls)
        output = self._evaluated(forward, joint, [(k, number) for k in like])
        for k, part in zip(like, self._with_ends(parted(output, own.rows, len(calls)))):
            self._ready[k, number] = part

    def _evaluated(self, forward: Callable, call: Call, places: list[tuple[int, int]]) -> Any:
        rows = call.rows // len(places)
        held = [i * rows + row for i, place in enumerate(places) for row in self.held.get(place, [])]
        return ask_apart(forward, call, held)

    def _with_ends(self, outputs: list[Any]) -> list[Any]:
        """The outputs as ends of the steps' graphs."""

        def end(x: Tensor) -> Tensor:
            if not x.requires_grad:
                return x
            self._open.append((x, x.detach().requires_grad_()))
            return self._open[-1][1].clone()  # which a pipeline may write into

        return pytree.tree_map_only(Tensor, end, outputs)

    @torch.no_grad()
    def _hold_to_single(self, forward: Callable, joint: Call, calls: list[Call]) -> None:
        """Raise a ValueError if the rows of one call know of the others'."""
        self.compare = False
        try:
            together = parted(joint.ask(forward), calls[0].rows, len(calls))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(ONE_STEP.format(self.name, f"its denoiser refuses it ({type(error).__name__}: {str(error).splitlines()[:1]})")) from error
        for part, call in zip(together, calls):
            alone, rows = call.ask(forward), calls[0].rows
            if any(error_of(a, b) > 0 for a, b in zip(flat_output(part, rows)[0], flat_output(alone, rows)[0]) if isinstance(b, Tensor)):
                raise ValueError(ONE_STEP.format(self.name, "its denoiser takes the rows of the steps for one another's"))
