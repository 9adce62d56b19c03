"""What gives the outputs of a call their rewards: a reward, with the prompts and the columns that it judges them against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..checks.ranges import check_value
from ..condition import Condition
from ..driving.outcome import Outcome, sampling_rate_of
from ..rewards.base import score_columns


@dataclass(frozen=True)
class Judge:
    """A reward, and what it judges the B outputs of a call against.

    Attributes:
        columns: other arguments of the reward, a list for each with an entry for each output.
        on_invalid: where the reward is NaN: "error", or "mask" to let it be.
        pipeline: that makes what is judged, for the sampling rate of its sound.
    """

    reward: Any
    condition: Condition
    columns: dict[str, list]
    on_invalid: str
    pipeline: Any = None

    @classmethod
    def of(cls, reward, condition: Condition, columns: dict[str, list] | None = None, on_invalid: str = "error", pipeline: Any = None) -> Judge:
        """A judge of this call of the pipeline.

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
            if not _goes_with(len(values), condition):
                raise ValueError(f"The column {name!r} has {len(values)} entries, which do not go with {len(condition)} outputs: give one per prompt.")
            rows[name] = [value for value in values for _ in range(len(condition) // len(values))]
        return cls(reward, condition, rows, on_invalid, pipeline)

    def __call__(self, made: Tensor | Outcome, rows: list[int]) -> Tensor:
        """(b,) float32 rewards of images (b, 3, H, W) or (b, F, 3, H, W) in [0, 1], or sounds (b, C, T), that are of these rows of the call's
        outputs. Rewards hear the sound of videos in an outcome."""
        if isinstance(made, Tensor):
            made = Outcome(made, sampling_rate=sampling_rate_of(self.pipeline) if made.ndim == 3 and self.pipeline is not None else None)
        columns = made.beside({name: [values[i] for i in rows] for name, values in self.columns.items()})
        return score_columns(self.reward, made.images.float(), self.condition.select(rows).prompts, columns, self.on_invalid)["reward"]


def _goes_with(number: int, condition: Condition) -> bool:
    """Whether so many entries are one per output, or one per prompt whose outputs stand side by side."""
    if number == 0 or len(condition) % number:
        return False
    copies, prompts = len(condition) // number, condition.prompts
    return all(prompts[i] == prompts[i - i % copies] for i in range(len(prompts)))
