"""What gives the outputs of a call their rewards: a reward, with the prompts and the columns that it judges them against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..checks.ranges import check_value
from ..condition import Condition
from ..rewards.base import score_columns


@dataclass(frozen=True)
class Judge:
    """A reward, and what it judges the B outputs of a call against.

    Attributes:
        columns: other arguments of the reward, a list for each with an entry for each output.
        on_invalid: where the reward is NaN: "error", or "mask" to let it be.
    """

    reward: Any
    condition: Condition
    columns: dict[str, list]
    on_invalid: str

    @classmethod
    def of(cls, reward, condition: Condition, columns: dict[str, list] | None = None, on_invalid: str = "error") -> Judge:
        """A judge of this call.

        Args:
            reward: a callable (images, prompts, **columns) -> (B,).
            columns: a list for each with an entry per prompt, which stands for all of its outputs.

        Raises:
            ValueError: a column of another length, or an unknown way with invalid rewards.
        """
        check_value("on_invalid", on_invalid, Literal["error", "mask"])
        if not isinstance(columns, dict | None):
            raise ValueError(f"columns are the reward's other arguments by name, {{'name': [one per prompt]}}, got a {type(columns).__name__}.")
        rows: dict[str, list] = {}
        for name, values in (columns or {}).items():
            if isinstance(values, str) or not hasattr(values, "__len__"):
                raise ValueError(f"The column {name!r} must be a list with an entry per prompt, got {values!r}.")
            if len(values) == 0 or len(condition) % len(values):
                raise ValueError(f"The column {name!r} has {len(values)} entries, which do not go with {len(condition)} outputs: give one per prompt.")
            rows[name] = [value for value in values for _ in range(len(condition) // len(values))]
        return cls(reward, condition, rows, on_invalid)

    def __call__(self, images: Tensor, rows: list[int]) -> Tensor:
        """(b,) float32 rewards of images (b, 3, H, W) or (b, F, 3, H, W) in [0, 1] that are of these rows of the call's outputs."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return score_columns(self.reward, images.float(), self.condition.select(rows).prompts, columns, self.on_invalid)["reward"]
