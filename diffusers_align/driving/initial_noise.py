"""The noise that a pipeline starts from, read or replaced: standard normal, whatever the pipeline makes of it.

Pipelines draw it by diffusers' `randn_tensor`, in `prepare_latents` or in a block, and scale, pack or add it to an image afterwards. Taken where it
is drawn it has unit variance on every solver, and what is put in its place goes the pipeline's own way, with its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from .calls import calls_of


def initial_noise(pipeline, put: Callable[[Tensor], Tensor]) -> AbstractContextManager:
    """Context: `put` gets the noise (B, *D) that a call of the pipeline draws first, and returns what it starts from.

    The draw itself is made as ever, so that later ones are what they were. Only this pipeline sees the change: others of its
    module, in other threads, draw as they do.

    Raises:
        ValueError: the pipeline does not draw its noise where it is looked for, found at once or, where `latents` were given, at the end.
    """
    return calls_of(pipeline).initial_noise(put)


def prepared_latents(pipeline, change: Callable[[Tensor], Tensor]) -> AbstractContextManager:
    """Context: `change` gets the latents (B, *D) that a call of the pipeline starts from, and gives those in their place. Of a classic pipeline
    they are the first thing that its `prepare_latents` returns; where it has no such method nothing is changed."""
    return calls_of(pipeline).prepared_latents(change)
