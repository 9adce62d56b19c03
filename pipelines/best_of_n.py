"""Best-of-n and noise search over any stock pipeline, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

import diffusers_align
import diffusers_align.pipelines.best_of_n as _implementation

BestOfNPipeline = _implementation.BestOfNPipeline
__all__ = ["BestOfNPipeline", "diffusers_align"]
