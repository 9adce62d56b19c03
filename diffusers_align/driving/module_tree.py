"""What lies deep in a pipeline's models and matters to a call. Models have thousands of modules: they are walked once a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline, ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .parts import components_of, parts_of
from .replacements import held

# The name of the hooks of `apply_group_offloading`.
_GROUPS = "group_offloading"
_TORCH_HOOKS, _OWN_HOOKS = ("_forward_hooks", "_forward_pre_hooks"), ("forward", "_diffusers_hook")


def modules_of(module: nn.Module) -> list[nn.Module]:
    """`list(module.modules())` in a quarter of the time."""
    found, ahead, seen = [], [module], set()
    while ahead:
        module = ahead.pop()
        if module is not None and module not in seen:
            seen.add(module)
            found.append(module)
            if children := module.__dict__["_modules"]:
                ahead.extend(reversed(children.values()))
    return found


def layers_of(module: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a module that carry adapters, whoever added them."""
    return [layer for layer in modules_of(module) if carries_adapters(type(layer))]


@lru_cache(maxsize=1024)
def carries_adapters(kind: type) -> bool:
    """Asked once of a class: of an abstract one, `isinstance` takes longer than the walk over all modules."""
    return issubclass(kind, BaseTunerLayer)


def caches(module: nn.Module) -> list[str]:
    """Names of diffusers' caches in a denoiser whose outputs depend on earlier calls."""
    config = getattr(module, "_cache_config", None)
    registries = [own["_diffusers_hook"] for own in map(vars, modules_of(module)) if "_diffusers_hook" in own]
    names = {type(hook).__name__ for registry in registries for hook in registry.hooks.values() if getattr(hook, "_is_stateful", False)}
    return [type(config).__name__.removesuffix("Config")] if config is not None else sorted(names)


class ModuleTree(NamedTuple):
    """The modules that matter, of all of a pipeline's models.

    Attributes:
        models: those whose parts a call may change: diffusers' own.
        processors: of attention layers.
        scales: of LoRAs, which some models change for the time of a forward pass.
        hooks: torch's and diffusers' own, by the module's attribute, of modules that have any.
        moving: (component, hook of accelerate or registry of diffusers) of modules whose weights may move during a call.
    """

    models: list[nn.Module]
    processors: list[tuple[nn.Module, Any]]
    scales: list[tuple[dict[str, float], dict[str, float]]]
    hooks: dict[nn.Module, dict[str, Any]]
    moving: list[tuple[str, Any]]

    @classmethod
    def of(cls, pipeline) -> ModuleTree:
        found, attends = cls([], [], [], {}, []), {}
        for name, component in components_of(pipeline).items():
            if not isinstance(component, nn.Module):
                continue
            if own_model := isinstance(component, ModelMixin):
                found.models.append(component)
            for module in modules_of(component):
                own, kind = module.__dict__, type(module)
                if "_hf_hook" in own:
                    found.moving.append((name, own["_hf_hook"]))
                if "_diffusers_hook" in own and own["_diffusers_hook"].hooks:
                    found.moving.append((name, own["_diffusers_hook"]))
                if not own_model:
                    continue
                if kind not in attends:
                    attends[kind] = hasattr(kind, "set_processor")
                if attends[kind]:
                    found.processors.append((module, module.processor))
                if "scaling" in own and isinstance(own["scaling"], dict):
                    found.scales.append((own["scaling"], dict(own["scaling"])))
                if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_diffusers_hook" in own:
                    found.hooks[module] = {hook: dict(own[hook]) if hook in _TORCH_HOOKS else own[hook] for hook in _TORCH_HOOKS + _OWN_HOOKS if hook in own}
        return found

    def put_processors_back(self) -> None:
        for module, processor in self.processors:
            if module.processor is not processor:
                module.set_processor(processor)

    def put_back(self) -> None:
        """Processors, scales and hooks are again as they were found."""
        self.put_processors_back()
        for scales, before in self.scales:
            scales.update(before)
        for module in (m for model in self.models for m in modules_of(model)):
            own, before = module.__dict__, self.hooks.get(module, {})
            for name in _TORCH_HOOKS:
                for key in set(own[name]) - set(before.get(name, ())):
                    del own[name][key]
            for name in _OWN_HOOKS:
                own.pop(name, None)
                own.update({name: before[name]} if name in before else {})

    def refuse_offloading(self) -> None:
        """Weights that move from device to device, as one module after another is called, are not there on the way back.

        Raises:
            ValueError: a component is offloaded.
        """
        for name, hook in self.moving:
            hooks = getattr(hook, "hooks", [hook])  # by name in diffusers' registry
            if _GROUPS in hooks or any(isinstance(h, CpuOffload) or getattr(h, "offload", False) for h in hooks):
                raise ValueError(
                    f"The pipeline's {name} is offloaded, and its weights would be elsewhere when a gradient comes back. Gradients need them in place: "
                    "load the pipeline without offloading and move it, pipe.to(device), with text encoders away (policy.offload_text_encoders(), "
                    "--offload_text_encoders) or quantised weights if it does not fit; where no gradient is wanted, call under torch.no_grad()."
                )

    def refuse_caches(self, pipeline) -> None:
        """What a denoiser's cache hands out was computed at an earlier step, whose graph is gone; and some caches stand aside where autograd is on, so that
        a replay would be of another policy than the roll-out.

        Raises:
            ValueError: a model has one.
        """
        for name, hook in self.moving:
            hooks = getattr(hook, "hooks", None)
            if isinstance(hooks, dict) and any(getattr(h, "_is_stateful", False) for h in hooks.values()):
                raise ValueError(
                    f"{name} has a {caches(pipeline.components[name])[0]}, which hands out what it has computed at earlier steps: gradients would not be those "
                    f"of this step. Samples may be drawn with it, without gradients; switch it off for these, pipeline.{name}.disable_cache()."
                )


# --- diffusers' own walks ----------------------------------------------------------------------------------------------

# Of each pipeline: where its models were, and what its `device` and `_execution_device` were then.
_DEVICES: WeakKeyDictionary[Any, tuple[list[torch.device | None], dict[str, torch.device]]] = WeakKeyDictionary()


@contextmanager
def walks_spared(pipeline, tree: ModuleTree) -> Iterator[None]:
    """Context: diffusers walks no modules to find what is known.

    `pipeline.device` and `pipeline._execution_device`, which calls read several times, are looked up at most once, and not again while the models stay
    where they are; which components there are is asked once; and no caches are looked for at the end, where no model has any. Pipelines with hooks, whose
    weights may move during a call, are left as they are.
    """
    with ExitStack() as stack:
        for own in () if tree.moving else (pipeline, *parts_of(pipeline)):
            stack.enter_context(held(own, "_devices", _devices(own)))
            stack.enter_context(held(own, "names_of_components", tuple(components_of(own))))
            stack.enter_context(_of_class(own, _settled(type(own))))
            if getattr(type(own), "maybe_free_model_hooks", None) is DiffusionPipeline.maybe_free_model_hooks:
                stack.enter_context(held(own, "maybe_free_model_hooks", lambda: None))
        yield


def _devices(pipeline) -> dict[str, torch.device]:
    places = [_place(component) for component in components_of(pipeline).values() if isinstance(component, nn.Module)]
    if (known := _DEVICES.get(pipeline)) is None or known[0] != places:
        _DEVICES[pipeline] = known = places, {name: _looked_up(pipeline, name, places) for name in _LOOK_UPS if hasattr(pipeline, name)}
    return known[1]


def _looked_up(pipeline, name: str, places: list[torch.device | None]) -> torch.device:
    """Where some models are on the CPU (text encoders that are away, say), the others' device, as newer diffusers have it; older ones take the first."""
    device = getattr(pipeline, name)
    return next((place for place in places if place is not None and place.type not in ("cpu", "meta")), device) if device.type == "cpu" else device


def _place(model: nn.Module) -> torch.device | None:
    tensor = next(model.parameters(), None)
    tensor = next(model.buffers(), None) if tensor is None else tensor
    return None if tensor is None else tensor.device


def device_of(model: nn.Module) -> torch.device:
    """`model.device`, without diffusers' walk over all modules where it can find nothing: weights that wait on the CPU for an accelerator."""
    place, accelerator = _place(model), getattr(torch, "accelerator", None)  # torch 2.5 has none
    if place is not None and (place.type not in ("cpu", "meta") or (accelerator is not None and not accelerator.is_available())):
        return place
    return model.device


_LOOK_UPS = ("device", "_execution_device")


@lru_cache(maxsize=256)
def _settled(cls: type) -> type:
    """A subclass of a pipeline's class, of the same name, that knows its devices and the names of its components."""
    known = {name: property(lambda self, name=name: self.__dict__["_devices"][name]) for name in _LOOK_UPS if hasattr(cls, name)}
    if getattr(cls, "components", None) is DiffusionPipeline.components:  # which reads the signature of `__init__` each time
        known["components"] = property(lambda self: {name: getattr(self, name) for name in self.__dict__["names_of_components"]})
    return type(cls.__name__, (cls,), {**known, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "class_outside": cls})


def class_of(pipeline) -> type:
    """The pipeline's class as it is outside of a call."""
    return getattr(type(pipeline), "class_outside", type(pipeline))


@contextmanager
def _of_class(pipeline, cls: type) -> Iterator[None]:
    before = type(pipeline)
    pipeline.__class__ = cls
    try:
        yield
    finally:
        pipeline.__class__ = before
