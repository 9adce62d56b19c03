"""Value steering over any stock pipeline, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

import diffusers_align
import diffusers_align.pipelines.value_steering as _implementation

ValueSteeringPipeline = _implementation.ValueSteeringPipeline
__all__ = ["ValueSteeringPipeline", "diffusers_align"]
