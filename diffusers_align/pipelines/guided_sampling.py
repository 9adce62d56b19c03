"""Guidance at the scheduler steps of any stock pipeline, on its own solver: `algorithms.guidance` coupled to the driver.

A step is guided before the solver takes it: the model's output is replaced by one whose clean estimate has moved. Gradients with respect
to x_t need the graph of the denoiser's call, which the driver keeps: each state is handed out as a leaf that requires a gradient and
cut behind the step, so memory is one denoiser call's. Rewards are differentiated at the clean estimate first, in micro-batches, and
then pulled back through the denoiser by one vector-Jacobian product.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.guidance import Guidance, Level, clean_estimate, guide, output_change, renoised, step_weights
from ..driving.calls import calls_of
from ..driving.denoisers import denoisers
from ..driving.initial_noise import prepared_latents
from ..driving.prompt_memory import PromptMemory
from ..driving.replacements import reads_levels_by_number
from ..driving.scheduler_hook import NO_OWN_STEP, Step, drive
from ..gradients.check import scaled_gradients
from .draws import copied
from .noise_grid import NoiseGrid, check_scale, noise_grid
from .recurrence import put_back, raised_in, reads_state, restarted, run_time_state, whole_steps

# A state without signal says nothing of its clean sample: h_t is constant there, and the conversions divide by alpha.
NO_SIGNAL = 1e-3

_BY_NUMBER = "{} looks {} up by the number of its step{}, so that no step can be repeated: set recurrence=1, or use a preset without it."

Objective = Callable[[Tensor, list[int], Level], Tensor]


class GuidanceError(ValueError):
    """Guidance cannot go on; the message says at which step, why, and what to do."""


@dataclass
class GuidedSample:
    """The pipeline's output, its final latents (B, *D), and s before each guided step, (B, guided steps)."""

    output: Any
    final: Tensor
    values: Tensor | None


def guided_sample(
    pipeline,
    call: dict[str, Any],
    objective: Objective,
    guidance: Guidance,
    *,
    scale: float,
    seeds: Callable[[int], list[int]],
    micro_batch_size: int | None = None,
    gradient_checkpointing: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    memory: PromptMemory | None = None,
) -> GuidedSample:
    """`pipeline(**call)`, guided. A scale of 0 is the plain call, bit for bit.

    Args:
        objective: s (b,) with its graph of clean latents (b, *D) in the pipeline's layout, for the given rows of the batch; of the state in
            the model's coordinates for a noise-aware reward, which also gets the level.
        seeds: of a batch size its seeds, for the noise of smoothing and recurrence.
        micro_batch_size: rows differentiated at once; all by default.
        gradient_checkpointing: compute the denoiser's activations again on the way back, block by block.
        on_progress: gets the solver steps done and their total.

    Raises:
        GuidanceError: a reward without gradient, a pipeline that cuts the graph or takes gradients itself, latents that overflow, or a solver that cannot
            repeat steps.
        ValueError: a solver without conversion.
    """
    walk = _Walk(objective, guidance, scale, seeds, micro_batch_size, on_progress)
    through_denoiser = bool(guidance.variance) and scale != 0
    repeats = guidance.recurrence > 1 and scale != 0
    if scale != 0 and calls_of(pipeline).takes_gradients:
        raise GuidanceError(
            f"{type(pipeline).__name__} differentiates through its denoiser itself and goes on from states without a graph, or from its first one: what a "
            "reward's gradient did to them would be lost. Steer particles or choose the best of n."
        )
    if repeats and reads_levels_by_number(calls_of(pipeline).functions):
        raise GuidanceError(_BY_NUMBER.format(type(pipeline).__name__, "its noise level", ""))
    with ExitStack() as stack:
        stack.enter_context(_frozen(pipeline, gradient_checkpointing))
        timesteps = walk.repeat(pipeline, call, memory) if repeats else None
        if through_denoiser:
            stack.enter_context(_differentiable_start(pipeline))
        begin = {} if timesteps is None else {"timesteps": timesteps, "begin_index": 0}
        try:
            output = drive(pipeline, walk.on_step, call, gradients=through_denoiser, memory=memory, **begin)
        except IndexError as error:
            if timesteps is None or raised_in(error) is not inspect.unwrap(type(pipeline).__call__).__code__:
                raise
            raise GuidanceError(_BY_NUMBER.format(type(pipeline).__name__, "something", f" ({error})")) from error
    if walk.final is None:
        raise GuidanceError(NO_OWN_STEP)
    if walk.values and not walk.moved:
        half = " Half precision rounds small ones to 0, too: try float32." if walk.half else ""
        raise GuidanceError(f"The reward's gradient was exactly 0 at every guided step: it rounds, saturates, or does not look at the images.{half}")
    return GuidedSample(output, walk.final, torch.stack(walk.values, 1) if walk.values else None)


class _Walk:
    """Where the solver stands, and what it does there."""

    def __init__(self, objective: Objective, guidance: Guidance, scale: float, seeds, micro_batch_size: int | None, on_progress):
        self.objective, self.guidance, self.scale = objective, guidance, scale
        self.seeds, self.micro_batch_size, self.on_progress = seeds, micro_batch_size, on_progress
        self.grid: NoiseGrid | None = None
        self.order: list[int] = []
        self.starts: set[int] = set()
        self.times: Tensor | None = None
        self.solver: dict[str, Any] | None = None
        self.generators: list[torch.Generator] | None = None
        self.values: list[Tensor] = []
        self.moved, self.half = False, False
        self.final: Tensor | None = None
        self.leaf: Tensor | None = None

    # --- schedule --------------------------------------------------------------------------------------------------

    def _begin(self, step: Step) -> None:
        if self.grid is None:
            self.grid = noise_grid(step.scheduler, step.timestep)
        number = len(self.grid)
        window = range(round(self.guidance.start * number), round(self.guidance.stop * number))
        self.guided = [k for k in window if self.grid.levels[k].alpha > NO_SIGNAL]
        if not self.guided:
            raise GuidanceError(
                f"No step is guided: of {number}, those from {self.guidance.start:g} to {self.guidance.stop:g} of the way are none, or start from pure "
                "noise. Take more steps, or widen the window (start, stop)."
            )
        weights = partial(step_weights, self.grid.levels, guided=self.guided)
        self.weights = {
            "variance": [1.0] * number if self.guidance.variance_entry == "output" else weights(self.guidance.variance_schedule),
            "mean": weights(self.guidance.mean_schedule),
        }

    def _is_guided(self, k: int) -> bool:
        return k in self.guided

    def repeat(self, pipeline, call: dict[str, Any], memory: PromptMemory | None) -> Tensor:
        """The timesteps with those of guided steps repeated, found by a call that ends at its first step."""
        step = first_step(pipeline, call, memory)
        self._begin(step)
        units = whole_steps(self.grid.levels)
        self.starts = {unit[0] for unit in units if self._is_guided(unit[0])}
        self.order = [k for unit in units for _ in range(self.guidance.recurrence if unit[0] in self.starts else 1) for k in unit]
        self.times = step.scheduler.timesteps
        return self.times[[self.grid.first + k for k in self.order]]

    # --- steps -----------------------------------------------------------------------------------------------------

    def on_step(self, step: Step) -> Tensor | None:
        if step.child != 0 and self.times is not None:
            raise GuidanceError("The pipeline walks a second scheduler beside the guided one, which would not repeat steps with it; set recurrence=1.")
        if step.child != 0 or self.scale == 0:
            drawn = step.run().prev_sample
            if step.child == 0:
                self.final = drawn
                self.on_progress(step.k + 1, len(step.scheduler.timesteps))
            return None
        if step.k == 0:
            self._begin(step)
        k, after = self._position(step)
        state, output = step.sample.detach(), step.model_output.detach()
        self.half = torch.float16 in (state.dtype, output.dtype)
        self._remember(step, k, state, output)
        self.final = self._guided_step(step, k, state, output) if self._is_guided(k) else step.run(sample=state, model_output=output).prev_sample
        if after <= k:
            back = renoised(self.final.float() / self.grid.scales[k + 1], self.grid.levels[after], self.grid.levels[k + 1], self._draw(state))
            self.final = (back * self.grid.scales[after]).to(state.dtype)
            put_back(step.scheduler, restarted(self.fresh, self.solver))
        self.on_progress(step.k + 1, len(self.order or self.grid.scales[1:]))
        needs_graph = torch.is_grad_enabled() and after < len(self.grid) and self._is_guided(after)
        self.leaf = self.final.detach().requires_grad_(needs_graph)
        return self.leaf.clone() if needs_graph else self.leaf  # a pipeline may write into what it gets, but not into a leaf

    def _position(self, step: Step) -> tuple[int, int]:
        """The solver step of this place of the walk, and that of the next."""
        if self.times is None:
            return step.k, step.k + 1
        if step.k >= len(self.order) or step.time != float(self.times[self.grid.first + self.order[step.k]]):
            raise GuidanceError(f"The pipeline shortens its schedule (strength below 1), so steps cannot be repeated at step {step.k}; set recurrence=1.")
        if step.k == 0:
            # The pipeline has its list; the solver reads its own place off the schedule without repeats.
            step.scheduler.timesteps = self.times.clone()
            self.fresh = run_time_state(step.scheduler)
        return self.order[step.k], (self.order[step.k + 1] if step.k + 1 < len(self.order) else len(self.grid))

    def _remember(self, step: Step, k: int, state: Tensor, output: Tensor) -> None:
        """Keep the solver's state at the beginning of what is going to be repeated."""
        if k not in self.starts or self.order.index(k) != step.k:
            return
        self.solver = run_time_state(step.scheduler)
        alpha, sigma = self.grid.levels[k]
        slope = {"sample": 0.0, "v_prediction": alpha / sigma}.get(self.grid.prediction, 1 / sigma) * self.grid.sign / self.grid.scales[k]
        if self.grid.levels[k + 1].sigma > 0 and not reads_state(step, state, output, slope):
            raise GuidanceError(
                f"{type(step.scheduler).__name__} takes solver step {k} from an earlier state than the one it is given, so the step cannot be repeated: "
                "set recurrence=1, or give the pipeline a DDIM, Euler, Heun, DPM-Solver++ multistep or FlowMatchEuler scheduler."
            )

    def _guided_step(self, step: Step, k: int, state: Tensor, output: Tensor) -> Tensor:
        grid = self.grid
        if output.shape[1:] == state.shape[1:] and len(output) != len(state):
            raise GuidanceError(
                f"The pipeline's model answers for {len(output)} samples where its state is of {len(state)}: it takes one prompt a call, so give it one by one."
            )
        if output.shape != state.shape:
            raise GuidanceError(f"The model's output {tuple(output.shape)} is not shaped like the state {tuple(state.shape)}: it predicts a variance too.")
        check_scale(grid, k, step.scheduler, step.timestep)
        level = grid.levels[k]

        def clean(x: Tensor, model_output: Tensor) -> Tensor:
            return clean_estimate(grid.sign * model_output.float(), x.float() / grid.scales[k], level, grid.prediction)

        shift = guide(
            self.guidance, lambda x: self._evaluate(x, level), state.float() / grid.scales[k], clean(state, output), tuple(grid.levels[k : k + 2]),
            scale=self.scale, weights=(self.weights["variance"][k], self.weights["mean"][k]), pull_back=lambda g: self._pull_back(step, k, clean, g),
            draw=lambda: self._draw(state),
        )  # fmt: skip
        self.values.append(shift.value.detach())
        self.moved = self.moved or bool(shift.clean.any() or shift.state.any())
        moved = output + grid.sign * output_change(shift.clean, level, grid.prediction).to(output.dtype)
        drawn = step.run(sample=state, model_output=moved)
        self._check_reading(step, drawn, self.grid.data * clean(state, moved))
        result = drawn.prev_sample + (grid.scales[k + 1] * shift.state).to(drawn.prev_sample.dtype)
        self._check_finite(result, k, state, output)
        return result

    def _pull_back(self, step: Step, k: int, clean: Callable[[Tensor, Tensor], Tensor], gradient: Tensor) -> Tensor:
        found = None
        if step.sample.requires_grad and step.model_output.requires_grad:
            state = step.sample if self.leaf is None else self.leaf
            with torch.enable_grad():
                (found,) = scaled_gradients((clean(step.sample, step.model_output) * gradient).sum(), [state], half=self.half)
        if found is None:
            where = "the state of its first step has no graph: begin later (start > 0)" if k == 0 else "the denoiser does not get the state with its graph"
            raise GuidanceError(f"The pipeline cuts the graph at solver step {k}: {where}, or use a preset without it (mpgd, flowchef).")
        return found.float() * self.grid.scales[k]

    def _evaluate(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """s (B,) and its gradient (B, *D), in micro-batches."""
        values, gradients = [], []
        for rows in torch.arange(len(x)).split(self.micro_batch_size or len(x)):
            part = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                value = self.objective(part * self.grid.data, rows.tolist(), level)
                (gradient,) = scaled_gradients(value.sum(), [part], half=self.half) if value.requires_grad else (None,)
            if gradient is None:
                raise GuidanceError(
                    "The reward has no gradient with respect to the latents: it, or the decoder, detaches them, runs under torch.no_grad, or goes "
                    "through NumPy or PIL. Steer with particles or best-of-n, which need none."
                )
            values.append(value.detach().float())
            gradients.append(gradient)
        return torch.cat(values), torch.cat(gradients)

    def _draw(self, like: Tensor) -> Tensor:
        if self.generators is None:
            self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds(len(like))]
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in self.generators]).to(like.device)

    # --- checks ----------------------------------------------------------------------------------------------------

    def _check_reading(self, step: Step, drawn, clean: Tensor) -> None:
        """Whether the solver reads the output as we do, where it says how."""
        read, config = getattr(drawn, "pred_original_sample", None), step.scheduler.config
        if len(self.values) > 1 or read is None or config.get("clip_sample") or config.get("thresholding"):
            return
        if not torch.allclose(read.float(), clean, rtol=1e-2, atol=1e-2 * float(clean.abs().max()) + 1e-6) and bool(clean.isfinite().all()):
            raise GuidanceError(f"{type(step.scheduler).__name__} reads another clean sample from the model's output than guidance does.")

    def _check_finite(self, result: Tensor, k: int, state: Tensor, output: Tensor) -> None:
        if bool(result.isfinite().all()):
            return
        if not bool(state.isfinite().all() and output.isfinite().all()):
            raise GuidanceError(f"The pipeline itself reached NaN or infinity at solver step {k}: run it in float32.")
        raise GuidanceError(
            f"Guidance made the latents NaN or infinite at solver step {k}: lower the strength (reward_scale is {self.scale:g}), begin later (start), bound "
            "the gradient (norm='rms' or 'unit'), or run in float32."
        )


class _FirstStep(Exception):
    """Carries the first step out of a call that need not go on."""


def _leave(step: Step):
    raise _FirstStep(step)


def first_step(pipeline, call: dict[str, Any], memory: PromptMemory | None) -> Step:
    """The first scheduler step of `pipeline(**call)`, which ends there and leaves generators as they are. Costs one denoiser call at most."""
    own = {**call, "generator": copied(call["generator"])} if "generator" in call else call
    with torch.random.fork_rng(), torch.no_grad():
        try:
            drive(pipeline, _leave, own, needs_denoiser=lambda k: False, memory=memory)
        except _FirstStep as found:
            return found.args[0]
    raise GuidanceError(f"{type(pipeline).__name__}'s call takes no scheduler step.")


@contextmanager
def _frozen(pipeline, gradient_checkpointing: bool) -> Iterator[None]:
    """No parameter requires a gradient; denoisers recompute their activations if asked to."""
    parameters = [p for m in pipeline.components.values() if isinstance(m, nn.Module) for p in m.parameters() if p.requires_grad]
    modules = [m for m in denoisers(pipeline).values() if getattr(m, "_supports_gradient_checkpointing", False) and not m.is_gradient_checkpointing]
    for parameter in parameters:
        parameter.requires_grad_(False)
    for module in modules if gradient_checkpointing else []:
        module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module in modules if gradient_checkpointing else []:
            module.disable_gradient_checkpointing()


def _differentiable_start(pipeline) -> AbstractContextManager[None]:
    """The initial latents require a gradient."""
    return prepared_latents(pipeline, lambda latents: latents.detach().requires_grad_().clone())
