"""Aligns diffusion and flow-matching models with preferences, on any stock diffusers pipeline."""

from diffusers import SchedulerMixin  # pipelines that name our schedulers look this class up here
from diffusers.pipelines import pipeline_loading_utils as _loading

from . import embedded
from .condition import Condition
from .policy import Policy, noise_seed
from .schedulers import DDIMSDEScheduler, FlowMatchSDEScheduler, apply_recipe, sde_twin
from .trajectory import Trajectory
from .transition import GaussianTransition

__version__ = "0.1.0"

# Lets `DiffusionPipeline.from_pretrained` load a pipeline that was saved with one of our schedulers.
if hasattr(_loading, "LOADABLE_CLASSES"):
    _loading.LOADABLE_CLASSES.setdefault("diffusers_align", {"SchedulerMixin": ["save_pretrained", "from_pretrained"]})

__all__ = [
    "Condition",
    "DDIMSDEScheduler",
    "FlowMatchSDEScheduler",
    "GaussianTransition",
    "Policy",
    "SchedulerMixin",
    "Trajectory",
    "apply_recipe",
    "embedded",
    "noise_seed",
    "sde_twin",
]
