"""Schedulers that draw from a Gaussian kernel and return its log-probability; drop-in for stock pipelines."""

from .kernels import KERNELS, Kernel
from .scheduling_ancestral_sde import DDPMSDEScheduler, UnCLIPSDEScheduler, WuerstchenSDEScheduler
from .scheduling_consistency_sde import CMSDEScheduler, FlowMatchLCMSDEScheduler, LCMSDEScheduler, SCMSDEScheduler, TCDSDEScheduler
from .scheduling_ddim_sde import DDIMSDEScheduler
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .scheduling_sigma_sde import SigmaSDEScheduler
from .scheduling_utils import SDESchedulerMixin, SDESchedulerOutput
from .twin import apply_recipe, sde_twin

__all__ = [
    "KERNELS",
    "CMSDEScheduler",
    "DDIMSDEScheduler",
    "DDPMSDEScheduler",
    "FlowMatchLCMSDEScheduler",
    "FlowMatchSDEScheduler",
    "Kernel",
    "LCMSDEScheduler",
    "SCMSDEScheduler",
    "SDESchedulerMixin",
    "SDESchedulerOutput",
    "SigmaSDEScheduler",
    "TCDSDEScheduler",
    "UnCLIPSDEScheduler",
    "WuerstchenSDEScheduler",
    "apply_recipe",
    "sde_twin",
]
