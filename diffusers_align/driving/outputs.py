"""What older pipelines return in another form than they are asked for, in the form that is needed.

Some have no latents to return, and are asked for pictures. Some bring pictures to [0, 1] only on the way to arrays, of which they make PIL images: their
tensors are as the autoencoder, or a denoiser of pixels, made them, or arrays. Those are asked for arrays, and the tensors are handed out that the arrays
were made of, with their graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .parts import parts_of
from .replacements import has_constant, reads_global


def returns_latents(pipeline) -> bool:
    """Whether a pipeline's call knows `output_type="latent"`: those that do not name it refuse it when all is done, or return something else."""
    return has_constant(_code(pipeline), "latent")


def makes_arrays(pipeline) -> bool:
    """Whether a pipeline, or one that it calls, makes arrays of its pictures itself, in the place of an image processor; or has pictures in [0, 1] as arrays
    alone, since it takes "pt" for "latent"."""
    if any(isinstance(names, tuple) and set(names) == {"latent", "pt"} for names in _code(pipeline).co_consts) and getattr(pipeline, "vae", None) is None:
        return True
    return any(_makes_arrays(own) for own in (pipeline, *parts_of(pipeline)))


def _makes_arrays(pipeline) -> bool:
    code, decode = _code(pipeline), getattr(type(pipeline), "decode_latents", None)
    by_decoding = decode is not None and reads_global(code, "decode_latents") and reads_global(inspect.unwrap(decode).__code__, "numpy")
    return (by_decoding or reads_global(code, "numpy_to_pil")) and not any(reads_global(code, name) for name in ("postprocess", "postprocess_video"))


def _code(pipeline) -> CodeType:
    return inspect.unwrap(type(pipeline).__call__).__code__


@contextmanager
def arrays_as_tensors(device: torch.device) -> Iterator[Callable[[Any], Any]]:
    """Context: what it gives turns a call's output, of which the first entry is an array (B, [F,] H, W, C), into one with a tensor (B, [F,] C, H, W) there
    on the device, with its graph."""
    with _Kept() as mode:
        yield lambda output: _with_tensor(output, mode.kept, device)


def _with_tensor(output: Any, kept: list[Tensor], device: torch.device) -> Any:
    array = output[0]
    if not isinstance(array, np.ndarray) or array.ndim < 4:
        return output
    own = next((x for x in reversed(kept) if x.shape == array.shape and np.array_equal(_array(x), array)), None)
    if own is None and torch.is_grad_enabled():
        raise ValueError("The pipeline changes its pictures once they are arrays, where no gradient follows; call it under torch.no_grad().")
    first = (torch.from_numpy(array) if own is None else own).movedim(-1, -3).to(device)
    if isinstance(output, tuple):
        return (first, *output[1:])
    output[next(iter(output))] = first
    return output


def _array(x: Tensor) -> np.ndarray:
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()


class _Kept(TorchFunctionMode):
    """Mode: a tensor whose array is taken is kept; neither its graph nor a precision that arrays lack is an obstacle."""

    def __init__(self):
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.numpy:
            self.kept.append(args[0])
            return _array(args[0])
        return function(*args, **(kwargs or {}))
