"""What a call of a pipeline leaves as it was: the caller's arguments, torch's global generators and caches, and the pipeline if the call does not end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import calls_of
from .module_tree import ModuleTree
from .replacements import held


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


class Enough(BaseException):
    """Raised by a callback that has seen enough: ends the pipeline's call there. Not an Exception: a pipeline may catch those."""


@contextmanager
def restored_if_abandoned(pipeline, tree: ModuleTree) -> Iterator[None]:
    """Context: if the call within raises, what pipelines change while they run is put back, and the pipeline's own clean-up runs: attributes of the
    pipeline and its diffusers models, attention processors, hooks and scales of LoRAs at any depth. Calls that end have cleaned up themselves, but
    for attention processors: some pipelines return latents before they put those back.

    Other libraries' models are left alone: what a first call leaves on a text encoder (transformers' hooks that capture hidden states) is meant
    to stay, and half of it would change what it returns."""
    attributes = [(own, _attributes(own)) for own in (pipeline, *tree.models)]
    try:
        yield
    except BaseException:
        for own, before in attributes:
            _put_back(own, before)
        tree.put_back()
        calls_of(pipeline).clean_up()
        raise
    tree.put_processors_back()


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
def checkpointing_switches(pipeline) -> Iterator[None]:
    """Context: models that can recompute activations say whether they do. One reads `gradient_checkpointing` wherever autograd is on, and never sets it."""
    with ExitStack() as stack:
        for component in pipeline.components.values():
            if getattr(component, "_supports_gradient_checkpointing", False) and not hasattr(component, "gradient_checkpointing"):
                stack.enter_context(held(component, "gradient_checkpointing", False))
        yield


@contextmanager
def quiet(pipeline) -> Iterator[None]:
    """Context: without the pipeline's own progress bar."""
    before = getattr(pipeline, "_progress_bar_config", {})
    with held(pipeline, "_progress_bar_config", {**before, "disable": True}):
        yield
