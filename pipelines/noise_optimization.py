"""Optimise any stock pipeline's noise: `DiffusionPipeline.from_pretrained(..., custom_pipeline="noise_optimization.py", trust_remote_code=True)`."""

import diffusers_align
import diffusers_align.pipelines.noise_optimization as _implementation

NoiseOptimizationPipeline = _implementation.NoiseOptimizationPipeline
__all__ = ["NoiseOptimizationPipeline", "diffusers_align"]
