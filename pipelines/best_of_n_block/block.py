"""Best-of-n as a block of a modular pipeline, for `ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True)`."""

import diffusers_align
import diffusers_align.pipelines.modular_blocks as _implementation

BestOfNStep = _implementation.BestOfNStep
__all__ = ["BestOfNStep", "diffusers_align"]
