"""The noise that a pipeline starts from, read or replaced: standard normal, whatever the pipeline makes of it.

Pipelines draw it in `prepare_latents`, by diffusers' `randn_tensor`, and scale, pack or add it to an image afterwards. Taken where it is
drawn it has unit variance on every solver, and what is put in its place goes the pipeline's own way, with its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .replacements import reads_global, replaced, with_globals


@contextmanager
def initial_noise(pipeline, put: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context: `put` gets the noise (B, *D) that a call of the pipeline draws first, and returns what it starts from.

    The draw itself is made as ever, so that later ones are what they were. Only this pipeline's `prepare_latents` sees the change: others of its
    module, in other threads, draw as they do.

    Raises:
        ValueError: the pipeline does not draw its noise in `prepare_latents`, found at once or, where `latents` were given, at the end.
    """
    code = getattr(getattr(pipeline, "prepare_latents", None), "__code__", None)
    if code is None or not reads_global(code, "randn_tensor"):
        raise ValueError(f"{type(pipeline).__name__} draws no initial noise in prepare_latents, so it cannot be replaced.")
    seen: list[bool] = []

    def prepared(prepare: Callable, *args: Any, **kwargs: Any):
        draw = prepare.__globals__["randn_tensor"]

        def drawn(*args: Any, **kwargs: Any) -> Tensor:
            noise = draw(*args, **kwargs)
            seen.append(True)
            return put(noise) if len(seen) == 1 else noise

        return with_globals(prepare, randn_tensor=drawn)(*args, **kwargs)

    with replaced(pipeline, "prepare_latents", prepared):
        yield
    if not seen:
        raise ValueError(f"{type(pipeline).__name__} drew no initial noise: leave `latents` out of its call.")


@contextmanager
def prepared_latents(pipeline, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context: `change` gets the latents (B, *D) that a call of the pipeline starts from, the first thing that its `prepare_latents` returns, and
    gives those in their place. Of a pipeline that has no such method nothing is changed."""
    if not hasattr(pipeline, "prepare_latents"):
        yield
        return

    def prepared(prepare: Callable, *args: Any, **kwargs: Any):
        leaves, spec = pytree.tree_flatten(prepare(*args, **kwargs))
        return pytree.tree_unflatten([change(leaves[0]), *leaves[1:]], spec)

    with replaced(pipeline, "prepare_latents", prepared):
        yield
