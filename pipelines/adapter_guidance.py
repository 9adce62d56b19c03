"""Mix any stock pipeline with and without its LoRA: `DiffusionPipeline.from_pretrained(..., custom_pipeline="adapter_guidance.py", trust_remote_code=True)`."""

import diffusers_align
import diffusers_align.pipelines.adapter_guidance as _implementation

AdapterGuidancePipeline = _implementation.AdapterGuidancePipeline
__all__ = ["AdapterGuidancePipeline", "diffusers_align"]
