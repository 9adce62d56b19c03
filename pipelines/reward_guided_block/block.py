"""Reward guidance as a block of a modular pipeline, for `ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True)`."""

import diffusers_align
import diffusers_align.pipelines.modular_blocks as _implementation

RewardGuidedStep = _implementation.RewardGuidedStep
__all__ = ["RewardGuidedStep", "diffusers_align"]
