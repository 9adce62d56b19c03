"""What a pipeline's tail overwrites of what it has decoded (normals that it brings to unit length), kept for gradients.

`x /= x.norm()` overwrites what the norm's gradient needs, which autograd refuses on the way back. Behind the autoencoder, operations keep copies, so that
what is overwritten afterwards does not matter. The tensors there are a few pictures, and the gradient is one of first order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .replacements import replaced


@contextmanager
def tail_may_edit(pipeline) -> Iterator[None]:
    """Context: what follows the autoencoder's decodings may change tensors in place, whatever gradients need of them."""
    vae = getattr(pipeline, "vae", None)
    if not hasattr(vae, "decode"):
        yield
        return
    with ExitStack() as behind:

        def decode(original, *args: Any, **kwargs: Any):
            behind.close()
            output = original(*args, **kwargs)
            behind.enter_context(saved_tensors_hooks(_copy, lambda kept: kept))
            return output

        with replaced(vae, "decode", decode):
            yield


def _copy(x: Tensor) -> Tensor:
    return x if x.is_leaf else x.detach().clone()
