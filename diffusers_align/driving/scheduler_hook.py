"""Runs a stock diffusers pipeline, unmodified, and hands each of its scheduler's steps to a callback.

A pipeline draws its next state in one place, `scheduler.step`. For the time of one call, the scheduler's class is replaced by
a run-time subclass with the same signatures, so that isinstance checks, deep copies and signature inspection see what they
know.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..schedulers.own_noise import first_time
from ..schedulers.scheduling_utils import Generator, SDESchedulerMixin, SDESchedulerOutput, as_state, fork, returned
from ..schedulers.sigma_space import implied_output
from . import prompt_form
from .calls import Calls, calls_of
from .denoiser_gates import gated
from .denoisers import denoisers
from .module_tree import ModuleTree, walks_spared
from .one_chain import check_whole_steps
from .parts import parts_follow
from .pipeline_state import checkpointing_switches, no_cast_weights_kept, restored_if_abandoned, seeded_globally
from .prompt_memory import PromptMemory
from .replacements import has_constant, signature_of
from .saved_apart import SavedApart

NO_OWN_STEP = (
    "The pipeline's own scheduler takes no step: copies of it do, each for a part of the sample (a frame, say), so that there is no one chain of states to "
    "learn on or to steer. Best-of-n needs none: BestOfNPipeline(pipe)."
)

OTHER_NUMBER = (
    "The pipeline made {} samples for {} prompts, so that rewards and log-probabilities would belong to others. Give it one prompt a call if it cannot take "
    "several; arguments of which each sample has its own go into per_sample. Where guidance doubles the rows of its steps, do without (guidance_scale=1); "
    "where its steps take the frames of a video as samples, best-of-n is left."
)


@dataclass
class Step:
    """One scheduler step of a running pipeline.

    Attributes:
        k: solver step of this scheduler, from 0.
        child: 0 for the pipeline's own scheduler, 1, 2, ... for others and for the copies it makes (a second modality).
        portion: how many schedules this scheduler has walked in the call before the present one.
        sample, model_output: (B, *D), as the pipeline passes them; the output that the clean sample implies, where it passes that one instead.
    """

    k: int
    child: int
    scheduler: Any
    timestep: Any
    sample: Tensor
    model_output: Tensor
    _stock_step: Callable = field(repr=False)
    _arguments: dict = field(repr=False)
    output: Any = None
    portion: int = 0
    _beside: dict = field(default_factory=dict, repr=False)  # what a solver hands on to its own corrections

    @property
    def time(self) -> float:
        """The timestep as a number: some pipelines pass one of each sample, all the same."""
        return float(first_time(self.timestep))

    @property
    def generator(self) -> Generator:
        """What the step draws with; None leaves it to the scheduler."""
        return self._arguments.get("generator")

    def like(self, x: Tensor) -> Tensor:
        """A copy of `x` (B, *D) to hand to the pipeline as its next state: in the dtype that the step gives it, on the state's device and, where the
        shapes are equal, in its memory layout. Kernels round by all of them, and a pipeline may write into what it gets."""
        x, state = x.clone(), returned(self.sample, self.model_output)
        return as_state(x, state) if x.shape == state.shape else x.to(state)

    def run(self, **overrides):
        """The scheduler's own step, with any of its arguments replaced; its output as a dataclass."""
        arguments = {**self._arguments, **overrides, "return_dict": True}
        if "model_output" in overrides:
            arguments.pop("pred_original_sample", None)  # which the output implies
        self.output = self._stock_step(self.scheduler, **arguments)
        return self.output

    def skip(self) -> None:
        """Leave the step uncomputed; the callback must return the next state."""
        if hasattr(self.scheduler, "skip_step"):
            self.scheduler.skip_step(self.timestep)
        else:
            found = self.run()
            self._beside = {name: value for name, value in found.items() if name not in ("prev_sample", "pred_original_sample")}
            self.output = None  # made of a denoiser call that was left out

    def result(self, prev_sample: Tensor | None):
        """What the pipeline gets: the step's own output, or `prev_sample` in its place, in the form that it asked for."""
        if self.output is None and prev_sample is None:
            self.run()
        prev_sample = None if prev_sample is None else returned(prev_sample, self.model_output)
        values = list(self.output.to_tuple()) if self.output is not None else [prev_sample, prev_sample]
        if prev_sample is not None:
            # The last step of a consistency sampler returns the clean sample twice, as the state and beside it, where pipelines take it from.
            values = [prev_sample if value is values[0] else value for value in values]
        if not self._arguments.get("return_dict", True):
            return tuple(values[: getattr(self.scheduler, "tuple_length", len(values))])
        if self.output is None:
            skipped = SDESchedulerOutput(prev_sample=prev_sample)
            for name, value in self._beside.items():
                skipped[name] = value
            return skipped
        for name, value in zip(list(self.output), values):
            self.output[name] = value
        return self.output


class _Session:
    """The schedulers of one run (the pipeline's own and its copies) and how far each has come."""

    def __init__(self, on_step: Callable[[Step], Tensor | None], timesteps: Tensor | None, begin_index: int | None, noise: Generator, of_call: Generator):
        self.on_step, self.timesteps, self.begin_index, self.noise, self.of_call = on_step, timesteps, begin_index, noise, of_call
        self.schedulers: list[Any] = []
        self.taken: list[int] = []
        self.begun: list[list[int]] = []
        self.streams: list[Generator] = []
        self.asks_first = False

    def adopt(self, scheduler) -> int:
        for index, known in enumerate(self.schedulers):
            if known is scheduler:
                return index
        self.schedulers.append(scheduler)
        self.taken.append(0)
        self.begun.append([0])
        self.streams.append(fork(self.streams[-1]) if self.streams else self.noise)
        return len(self.schedulers) - 1

    def begin(self, scheduler) -> None:
        """The scheduler gets a schedule. Some pipelines ask for it again before the first step."""
        child = self.adopt(scheduler)
        if self.taken[child] > self.begun[child][-1]:
            self.begun[child].append(self.taken[child])

    def generator(self, scheduler, handed_on: Generator) -> Generator:
        """What a step draws with. Some pipelines hand the call's generators on to it and some do not, and none of them knows `noise`."""
        if self.noise is not None:
            return self.streams[self.adopt(scheduler)]
        return self.of_call if handed_on is None and getattr(scheduler, "generator", None) is None else handed_on

    def step(self, scheduler, stock_step: Callable, arguments: dict):
        child, output, state = self.adopt(scheduler), arguments["model_output"], _first_of(arguments, "sample", "sample_hat")
        if child == 0 and isinstance(self.noise, list) and len(self.noise) != len(state):
            raise ValueError(OTHER_NUMBER.format(len(state), len(self.noise)))
        if (clean := arguments.get("pred_original_sample")) is not None:
            output = implied_output(scheduler, clean, arguments["sample"])
        time = _first_of(arguments, "timestep", "sigma_hat")
        step = Step(self.taken[child], child, scheduler, time, state, output, stock_step, arguments, portion=len(self.begun[child]) - 1)
        result = step.result(self.on_step(step))
        self.taken[child] += 1
        return result


def _first_of(arguments: dict[str, Any], *names: str) -> Any:
    """The argument of a step by the first of the names that it has: solvers that raise the noise first call what they step from otherwise."""
    return next(arguments[name] for name in names if name in arguments)


def _hooked_class(cls: type, session: _Session) -> type:
    # A class refers to itself, and so is freed late, by the garbage collector: it must not hold the call's states and graphs till then.
    session = weakref.proxy(session)
    step_signature, set_signature = signature_of(cls.step), signature_of(cls.set_timesteps)

    def step(self, *args, **kwargs):
        arguments = dict(step_signature.bind(self, *args, **kwargs).arguments)
        arguments.pop("self")
        if session.asks_first and arguments.get("pred_original_sample") is None:
            return getattr(cls, "ask", cls.step)(self, **arguments)
        if "generator" in step_signature.parameters and arguments.get("variance_noise") is None:  # a step takes one of the two
            arguments["generator"] = session.generator(self, arguments.get("generator"))
        return session.step(self, cls.step, arguments)

    def set_timesteps(self, *args, **kwargs):
        cls.set_timesteps(self, *args, **kwargs)
        session.begin(self)
        if session.timesteps is not None:
            # In the schedule's own dtype: some pipelines index their noise table with it.
            if hasattr(self, "stand_in") and session.begin_index is None:
                self.stand_in(session.timesteps)
            else:
                self.timesteps = session.timesteps.to(self.timesteps)
        if session.begin_index is not None and hasattr(self, "set_begin_index"):
            self.set_begin_index(session.begin_index)

    def __deepcopy__(self, memo):
        if hasattr(cls, "__deepcopy__"):
            child = cls.__deepcopy__(self, memo)
        else:
            child = object.__new__(type(self))
            child.__dict__.update(copy.deepcopy(self.__dict__, memo))
        session.adopt(child)
        return child

    step.__signature__, set_timesteps.__signature__ = step_signature, set_signature
    own = {"step": step, "set_timesteps": set_timesteps, "__deepcopy__": __deepcopy__, "__module__": cls.__module__, "hooked": cls}
    return type(cls.__name__, (cls,), own)


def _hands_on(calls: Calls, name: str) -> bool:
    """Whether a call gives something an argument of this name: it is a constant of its code then, or in a tuple of them."""
    return any(has_constant(function.__code__, name) for function in calls.functions)


def _asks_first(calls: Calls) -> bool:
    """Whether the pipeline guides clean samples: a step tells them, is taken back, and the one that counts gets others as `pred_original_sample`."""
    return _hands_on(calls, "pred_original_sample")


def check_draws(calls: Calls) -> None:
    """Raise a ValueError if the pipeline hands the scheduler the noise of each step (`variance_noise`), which an inversion of a picture has found."""
    if _hands_on(calls, "variance_noise"):
        raise ValueError(
            f"{calls.name} hands each step the noise that it found for a picture, so that nothing is drawn: no step has a density to learn on or to steer by. "
            "Use a pipeline that starts from the picture (image to image), or follow a reward's gradient: RewardGuidedPipeline(pipe)."
        )


@contextmanager
def _hooked(schedulers: Iterable, session: _Session) -> Iterator[None]:
    """Context: the schedulers and all copies of them hand their steps to the session."""
    own = [(scheduler, type(scheduler)) for scheduler in schedulers]
    for scheduler, cls in own:
        scheduler.__class__ = _hooked_class(cls, session)
    try:
        yield
    finally:
        for known in (*session.schedulers, *(scheduler for scheduler, _ in own)):
            known.__class__ = getattr(type(known), "hooked", type(known))


@contextmanager
def _explained(pipeline) -> Iterator[None]:
    """Context: what the scheduler lacks is said in words, and what has no gradient on a device."""
    try:
        yield
    except NotImplementedError as error:
        if not torch.is_grad_enabled() or "backward" not in str(error):
            raise
        raise ValueError(
            f"{type(pipeline).__name__} has a layer without a gradient on this device ({error}): move the pipeline to a GPU, or use what needs no gradients, "
            "under torch.no_grad()."
        ) from error
    except AttributeError as error:
        name = type(pipeline.scheduler).__name__
        if lacks := re.fullmatch(rf"'({name}|FrozenDict)' object has no attribute '(\w+)'", str(error)):
            why = "this pipeline works with a scheduler of its own only, and that one is no policy"
            if lacks[2] == "sigmas" and isinstance(pipeline.scheduler, SDESchedulerMixin):
                why = "give it its own scheduler back, of which Policy makes a twin that has them, or sde_twin(scheduler, by_sigmas=True)"
            raise ValueError(f"{type(pipeline).__name__} reads {lacks[2]!r} of its scheduler, which {name} does not have: {why}.") from error
        raise


def drive(
    pipeline,
    on_step: Callable[[Step], Tensor | None],
    call: dict,
    *,
    gradients: bool = False,
    timesteps: Tensor | None = None,
    begin_index: int | None = None,
    needs_denoiser: Callable[[int], bool] | None = None,
    memory: PromptMemory | None = None,
    noise: Generator = None,
    global_seed: int | None = None,
):
    """Call `pipeline(**call)` and hand each scheduler step to `on_step`; return the pipeline's output.

    Args:
        on_step: gets a `Step`. What it returns (B, *D) becomes the next state; None lets the scheduler's own step stand.
        gradients: run the undecorated `__call__` with autograd on (diffusers wraps it in `torch.no_grad`).
        timesteps: stand in for the scheduler's own after `set_timesteps`; rows of (N, B) give each sample its own time.
        begin_index: the solver's position at the first of them, where they repeat and it could not tell.
        needs_denoiser: of solver step k, whether its denoiser calls must be real. None: all are, as they are where the pipeline differentiates them.
        memory: remembers encoded prompts across calls.
        noise: what the steps draw with, whatever the pipeline hands on to them; a list has one generator a sample, and copies of the
            scheduler get streams of their own. None: what the pipeline hands on, or else the call's own `generator`.
        global_seed: of what the pipeline draws from torch's global generators, which are as before afterwards; None leaves them alone.

    Everything is restored when it returns or raises, and the pipeline gets copies of the call's lists, dicts and tensors.

    Raises:
        ValueError: a pipeline without a scheduler, or whose steps are no chain of states; gradients through an offloaded component or a
            denoiser's cache, a pipeline that reads what the scheduler does not have, or several prompts for one that takes one.
    """
    tree = ModuleTree.of(pipeline)
    if gradients:
        tree.refuse_offloading()
    calls, session = calls_of(pipeline), _Session(on_step, timesteps, begin_index, noise, call.get("generator"))
    check_whole_steps(calls)
    session.asks_first = _asks_first(calls)
    session.adopt(calls.main_scheduler)
    gates = needs_denoiser is not None and not calls.takes_gradients
    if gradients and not gates:
        tree.refuse_caches(pipeline)

    def opens() -> bool:
        wanted = needs_denoiser(session.taken[0])
        if wanted and gradients:
            tree.refuse_caches(pipeline)
        return wanted

    with ExitStack() as stack:
        stack.enter_context(restored_if_abandoned(pipeline, tree))
        stack.enter_context(walks_spared(pipeline, tree))
        stack.enter_context(seeded_globally(global_seed, pipeline.device))
        stack.enter_context(_hooked(calls.schedulers.values(), session))
        stack.enter_context(parts_follow(pipeline))
        stack.enter_context(no_cast_weights_kept())
        stack.enter_context(checkpointing_switches(pipeline))
        for module in denoisers(pipeline).values() if gates else ():
            stack.enter_context(gated(module, opens))
        if memory is not None:
            stack.enter_context(memory.installed(pipeline))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if gradients:
            session.on_step = stack.enter_context(SavedApart().around(pipeline))(on_step)
        stack.enter_context(_explained(pipeline))
        return prompt_form.run(calls, call, begun=lambda: session.taken[0] > 0)
