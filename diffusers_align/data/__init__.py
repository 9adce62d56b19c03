"""What the scripts learn from: prompts."""

from .prompts import Prompt, load_prompts, prompts_of_epoch

__all__ = ["Prompt", "load_prompts", "prompts_of_epoch"]
