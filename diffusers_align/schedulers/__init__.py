"""Schedulers that draw from a Gaussian kernel and return its log-probability; drop-in for stock pipelines."""

from .kernels import KERNELS, Kernel
from .scheduling_ddim_sde import DDIMSDEScheduler
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .scheduling_sigma_sde import SigmaSDEScheduler
from .scheduling_utils import SDESchedulerMixin, SDESchedulerOutput
from .twin import apply_recipe, sde_twin

__all__ = [
    "KERNELS",
    "DDIMSDEScheduler",
    "FlowMatchSDEScheduler",
    "Kernel",
    "SDESchedulerMixin",
    "SDESchedulerOutput",
    "SigmaSDEScheduler",
    "apply_recipe",
    "sde_twin",
]
