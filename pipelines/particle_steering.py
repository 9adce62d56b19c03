"""Particle steering over any stock pipeline, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

import diffusers_align
import diffusers_align.pipelines.particle_steering as _implementation

ParticleSteeringPipeline = _implementation.ParticleSteeringPipeline
__all__ = ["ParticleSteeringPipeline", "diffusers_align"]
