"""The noise that a pipeline starts from, read or replaced: standard normal, whatever the pipeline makes of it.

Pipelines draw it in `prepare_latents`, by diffusers' `randn_tensor`, and scale, pack or add it to an image afterwards. Taken where it is
drawn it has unit variance on every solver, and what is put in its place goes the pipeline's own way, with its graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def initial_noise(pipeline, put: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context: `put` gets the noise (B, *D) that a call of the pipeline draws first, and returns what it starts from.

    The draw itself is made as ever, so that later ones are what they were.

    Raises:
        ValueError: the pipeline does not draw its noise in `prepare_latents`, found at once or, where `latents` were given, at the end.
    """
    prepare = getattr(pipeline, "prepare_latents", None)
    names = getattr(inspect.unwrap(prepare), "__globals__", {}) if prepare is not None else {}
    if "randn_tensor" not in names:
        raise ValueError(f"{type(pipeline).__name__} draws no initial noise in prepare_latents, so it cannot be replaced.")
    draw, seen = names["randn_tensor"], []

    def drawn(*args, **kwargs):
        noise = draw(*args, **kwargs)
        seen.append(True)
        return put(noise) if len(seen) == 1 else noise

    def prepared(*args, **kwargs):
        names["randn_tensor"] = drawn
        try:
            return prepare(*args, **kwargs)
        finally:
            names["randn_tensor"] = draw

    pipeline.__dict__["prepare_latents"] = prepared
    try:
        yield
    finally:
        del pipeline.__dict__["prepare_latents"]
    if not seen:
        raise ValueError(f"{type(pipeline).__name__} drew no initial noise: leave `latents` out of its call.")
