"""Sampling by a learned Q-function over noises, around any stock pipeline whose sampler has a stochastic kernel.

The algorithm's page: `diffusers_align.algorithms.value_steering`; `training_scripts/train_value_steering.py` trains the function.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..algorithms.svdd import choose
from ..algorithms.value_steering import candidates_value
from ..checks.ranges import Count, NonNegative, checked
from ..condition import Condition
from ..driving.driver import seeded
from ..driving.noise import noise_seed
from ..driving.scheduler_hook import Step
from ..driving.tape import Tape
from ..policy import Policy
from ..rl.values import ValueNetwork
from ..trajectory import Trajectory
from ..transition import GaussianTransition, standard_normal
from .base import WrappedPipeline
from .draws import Generators


class NoiseValue(ModelMixin, ConfigMixin):
    """V(x, k, c), the value of a state x before solver step k (the number of steps: of a finished sample), which makes Q of a noise by where it leads.

    Args:
        state_size, prompt_size: numbers of a sample's latents and prompt features.
        num_steps: of the solver.
        width: of its three layers (`rl.values.ValueNetwork`).
    """

    @register_to_config
    def __init__(self, state_size: int, prompt_size: int, num_steps: int, width: int = 256):
        super().__init__()
        self.network = ValueNetwork(state_size, prompt_size, num_steps + 1, width)

    def forward(self, states: Tensor, prompts: Tensor, steps: Tensor) -> Tensor:
        """Values (N,) float32 of `states` (N, *D), prompt features (N, E) and solver `steps` (N,)."""
        return self.network(states.float(), prompts.float(), steps)

    @classmethod
    def of_policy(cls, policy: Policy, condition: Condition, width: int = 256) -> NoiseValue:
        """A fresh one of a policy's sizes; they are read off a sample of the condition's first prompt."""
        trajectory = policy.rollout(replace(condition.select([0]), seeds=[0], step_seeds=None))
        features = policy.prompt_features(trajectory.condition)
        return cls(trajectory.final[0].numel(), features.shape[1], trajectory.num_steps, width).to(policy.device)

    def check(self, state: Tensor, prompts: Tensor) -> None:
        """Raise a ValueError if states (B, *D) or prompt features (B, E) have other sizes than those that it was made for."""
        found, wanted = (state[0].numel(), prompts.shape[1]), (self.config.state_size, self.config.prompt_size)
        if found != wanted:
            raise ValueError(
                f"The value reads {wanted[0]} numbers of a state and {wanted[1]} of a prompt, and this pipeline's call has {found[0]} and {found[1]}: call it "
                "with the model and the height and width that the value was trained for."
            )


@dataclass(frozen=True)
class Steering:
    """How noises are picked.

    Attributes:
        value: of the states that they lead to.
        number: noises to choose from. The first is the one that the sampler draws.
        alpha: temperature of the choice; 0 takes the best.
        follow: take the one that is chosen; or the sampler's own, and say what the choice would be worth.
    """

    value: NoiseValue
    number: int
    alpha: float = 0.0
    follow: bool = True


class SteeredPolicy(Policy):
    """A policy whose roll-outs take, of several noises at each step, the one that a learned value likes; a plain one where `steering` is None.

    Attributes:
        worth: of each steered roll-out so far (B, L), what the choice was worth at each step with noise; `taken`, the value of what was taken.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.steering: Steering | None = None
        self.worth: list[Tensor] = []
        self.taken: list[Tensor] = []

    @torch.no_grad()
    def rollout(self, prompts=None, *, deterministic: bool = False, **options: Any) -> Trajectory:
        """As of a policy; a deterministic one has noise where it is steered, since there is nothing to pick otherwise."""
        if self.steering is None:
            return super().rollout(prompts, deterministic=deterministic, **options)
        on_step, share, generator = options.pop("on_step", None), options.pop("share_prefix", False), options.pop("generator", None)
        if on_step or share or (options and isinstance(prompts, Condition)):
            raise ValueError(
                "A steered roll-out takes a condition, or prompts with the call's arguments: leave out on_step, share_prefix and what is beside one."
            )
        condition = seeded(prompts if isinstance(prompts, Condition) else self.condition(prompts, **options), generator)
        walk = _Walk(self, condition, self.steering)
        with self.noise(condition, deterministic=False):
            self.drive(condition, walk.step)
        trajectory = walk.tape.trajectory(condition)
        if not walk.worth:
            raise ValueError("No step of this sampler has noise, so that there is none to pick: raise the scheduler's noise (`eta`, `noise_level`).")
        if trajectory.num_steps != self.steering.value.config.num_steps:
            raise ValueError(
                f"The value is of {self.steering.value.config.num_steps} solver steps, and this call takes {trajectory.num_steps}: give "
                f"num_inference_steps={self.steering.value.config.num_steps}, with which it was trained."
            )
        self.worth.append(torch.stack(walk.worth, 1))
        self.taken.append(torch.stack(walk.taken, 1))
        return trajectory

    def check_reproducible(self, trajectory: Trajectory) -> None:
        """As of a policy, by a roll-out that is not steered."""
        if not self.compared:
            super().check_reproducible(super().rollout(trajectory.condition))


class _Walk:
    """One call, step by step."""

    def __init__(self, policy: SteeredPolicy, condition: Condition, steering: Steering):
        self.steering, self.tape = steering, Tape()
        self.prompts = policy.prompt_features(condition).to(policy.device)
        seeds = condition.step_seeds or condition.seeds
        self.streams = [torch.Generator().manual_seed(noise_seed(seed, "candidates")) for seed in seeds]
        self.worth: list[Tensor] = []
        self.taken: list[Tensor] = []

    def step(self, step: Step) -> Tensor | None:
        state, output = step.sample.detach().clone(), step.run()
        if step.child > 0 or output.log_prob is None:
            self.tape.add(step, state, output.prev_sample.detach().clone(), output.log_prob)
            return None
        kernel = GaussianTransition(output.prev_sample_mean, output.std)
        drawn = step.like(self.pick(step.k, kernel, output.prev_sample))
        self.tape.add(step, state, drawn.detach().clone(), kernel.log_prob(drawn))
        return drawn

    def pick(self, k: int, kernel: GaussianTransition, own: Tensor) -> Tensor:
        """The next states (B, *D)."""
        steering, number = self.steering, len(own)
        noises = torch.stack([standard_normal((steering.number - 1, *own.shape[1:]), g, own.device, own.dtype) for g in self.streams])
        drawn = (kernel.mean.unsqueeze(1) + kernel.std.unsqueeze(1) * noises).to(own.dtype)
        candidates = torch.cat([own.unsqueeze(1), drawn], 1)  # (B, M, *D)
        prompts = self.prompts.to(own.device)
        steering.value.check(own, prompts)
        steps = torch.full((number * steering.number,), min(k + 1, steering.value.config.num_steps), device=own.device)
        values = steering.value(candidates.flatten(0, 1), prompts.repeat_interleave(steering.number, 0), steps).unflatten(0, (number, -1)).cpu()
        uniforms = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self.streams])
        index = choose(values, uniforms, alpha=steering.alpha) if steering.follow else torch.zeros(number, dtype=torch.long)
        self.worth.append(candidates_value(values, alpha=steering.alpha))
        self.taken.append(values[torch.arange(number), index])
        return candidates[torch.arange(number), index.to(own.device)]


class ValueSteeringPipeline(WrappedPipeline):
    """Samples of the stock pipeline whose noise is picked, step by step, by a learned Q-function: as many denoiser calls as the plain sampler makes, and no
    reward.

    >>> pipe = ValueSteeringPipeline(DiffusionPipeline.from_pretrained(...))  # doctest: +SKIP
    >>> pipe("a red cube on a blue ball", value="runs/value_steering", num_noises=64, num_inference_steps=10).images[0]  # doctest: +SKIP

    It walks on the pipeline's sampler with noise: its own if it is an SDE scheduler, else the SDE twin with the same noise table. With `num_noises=1` the
    samples are that sampler's own.
    """

    @checked
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        value: NoiseValue | str | Path,
        num_noises: Count = 16,
        alpha: NonNegative = 0.0,
        scheduler=None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ):
        """
        Args:
            prompt, kwargs: those of the stock call. `num_inference_steps`, sizes and guidance are those that the value was trained with.
            value: the function, or the folder that `train_value_steering.py` has written.
            num_noises: to choose from at each step; each costs a pass of the small network.
            alpha: temperature of the choice, in units of the reward; 0 takes the best.
            scheduler: an SDE scheduler, in the place of the SDE twin.

        Returns:
            The stock output with `step_values` (P, steps with noise), of what was chosen.

        Raises:
            ValueError: an argument is out of range, the sampler has no noise, or the value is of another model, size or number of steps.
        """
        if (eta := kwargs.get("eta")) is not None:
            more = f", eta={eta}" if eta else ""
            raise ValueError(f"The noise of the steps is the SDE scheduler's, and needed: pass scheduler=sde_twin(pipe.scheduler{more}) in the place of eta.")
        condition, generator = self.condition(prompt, kwargs)
        seeds = _seeds(generator, len(condition))
        value = load_value(value).to(self.pipeline._execution_device)
        with self.as_policy(scheduler, condition) as plain:
            policy = SteeredPolicy(plain.pipeline, plain.scheduler)
            policy.prompt_memory, policy.steering = plain.prompt_memory, Steering(value, num_noises, alpha)
            trajectory = policy.rollout(replace(condition, seeds=seeds))
        final, fresh = [trajectory.final, *(child.final for child in trajectory.children)], [torch.Generator().manual_seed(seed) for seed in seeds]
        output = self.finish(final, condition, fresh, output_type=output_type, return_dict=return_dict)
        return self.extended(output, step_values=policy.taken[-1])


def load_value(source: NoiseValue | str | Path) -> NoiseValue:
    """A value, or the one in a folder that `train_value_steering.py` has written, or in a repository of the Hub that such a folder was pushed to.

    Raises:
        FileNotFoundError: there is none.
    """
    if isinstance(source, NoiseValue):
        return source
    folder = Path(source) / "value"
    folder = folder if folder.is_dir() else Path(source)
    if not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        try:
            return NoiseValue.from_pretrained(str(source), subfolder="value", low_cpu_mem_usage=False).eval()
        except OSError as error:
            raise FileNotFoundError(f"No value in {str(source)!r}: there is no such folder here, and from the Hub: {error}") from error
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No value in {str(source)!r}: give the output folder of train_value_steering.py, or its folder `value`.")
    return NoiseValue.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def _seeds(generator: Generators, number: int) -> list[int]:
    sources = generator if isinstance(generator, list) else [generator] * number
    return [int(torch.randint(2**62, (), generator=g, device=g.device if g else "cpu")) for g in sources]
