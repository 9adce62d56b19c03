"""A pipeline with tiny components, and how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """How a pipeline is built and called, with two samples.

    Attributes:
        build: makes the pipeline; the same weights each time.
        call: arguments of each of its calls that all samples share: small sizes, few steps, guidance on where the family has it.
        per_sample: arguments of which each sample has its own: lists of two (pictures, masks) or tensors of two rows, as `Policy.condition` takes them.
        prompts: None where the pipeline takes no prompts.
        one_sample: the stock call takes one sample at a time.
        variant: of a class that has several cases (Wan 2.1 and 2.2): added to the name in tables.
        remark: what a reader of the table should know, such as why a scheduler is not the published one.
    """

    build: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    per_sample: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, str] | None = ("a cat", "a large red dog")
    one_sample: bool = False
    variant: str = ""
    remark: str = ""
