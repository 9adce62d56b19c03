"""The classical toolbox of policy gradients: pure functions on tensors. Imports torch only."""

from .advantages import PromptStatistics, batch_advantages, group_advantages
from .diagnostics import ratio_diagnostics
from .importance import clipped_surrogate, describe_clip, importance_ratio, true_ratio_bound

__all__ = [
    "PromptStatistics",
    "batch_advantages",
    "clipped_surrogate",
    "describe_clip",
    "group_advantages",
    "importance_ratio",
    "ratio_diagnostics",
    "true_ratio_bound",
]
