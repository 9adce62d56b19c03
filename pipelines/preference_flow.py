"""Carry images to preferred ones: `DiffusionPipeline.from_pretrained(folder, custom_pipeline="preference_flow.py", trust_remote_code=True)`."""

import diffusers_align  # noqa: F401  diffusers looks for what a custom pipeline needs: its hint should name the package
import diffusers_align.pipelines.preference_flow as implementation

# The class itself, not a subclass: diffusers takes the one pipeline class that it finds in this file.
PreferenceFlowPipeline = implementation.PreferenceFlowPipeline
