"""Calls whose activations are computed again on the way back, as they were the first time.

That second run comes when the pipeline's call has ended, and with it what the pipeline changed for its time: attention processors of a guidance,
switches of a fuser. And a denoiser may use up the lists that it is given (residuals of a control net).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..driving.denoiser_gates import Given
from ..driving.replacements import held

# What pipelines set on parts of their denoisers for the time of a call.
_SET_BY_PIPELINES = ("processor", "enabled")


def without_activations(call: Callable[[], Any]) -> Any:
    """`call()` without its activations; with gradients, it runs again when one comes back, to its end: a model that keeps something inside for the time of
    a call (an autoencoder's features of the frame before) forgets it there, and would go on with it in the next call."""
    with set_checkpoint_early_stop(False):
        return checkpoint(call, use_reentrant=False)


def recomputed(forward: Callable, *args: Any, **kwargs: Any):
    """`forward(*args, **kwargs)` of a denoiser without its activations; with gradients, it runs again when one comes back. Not where it is handed a cache of
    keys and values, say: pipelines empty those at their end."""
    if Given(args, kwargs).objects:
        return forward(*args, **kwargs)
    settings: list[tuple[nn.Module, str, Any]] = []
    first = [True]

    def call():
        own_args, own_kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))
        if first[0]:
            first[0] = False
            settings.extend(_settings(forward))
            return forward(*own_args, **own_kwargs)
        with _set(settings):
            return forward(*own_args, **own_kwargs)

    return without_activations(call)


def _settings(forward: Callable) -> list[tuple[nn.Module, str, Any]]:
    while not isinstance(getattr(forward, "__self__", None), nn.Module):
        if not hasattr(forward, "__wrapped__"):
            return []
        forward = forward.__wrapped__
    return [(part, name, part.__dict__[name]) for part in forward.__self__.modules() for name in _SET_BY_PIPELINES if name in part.__dict__]


@contextmanager
def _set(settings: list[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Context: what was set then is set again."""
    with ExitStack() as stack:
        for part, name, value in settings:
            if part.__dict__.get(name) is not value:
                stack.enter_context(held(part, name, value))
        yield
