"""What the scripts learn from: prompts, and preference data of five kinds."""

from .batches import balanced_batch_of, batch_of
from .cache import TensorCache, key_of
from .images import LazyImage
from .prompts import Prompt, load_prompts, prompts_of_epoch
from .read import Report, load_preferences
from .records import KINDS
from .schemas import parse_column_map

__all__ = [
    "KINDS",
    "LazyImage",
    "Prompt",
    "Report",
    "TensorCache",
    "balanced_batch_of",
    "batch_of",
    "key_of",
    "load_preferences",
    "load_prompts",
    "parse_column_map",
    "prompts_of_epoch",
]
