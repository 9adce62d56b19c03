"""Aligns diffusion and flow-matching models with preferences, on any stock diffusers pipeline."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from .moved import accept_old_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from . import embedded
    from .condition import Condition
    from .gradients.rollout import differentiable_rollout
    from .lora import load_lora
    from .policy import Policy, noise_seed
    from .schedulers import DDIMSDEScheduler, FlowMatchSDEScheduler, SigmaSDEScheduler, apply_recipe, sde_twin
    from .trajectory import Trajectory
    from .transition import GaussianTransition

# Where each public name lives. They are imported when they are asked for: a command that needs no model does not wait for torch.
_HOMES = {
    "Condition": ".condition",
    "DDIMSDEScheduler": ".schedulers",
    "FlowMatchSDEScheduler": ".schedulers",
    "GaussianTransition": ".transition",
    "Policy": ".policy",
    "SchedulerMixin": "diffusers",  # pipelines that name our schedulers look this class up here
    "SigmaSDEScheduler": ".schedulers",
    "Trajectory": ".trajectory",
    "apply_recipe": ".schedulers",
    "differentiable_rollout": ".gradients.rollout",
    "load_lora": ".lora",
    "noise_seed": ".policy",
    "sde_twin": ".schedulers",
}
# Pipelines that were saved with them look these up here too.
_HOMES |= dict.fromkeys(
    ("CMSDEScheduler", "DDPMSDEScheduler", "FlowMatchLCMSDEScheduler", "LCMSDEScheduler", "SCMSDEScheduler", "TCDSDEScheduler", "UnCLIPSDEScheduler",
     "WuerstchenSDEScheduler"),
    ".schedulers",
)  # fmt: skip
_HOMES["FlowMapSDEScheduler"] = ".schedulers.scheduling_flow_map_sde"  # whose parent is not in every diffusers
__all__ = [
    "Condition",
    "DDIMSDEScheduler",
    "FlowMatchSDEScheduler",
    "GaussianTransition",
    "Policy",
    "SchedulerMixin",
    "SigmaSDEScheduler",
    "Trajectory",
    "apply_recipe",
    "differentiable_rollout",
    "embedded",
    "load_lora",
    "noise_seed",
    "sde_twin",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name], __name__), name)
        return value
    if not name.startswith("_") and importlib.util.find_spec(f".{name}", __name__):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Registration:
    """Lets `DiffusionPipeline.from_pretrained` load a pipeline that was saved with one of our schedulers, as soon as diffusers is imported."""

    target = "diffusers.pipelines.pipeline_loading_utils"

    @staticmethod
    def register(module: Any) -> None:
        if hasattr(module, "LOADABLE_CLASSES"):
            module.LOADABLE_CLASSES.setdefault(__name__, {"SchedulerMixin": ["save_pretrained", "from_pretrained"]})

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self.register(module)

        spec.loader.exec_module = exec_module
        return spec


if _Registration.target in sys.modules:
    _Registration.register(sys.modules[_Registration.target])
else:
    sys.meta_path.insert(0, _Registration())
accept_old_names()
