"""What a call of a pipeline leaves as it was: the caller's arguments, torch's global generators and caches, and the pipeline if the call does not end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.hooks import CpuOffload
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import calls_of
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


@contextmanager
def restored_if_abandoned(pipeline) -> Iterator[None]:
    """Context: if the call within raises, what pipelines change while they run is put back, and the pipeline's own clean-up runs: attributes of the
    pipeline and its diffusers models, attention processors, hooks and scales of LoRAs at any depth. Calls that end have cleaned up themselves, but
    for attention processors: some pipelines return latents before they put those back.

    Other libraries' models are left alone: what a first call leaves on a text encoder (transformers' hooks that capture hidden states) is meant
    to stay, and half of it would change what it returns."""
    components = [c for c in pipeline.components.values() if isinstance(c, ModelMixin)]
    attributes = [(own, _attributes(own)) for own in (pipeline, *components)]
    parts = _Parts.of(components)
    try:
        yield
    except BaseException:
        for own, before in attributes:
            _put_back(own, before)
        parts.put_back(components)
        calls_of(pipeline).clean_up()
        raise
    parts.put_processors_back()


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


class _Parts(NamedTuple):
    """What calls change deep inside a model. Models have thousands of parts and few that matter here: only those are kept, at each call.

    Attributes:
        processors: of attention layers.
        hooks: torch's and diffusers' own, by the module's attribute, of modules that have any.
        scales: of LoRAs, which some models change for the time of a forward pass.
    """

    processors: list[tuple[nn.Module, Any]]
    hooks: dict[nn.Module, dict[str, Any]]
    scales: list[tuple[dict[str, float], dict[str, float]]]

    @classmethod
    def of(cls, components: list[nn.Module]) -> _Parts:
        found = cls([], {}, [])
        for module in (m for component in components for m in component.modules()):
            own = module.__dict__
            if hasattr(type(module), "set_processor"):
                found.processors.append((module, module.processor))
            if "scaling" in own and isinstance(own["scaling"], dict):
                found.scales.append((own["scaling"], dict(own["scaling"])))
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_diffusers_hook" in own:
                found.hooks[module] = {name: dict(own[name]) if name in _TORCH_HOOKS else own[name] for name in (*_TORCH_HOOKS, *_OWN_HOOKS) if name in own}
        return found

    def put_processors_back(self) -> None:
        for module, processor in self.processors:
            if module.processor is not processor:
                module.set_processor(processor)

    def put_back(self, components: list[nn.Module]) -> None:
        self.put_processors_back()
        for scales, before in self.scales:
            scales.update(before)
        for module in (m for component in components for m in component.modules()):
            own, before = module.__dict__, self.hooks.get(module, {})
            for name in _TORCH_HOOKS:
                for key in set(own[name]) - set(before.get(name, ())):
                    del own[name][key]
            for name in _OWN_HOOKS:
                own.pop(name, None)
                own.update({name: before[name]} if name in before else {})


_TORCH_HOOKS, _OWN_HOOKS = ("_forward_hooks", "_forward_pre_hooks"), ("forward", "_diffusers_hook")


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
