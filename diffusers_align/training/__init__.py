"""What the training scripts share, in rooms by what a script does.

`flags`: what may be asked of it. `run` and `checkpoints`: the run itself, and what outlives it. `online`, `offline`, `gradient`: learning from own samples
and a reward, from a data set, from a reward's gradient. `report`: what people read.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report.report import Report
    from .run.run import Run

__all__ = ["Report", "Run"]
# Imported when they are asked for: flags are read before torch is.
_HOMES = {"Report": ".report.report", "Run": ".run.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name], __name__), name)
    return value
