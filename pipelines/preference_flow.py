"""Carry images to preferred ones: `DiffusionPipeline.from_pretrained(folder, custom_pipeline="preference_flow.py", trust_remote_code=True)`."""

import diffusers_align
import diffusers_align.pipelines.preference_flow as _implementation

PreferenceFlowPipeline = _implementation.PreferenceFlowPipeline
__all__ = ["PreferenceFlowPipeline", "diffusers_align"]
