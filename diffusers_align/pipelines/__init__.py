"""Pipelines that align at inference."""
