"""What a call of a pipeline leaves as it was: the caller's arguments, torch's global generators and caches, and the pipeline if the call does not end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def own_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments, of which the pipeline may write into lists, dicts and tensors: some put their chat template into the list of
    prompts, or binarise a mask in place. Embeddings stay the same tensors, by which encoded prompts are remembered."""
    return {name: pytree.tree_map(lambda x, name=name: x.clone() if isinstance(x, Tensor) and "embeds" not in name else x, v) for name, v in call.items()}


@contextmanager
def seeded_globally(seed: int | None, device: torch.device) -> Iterator[None]:
    """Context: torch's global generators of the CPU and of `device` start at `seed`, and go on afterwards as if nothing was drawn. Some
    pipelines draw from them beside the generator that they are given. With None they are left alone."""
    generators = [] if seed is None else [torch.default_generator, *_generators_of(device)]
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states):
            generator.set_state(state)


def _generators_of(device: torch.device) -> list[torch.Generator]:
    if device.type == "cpu":
        return []
    module = torch.get_device_module(device)
    generators = getattr(module, "default_generators", ())
    return [generators[module.current_device() if device.index is None else device.index]] if generators else []


@contextmanager
def restored_if_abandoned(pipeline) -> Iterator[None]:
    """Context: if the call within raises, whatever it changed on the pipeline and its modules (attention processors, flags, components) is
    put back, and the pipeline's own clean-up runs. Calls that end have cleaned up themselves."""
    objects = [pipeline, *(m for c in pipeline.components.values() if isinstance(c, nn.Module) for m in c.modules())]
    before = [(own, _attributes(own)) for own in objects]
    try:
        yield
    except BaseException:
        for own, attributes in before:
            _put_back(own, attributes)
        pipeline.maybe_free_model_hooks()
        raise


def _attributes(own) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    return dict(own.__dict__), dict(own._modules) if isinstance(own, nn.Module) else {}


def _put_back(own, attributes: tuple[dict[str, Any], dict[str, nn.Module]]) -> None:
    before, modules = attributes
    for name in [name for name in own.__dict__ if name not in before]:
        del own.__dict__[name]
    own.__dict__.update(before)
    if isinstance(own, nn.Module) and own._modules != modules:
        own._modules.clear()
        own._modules.update(modules)


@contextmanager
def no_cast_weights_kept() -> Iterator[None]:
    """Autocast keeps the weights that it has cast. Before the fix of pytorch#112583, one that was cast under `no_grad` stays without a
    graph until autocast is left, so that a trainable weight of float32 gets no gradient: here calls with and without gradients alternate."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def quiet(pipeline) -> Iterator[None]:
    """Context: without the pipeline's own progress bar."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline._progress_bar_config = before


def refuse_offloading(pipeline) -> None:
    """Weights that move from device to device, as one module after another is called, are not there on the way back.

    Raises:
        ValueError: a component is offloaded.
    """
    for name, component in pipeline.components.items():
        for module in component.modules() if isinstance(component, nn.Module) else ():
            hook = getattr(module, "_hf_hook", None)
            if any(isinstance(h, CpuOffload) or getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook])):
                raise ValueError(
                    f"The pipeline's {name} is offloaded, and its weights would be elsewhere when a gradient comes back. Gradients need them in place: "
                    "load the pipeline without offloading and move it, pipe.to(device); where none is wanted, call under torch.no_grad()."
                )
