"""OmniGen: text and noise in one sequence of a language model."""

from __future__ import annotations

from ..case import Case

CASES: dict[str, list[Case]] = {}

ABSENT: dict[str, str] = {"OmniGenPipeline": "diffusers defines its processor of pictures, which every pipeline makes, only beside torchvision"}
