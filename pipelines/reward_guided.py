"""Guide any stock pipeline by a reward's gradient: `DiffusionPipeline.from_pretrained(..., custom_pipeline="reward_guided.py", trust_remote_code=True)`."""

import diffusers_align
import diffusers_align.pipelines.reward_guided as _implementation

RewardGuidedPipeline = _implementation.RewardGuidedPipeline
__all__ = ["RewardGuidedPipeline", "diffusers_align"]
