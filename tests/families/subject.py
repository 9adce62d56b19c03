"""A pipeline under test, and what its columns share: they are computed once, in the order of the columns."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_align import Policy, Trajectory
from diffusers_align.condition import Condition, belongs_to_samples
from diffusers_align.driving.denoisers import denoisers
from diffusers_align.driving.noise import noise_seed
from diffusers_align.driving.outcome import images_of, in_range
from diffusers_align.driving.pipeline_state import seeded_globally

from .case import Case

SEEDS = [11, 12]
# What modular pipelines call their output.
_OUTPUTS = ("images", "videos", "audio", "audios", "image", "video", "latents")


class Subject:
    """A case, its policy with a fresh LoRA (B = 0: still the model that made the trajectory), and the stock pipeline's own call.

    Args:
        dtype: of the pipeline's components.
    """

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32):
        self.case, self.dtype = case, dtype
        self.size = 1 if case.one_sample else 2
        self.seeds = SEEDS[: self.size]
        self.prompts = None if case.prompts is None else list(case.prompts[: self.size])
        self.per_sample = {name: value[: self.size] for name, value in case.per_sample.items()}
        self.first_inputs: dict[str, tuple[float, float]] = {}

    # --- the policy ------------------------------------------------------------------------------------------------

    def build(self) -> Any:
        """A fresh pipeline in the subject's precision."""
        pipeline = self.case.build()
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)
        return pipeline if self.dtype == torch.float32 else pipeline.to(self.dtype)

    @cached_property
    def policy(self) -> Policy:
        return Policy(self.build(), **copy.copy(self.case.call))

    def rollout(self, policy: Policy | None = None, **options: Any) -> Trajectory:
        """Of the subject's prompts, by its policy or another one."""
        options = {"seeds": self.seeds, "per_sample": copy.copy(self.per_sample) or None, **options}
        return (policy or self.policy).rollout(self.prompts, **options)

    @cached_property
    def trajectory(self) -> Trajectory:
        return self.rollout()

    @cached_property
    def lora(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters of each denoiser. Added after the trajectory was made."""
        assert self.trajectory is not None
        self.policy.add_lora(rank=4)
        return {name: [p for p in module.parameters() if p.requires_grad] for name, module in self.policy.denoisers.items()}

    @contextmanager
    def moved(self) -> Iterator[None]:
        """The policy with a LoRA that does something; fresh again afterwards."""
        assert self.lora
        generator = torch.Generator().manual_seed(1)
        matrices = [p for module in self.policy.denoisers.values() for name, p in module.named_parameters() if ".lora_B." in name]
        before = [matrix.detach().clone() for matrix in matrices]
        for matrix in matrices:
            matrix.data.normal_(std=0.3, generator=generator)
        try:
            yield
        finally:
            for matrix, values in zip(matrices, before):
                matrix.data.copy_(values)

    def forget_gradients(self) -> None:
        for parameters in self.lora.values():
            for parameter in parameters:
                parameter.grad = None

    def gradients(self) -> dict[str, float]:
        """The sum of the absolute gradients of each denoiser's LoRA."""
        return {name: sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None) for name, parameters in self.lora.items()}

    @cached_property
    def replayed(self) -> tuple[dict[int, Tensor], dict[int, dict[str, float]]]:
        """Of one pass with gradients: log-probabilities and the gradients of each denoiser, by solver step."""
        log_probs, gradients, trajectory = {}, {}, self.trajectory
        assert self.lora

        def on_step(k, transition):
            log_prob = transition.log_prob(trajectory.actions[:, k])
            log_probs[k] = log_prob.detach()
            self.forget_gradients()
            log_prob.sum().backward()
            gradients[k] = self.gradients()

        with torch.enable_grad():
            self.policy.replay(trajectory, on_step)
        return log_probs, gradients

    # --- the stock call --------------------------------------------------------------------------------------------

    def stock_call(self, output_type: str, pipeline: Any = None) -> Any:
        """The output of the stock pipeline's own call, with frozen weights: of others kernels may round otherwise, and some samplers make much of that.
        What it draws from torch's global generator (control pictures, in some classes) is what a policy's call draws there."""
        pipeline = self.build() if pipeline is None else pipeline
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        if hasattr(pipeline, "blocks"):
            call = self._modular_call(pipeline, generators, output_type)
        else:
            parameters = inspect.signature(type(pipeline).__call__).parameters
            own = {"generator": generators[0] if self.case.one_sample else generators, "output_type": output_type}
            call = {**self._arguments(parameters), **{name: value for name, value in own.items() if name in parameters}}
        with seeded_globally(noise_seed(self.seeds, "global"), torch.device("cpu")):
            return pipeline(**call)

    def _arguments(self, accepted) -> dict[str, Any]:
        condition = Condition(self.prompts or [""] * self.size, copy.deepcopy(self.case.call), per_sample=copy.deepcopy(self.per_sample))
        arguments = condition.arguments(accepted)
        if self.case.one_sample and isinstance(arguments.get("prompt"), list):
            arguments["prompt"] = arguments["prompt"][0]
        return arguments

    def _modular_call(self, pipeline, generators, output_type: str) -> dict[str, Any]:
        """The arguments that the blocks take, a text for each prompt; what the guiders take is set there, as users do."""
        names = set(pipeline.blocks.input_names)
        for component, guider in pipeline.components.items():
            if hasattr(guider, "prepare_inputs_from_block_state"):
                given = {name: value for name, value in self.case.call.items() if value is not None}
                own = {field: given[name] for field in guider.config for name in (field, component.replace("guider", field)) if name in given}
                pipeline.update_components(**{component: guider.new(**({"enabled": True} | own if own else {}))})
        call = {"generator": generators if not self.case.one_sample else generators[0], "output_type": output_type}
        arguments = {name: value for name, value in self._arguments(names).items() if name in names}
        if not self.case.one_sample:
            arguments = {name: [v] * self.size if isinstance(v, str) and belongs_to_samples(name) else v for name, v in arguments.items()}
        return {**arguments, **{name: value for name, value in call.items() if name in names}}

    @cached_property
    def stock_images(self) -> Tensor:
        """What the stock call makes, as tensors where it can; remembers what it asked its denoisers first."""
        pipeline = self.build()
        with watched(_denoisers(pipeline)) as self.first_inputs:
            try:
                output = self.stock_call("pt", pipeline)
            except Exception as error:
                if "pt" not in str(error):
                    raise
                output = self.stock_call("np", pipeline)  # some know no tensors
        images = tensor_of(output)
        if images.ndim > 3 and images.shape[-3] == 3 and images.min() < 0:  # some leave tensors as the autoencoder made them
            images = tensor_of(self.stock_call("np"))
        return images_of((in_range(output, images) if hasattr(output, "to_tuple") else images,))

    @cached_property
    def stock_latents(self) -> Tensor:
        return tensor_of(self.stock_call("latent"), latents=True)


def _denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """None where there is none: the policy says so."""
    try:
        return denoisers(pipeline)
    except ValueError:
        return {}


@contextmanager
def watched(models: dict[str, nn.Module]) -> Iterator[dict[str, tuple[float, float]]]:
    """Context: the first time and the scale of the first input that each model is called with."""
    found: dict[str, tuple[float, float]] = {}

    def look(name: str):
        def hook(module, args, kwargs):
            given = dict(zip(inspect.signature(type(module).forward).parameters, (module, *args))) | kwargs
            times = [given[key] for key in ("timestep", "timesteps", "t") if given.get(key) is not None]
            firsts = [value[0] if isinstance(value, (list, tuple)) and value else value for value in given.values()]
            states = [value for value in firsts if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2]
            if times and states and name not in found:
                found[name] = (float(torch.as_tensor(times[0]).flatten()[0]), float(states[0].float().std()))

        return hook

    handles = [module.register_forward_pre_hook(look(name), with_kwargs=True) for name, module in models.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def tensor_of(output: Any, latents: bool = False) -> Tensor:
    """The first entry of a pipeline's output, or what a modular one calls its output, as a tensor; pictures channels first."""
    if hasattr(output, "values") and hasattr(output, "get_by_kwargs"):
        names = ("latents",) if latents else _OUTPUTS
        images = next(value for name in names if (value := output.get(name)) is not None)
    else:
        images = output[0]
    if isinstance(images, (list, tuple)):
        images = torch.stack([tensor_of((image,), latents) for image in images])
    if isinstance(images, np.ndarray) or not isinstance(images, Tensor):
        images = np.asarray(images)
        images = torch.from_numpy(images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1))
        images = images.movedim(-1, -3) if images.ndim > 2 and not latents else images
    return images


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value; infinite where the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12))


def smooth(shape: torch.Size, seed: int = 2) -> Tensor:
    """Random pictures or videos in [0, 1] without pixel noise, which no autoencoder keeps."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[:-3].numel(), shape[-3], 3, 3, generator=generator)
    return nn.functional.interpolate(coarse, size=shape[-2:], mode="bilinear").reshape(shape)
