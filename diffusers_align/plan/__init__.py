"""What will a run take? Memory, denoiser rows and operations, computed from configs without weights, network or GPU.

`diffusers-align plan --config RECIPE --gpu 24GB` prints it; `plan` returns it, and `report` puts it into words.
"""

from .command import plan
from .planner import Plan
from .report import report

__all__ = ["Plan", "plan", "report"]
