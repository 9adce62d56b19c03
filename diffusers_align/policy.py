"""A stock pipeline as a policy: roll it out, replay it with gradients, evaluate it at any state, decode and encode.

No method knows a model family. Everything goes through the pipeline's own `__call__` (`diffusers_align.driving.driver`), in which an SDE scheduler with the
same noise table stands in the place of its own, for as long as the call lasts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from . import lora
from .checks.ranges import CountOrNone, Range, check_value, checked
from .condition import Condition
from .driving.chains import SEVERAL_CHAINS, Chains
from .driving.driver import Driver, seeded
from .driving.forwards import Forwards
from .driving.latent_layout import Layouts, check_images
from .driving.noise import noise_seed
from .driving.outcome import Outcome, by_sample, check_seen, images_of, outcome, sampling_rate_of
from .driving.parts import components_of
from .driving.prediction import Prediction
from .driving.reproducibility import CarriedState, check_first_steps
from .driving.scheduler_hook import Step
from .driving.shared_prefix import shared_walk
from .driving.tape import Tape, check_state, force
from .schedulers.scheduling_utils import SDESchedulerMixin
from .trajectory import Trajectory
from .transition import GaussianTransition


class Policy(Driver):
    """Wraps a pipeline. Its parameters are frozen and in evaluation mode; `add_lora` adds what can be trained, also by further policies of the pipeline.

    Args:
        pipeline: any diffusers pipeline, classic or modular. It keeps its scheduler: its own call samples as ever, with the LoRA.
        scheduler: an SDE scheduler; the SDE twin of the pipeline's own by default.
        call_kwargs: arguments of every call (`num_inference_steps`, `guidance_scale`, `height` ...), which a method's own
            override.
    """

    made_by = "Policy(pipe) makes one of a loaded pipeline"

    def __init__(self, pipeline, scheduler: SDESchedulerMixin | None = None, **call_kwargs: Any):
        super().__init__(pipeline, scheduler, call_kwargs)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                for parameter in component.eval().parameters():  # but for the LoRA that another policy of the pipeline trains
                    parameter.requires_grad_(parameter.requires_grad and getattr(parameter, "of_diffusers_align", False))
        self._layouts = Layouts(self)
        self._prediction = Prediction(self)
        self._carried, self.compared = CarriedState(self), False

    # --- trajectories ----------------------------------------------------------------------------------------------

    @checked
    @torch.no_grad()
    def rollout(
        self,
        prompts: str | list[str] | Condition | None = None,
        *,
        seeds: list[int] | None = None,
        step_seeds: list[int] | None = None,
        generator: torch.Generator | None = None,
        deterministic: bool = False,
        per_sample: dict[str, Any] | None = None,
        on_step: Callable[[int, GaussianTransition], None] | None = None,
        share_prefix: bool = False,
        **call_kwargs: Any,
    ) -> Trajectory:
        """Sample one trajectory per prompt.

        Args:
            prompts: or a condition, which has its own seeds and arguments.
            seeds: one whole number per sample, from 0 on, which fixes its initial noise and every draw; taken from `generator` (or torch's
                global one) if absent.
            step_seeds: seeds of the steps' noise alone, for samples that share their initial noise.
            deterministic: walk the ODE; no step has a log-probability then.
            per_sample, call_kwargs: as of `condition`.
            on_step: gets the number and the kernel of each step that draws noise, which a `replay` before any update would compute again.
            share_prefix: walk the steps before the SDE window once for samples of equal prompt, seed and arguments: the same up to rounding. For
                pipelines that carry nothing else from step to step; replays of a window refuse others.

        Raises:
            ValueError: what `condition` raises; arguments beside a condition; a generator beside seeds.
        """
        if isinstance(prompts, Condition):
            given = {"seeds": seeds, "step_seeds": step_seeds, "per_sample": per_sample, **call_kwargs}
            if ignored := [name for name, value in given.items() if value is not None or name in call_kwargs]:
                raise ValueError(f"A condition has its own arguments: leave out {', '.join(ignored)}, or make another one with policy.condition(...).")
            condition = prompts
        else:
            condition = self.condition(prompts, seeds=seeds, step_seeds=step_seeds, per_sample=per_sample, **call_kwargs)
        condition = seeded(condition, generator)
        tape = Tape(on_step)
        if share_prefix:
            self._carried.refuse_caches("steps that samples share")
        record, needs_denoiser = shared_walk(self, condition, tape) if share_prefix and not deterministic else (tape.record, None)
        with self.noise(condition, deterministic):
            self.drive(condition, record, needs_denoiser=needs_denoiser)
        return tape.trajectory(condition)

    @checked
    def replay(
        self,
        trajectory: Trajectory,
        on_step: Callable[[int, GaussianTransition], None],
        steps: list[int] | None = None,
        condition: Condition | None = None,
        forwards: Forwards | None = None,
    ) -> None:
        """One pass of the pipeline with the recorded actions forced, under the current weights and autograd mode. Under the weights of
        the rollout the log-probabilities are its own, bit for bit where kernels round alike with and without gradients (as on the CPU).

        `on_step(k, transition)` may call `backward`: each step's graph stands alone, so memory stays one denoiser step's.
        The actions of `trajectory.children` are forced as well, but their transitions are not handed out.

        Args:
            steps: which solver steps; every stochastic one by default. The denoiser runs for these only.
            condition: in the place of the trajectory's own, for another caption of the same samples.
            forwards: how the denoiser is evaluated, where `on_step` calls `backward`: several steps at once, say (`driving.forwards`).

        Raises:
            ValueError: the pipeline arrives at another state than the recorded one (other arguments, seeds or weights before the denoiser); steps by
                themselves where state is carried from step to step; a condition of other size; a step that the trajectory does not have.
        """
        wanted = set(trajectory.noisy_steps if steps is None else steps)
        for k in wanted:
            check_value("steps", k, Annotated[int, Range(0, trajectory.num_steps - 1)])
        condition = (condition or trajectory.condition).of_samples(len(trajectory), "trajectory")
        self._carried.refuse(trajectory, wanted)
        (forwards.force if forwards else force)(self, trajectory, on_step, wanted, condition)

    def transition(self, trajectory: Trajectory, k: int, condition: Condition | None = None) -> GaussianTransition:
        """The kernel of solver step k under the current weights, with its graph if autograd is on."""
        found: list[GaussianTransition] = []
        self.replay(trajectory, lambda _, transition: found.append(transition), [k], condition)
        return found[0]

    @checked
    @torch.no_grad()
    def transitions(self, trajectory: Trajectory, steps: list[int] | None = None, condition: Condition | None = None) -> dict[int, GaussianTransition]:
        """The kernels of `steps` (every stochastic one by default) without gradients, by solver step: of the reference, of the
        policy before an update, or under another caption."""
        found: dict[int, GaussianTransition] = {}
        self.replay(trajectory, found.__setitem__, steps, condition)
        return found

    @checked
    @torch.no_grad()
    def complete(self, trajectory: Trajectory, k: CountOrNone, deterministic: bool = True, seeds: list[int] | None = None) -> Tensor:
        """Sample on from state k (0: the initial noise) to the end: the final latents (B, *D).

        Args:
            deterministic: walk the ODE; otherwise `seeds` draw the noise of the new steps.

        Raises:
            ValueError: the trajectory has no state k, seeds for steps without noise, or the pipeline carries state from step to step.
        """
        check_value("k", k, Annotated[int, Range(0, trajectory.num_steps)])
        if deterministic and seeds is not None:
            raise ValueError("seeds draw the noise of the new steps, and deterministic ones have none: leave them out, or deterministic=False.")
        if k == trajectory.num_steps:
            return trajectory.final
        self._carried.refuse(trajectory, range(k, trajectory.num_steps))
        last: list[Tensor] = []

        def go(step: Step) -> Tensor | None:
            tape = trajectory if step.child == 0 else trajectory.children[step.child - 1]
            if step.k < k:
                step.skip()
                return step.like(tape.actions[:, step.k])
            if step.k == k and not self.calls.takes_gradients:
                check_state(step, tape)
            drawn = step.run().prev_sample
            if step.child == 0:
                last[:] = [drawn]
            return None

        own = trajectory.condition.step_seeds or trajectory.condition.seeds
        # Not the rollout's own stream again: its first draws are in state k already.
        seeds = own and [noise_seed(seed, "complete", k) for seed in own] if seeds is None else seeds
        with self.noise(replace(trajectory.condition, step_seeds=seeds), deterministic):
            self.drive(trajectory.condition, go, needs_denoiser=lambda step: step >= k)
        return last[0]

    def check_reproducible(self, trajectory: Trajectory) -> None:
        """Once for this policy, after a roll-out and before any update: its first two steps again, with the same seeds, must be the same.

        Raises:
            ValueError: they are not, so that replays would be of other samples.
        """
        if not self.compared:
            check_first_steps(self, trajectory)
            self.compared = True

    # --- single evaluations ----------------------------------------------------------------------------------------

    @checked
    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, guidance: bool = False) -> Tensor:
        """The model's output (B, *D) at `latents` (B, *D) and per-sample `timesteps` (B,), in the scheduler's units.

        Args:
            guidance: classifier-free guidance as the condition's call asks for, as at its second step; otherwise off, one denoiser row per sample.

        Pipelines that cannot take a time for each sample are found by a comparison at the first call and evaluated time by time. A model that is also told
        the time that a step leads to (a flow map) gets the same time twice: the output is its velocity there.

        Raises:
            ValueError: latents that are not shaped as the pipeline's own, times that the model does not have, or not one of each a sample; guidance that goes
                by the steps before; a pipeline that differentiates through its denoiser itself.
        """
        self._carried.refuse_caches("single evaluations")
        return self._prediction(latents, timesteps, condition, guidance)

    @checked
    def guidance_off(self, condition: Condition) -> dict[str, Any]:
        """Arguments of the call that switch classifier-free guidance off, found by trying; {} where it is off.

        Raises:
            ValueError: no argument does.
        """
        return self._prediction.guidance_off(condition)

    # --- pixels ----------------------------------------------------------------------------------------------------

    @checked
    def decode(self, latents: Tensor, condition: Condition | None = None) -> Tensor:
        """Latents in the pipeline's layout to images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], or sounds (B, C, T) in [-1, 1], by the
        pipeline's own tail. Differentiable if autograd is on (values beyond these ranges are clamped and pass no gradient);
        `gradients.decoding.decode_latents` is so also where the pipeline casts its autoencoder to another precision for the decoding.

        Raises:
            ValueError: the pipeline makes no pictures or sounds, but what another one starts from (a prior); or each sample portion after portion.
        """
        output, _ = self._decoded([latents[:, None]], condition)
        return check_seen(self.pipeline, by_sample(Outcome(images_of(output)), len(latents)).images)

    def outcome(self, samples: Trajectory | Tensor, condition: Condition | None = None) -> Outcome:
        """What `decode` gives, with what rewards may hear: the sampling rate of a sound, and the sound that a video has.

        Args:
            samples: a trajectory, of which all parts are decoded; or latents (B, *D) of the main part alone. Where another scheduler makes the
                sound of a video, latents do not have it: `audio` is None.
            condition: of latents; a trajectory has its own.

        Raises:
            ValueError: what `decode` raises; there is sound, and nothing says at which rate it is sampled.
        """
        parts = [samples.actions, *(child.actions for child in samples.children)] if isinstance(samples, Trajectory) else [samples[:, None]]
        output, whole = self._decoded(parts, samples.condition if isinstance(samples, Trajectory) else condition)
        found = by_sample(outcome(self.pipeline, output) if whole else Outcome(images_of(output)), len(parts[0]))
        check_seen(self.pipeline, found.images)
        return found

    def _decoded(self, parts: list[Tensor], condition: Condition | None) -> tuple[Any, bool]:
        """The pipeline's output for what each scheduler's steps lead to (B, K, *D), the last of which stands for those beyond; and whether those are all
        the schedulers that it steps."""
        condition = (condition or self.any_condition(len(parts[0]))).of_samples(len(parts[0]), "latents")
        missing, chains, portions = set(), Chains(), {0}

        def put(step: Step) -> Tensor:
            chain = chains.of(step)
            step.skip()
            if step.child >= len(parts):
                missing.add(step.child)
                return step.sample
            states = parts[step.child]
            if states.shape[1] <= step.k:  # one state for all steps
                portions.add(step.portion)
            if states.shape[1] <= step.k and chain[1] > step.portion:
                raise ValueError(SEVERAL_CHAINS.format("latents without their trajectory"))
            return step.like(states[:, min(step.k, states.shape[1] - 1)])

        output = self.drive(condition, put, needs_denoiser=lambda k: False, output_type="pt")
        if len(portions) > 1:
            self.refuse_portions(condition, "give policy.outcome the trajectory, which has all of them")
        return output, not missing

    @property
    def sampling_rate(self) -> int:
        """Values a second of the sound that the pipeline makes (`driving.outcome.sampling_rate_of`).

        Raises:
            ValueError: nothing of the pipeline says.
        """
        return sampling_rate_of(self.pipeline)

    def encode(self, images: Tensor, condition: Condition | None = None) -> Tensor:
        """Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] to clean latents in the pipeline's own layout: `decode`'s
        inverse as far as the autoencoder allows.

        What the condition holds (the region that inpainting keeps, a video's given first frame) is decoded from the condition, whatever the images:
        latents there are the condition's own.

        Raises:
            ValueError: the pipeline's tail is not an affine map and a permutation before `vae.decode`, or these are no such images; a condition
                that holds a part, of another number of samples.
        """
        check_images(images)
        return self._layouts.encode(images, condition)

    # --- weights ---------------------------------------------------------------------------------------------------

    def add_lora(self, rank: int = 16, alpha: int | None = None, **config: Any) -> list[nn.Parameter]:
        """Add a trainable LoRA to every denoiser and return its parameters (`diffusers_align.lora.add`)."""
        return lora.add(self.denoisers, rank, alpha, **config)

    def save_lora(self, directory) -> None:
        """Save in the format that the pipeline's `load_lora_weights` reads (`diffusers_align.lora.save`)."""
        lora.save(self.pipeline, self.denoisers, directory)

    def load_lora(self, directory) -> None:
        """Load what `save_lora` wrote, or the file of another tool; into the trainable LoRA if `add_lora` was called before (`diffusers_align.lora.load`)."""
        lora.load(self.pipeline, self.denoisers, directory)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for module in self.denoisers.values() for p in module.parameters() if p.requires_grad]

    def reference(self):
        """Context: the LoRA of `add_lora` or `load_lora` off, so that the policy is the model that it was put on; restored on any exception.

        What a file has for text encoders is off, too: prompts are encoded as that model does. Adapters of others, such as a style that
        `pipe.load_lora_weights` brought before, belong to that model and stay.
        """
        return lora.disabled([part for part in components_of(self.pipeline).values() if isinstance(part, nn.Module)], lora.ADAPTER)
