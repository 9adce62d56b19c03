"""What pipelines return in another form than they are asked for, in the form that is needed.

Some have no latents to return, and are asked for pictures. Some bring pictures to [0, 1] only on the way to arrays, of which they make PIL images: their
tensors are as the autoencoder, or a denoiser of pixels, made them, or arrays. Those are asked for arrays, and the tensors are handed out that the arrays
were made of, with their graph.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .parts import parts_of
from .replacements import has_constant, reads_global, signature_of, source_of


def form_asked(pipeline, wanted: str | None) -> tuple[dict[str, str | None], bool]:
    """The argument by which a pipeline's call is to be asked for a form of its output ({}: it has none), and whether the arrays that it returns then are to
    be made tensors.

    Args:
        wanted: "latent", for which pipelines that return none decode; "pt"; or what a user asked for, which stands.
    """
    if "output_type" not in signature_of(type(pipeline).__call__).parameters:
        return {}, wanted in ("latent", "pt")
    asked = "pt" if wanted == "latent" and not returns_latents(pipeline) else wanted
    arrays = asked == "pt" and makes_arrays(pipeline)
    return {"output_type": "np" if arrays else asked}, arrays


def returns_latents(pipeline) -> bool:
    """Whether a pipeline's call returns latents for `output_type="latent"`: it looks for that, leaves nothing unassigned then that it returns, and hands
    them to no processor of pictures that fails on it."""
    call = inspect.unwrap(type(pipeline).__call__)
    source = source_of(call)
    if source is None:
        return has_constant(call.__code__, "latent")
    return "latent" in _compared(source) and not _forgets_latents(source) and not _refuses(pipeline, "latent")


def makes_arrays(pipeline) -> bool:
    """Whether a pipeline, or one that it calls, makes arrays of its pictures itself, in the place of an image processor, or by one that makes no tensors;
    or has pictures in [0, 1] as arrays alone, since it takes "pt" for "latent"."""
    if any(isinstance(names, tuple) and set(names) == {"latent", "pt"} for names in _code(pipeline).co_consts) and getattr(pipeline, "vae", None) is None:
        return True
    return any(_makes_arrays(own) for own in (pipeline, *parts_of(pipeline)))


def _makes_arrays(pipeline) -> bool:
    code, decode = _code(pipeline), getattr(type(pipeline), "decode_latents", None)
    by_decoding = decode is not None and reads_global(code, "decode_latents") and reads_global(inspect.unwrap(decode).__code__, "numpy")
    itself = (by_decoding or reads_global(code, "numpy_to_pil")) and not any(reads_global(code, name) for name in ("postprocess", "postprocess_video"))
    return itself or _refuses(pipeline, "pt")


def _refuses(pipeline, output_type: str) -> bool:
    """Whether the pipeline's processor of pictures gets all that is made, and has no branch for `output_type`: others look for each that they know."""
    processor = type(getattr(pipeline, "image_processor", None))
    source = source_of(processor.postprocess) if hasattr(processor, "postprocess") and reads_global(_code(pipeline), "postprocess") else None
    return source is not None and output_type not in _compared(source, equal=True)


def _code(pipeline) -> CodeType:
    return inspect.unwrap(type(pipeline).__call__).__code__


@cache
def _compared(tree: ast.AST, equal: bool = False) -> set[str]:
    """The constants that a function compares its `output_type` with; with `equal`, one by one alone, not those of a list of what is known."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "output_type":
            if not equal or isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
                found |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    return found


@cache
def _forgets_latents(tree: ast.AST) -> bool:
    """Whether a call assigns what it reads at its end in the branch of pictures alone, so that it fails for latents once all is done."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.If) or not node.orelse or not {"output_type", "latent"} <= {*_words(node.test)}:
            continue
        if any(isinstance(part, ast.Return) for part in ast.walk(node)):
            continue
        one, other = ({name.id for part in branch for name in _stored(part)} for branch in (node.body, node.orelse))
        elsewhere = {name.id for name in _stored(tree) if not node.lineno <= name.lineno <= node.end_lineno}
        read = {name.id for name in names if isinstance(name.ctx, ast.Load) and name.lineno > node.end_lineno}
        if (one ^ other) & read - elsewhere:
            return True
    return False


def _stored(tree: ast.AST) -> Iterator[ast.Name]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


def _words(tree: ast.AST) -> Iterator[Any]:
    """The names and constants in an expression."""
    return (node.id if isinstance(node, ast.Name) else node.value for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Constant)))


@contextmanager
def arrays_as_tensors(device: torch.device) -> Iterator[Callable[[Any], Any]]:
    """Context: what it gives turns a call's output, of which the first entry is an array (B, [F,] H, W, C) or (B, C, T), into one with a tensor
    (B, [F,] C, H, W) or (B, C, T) there on the device, with its graph."""
    with _Kept() as mode:
        yield lambda output: _with_tensor(output, mode.kept, device)


def _with_tensor(output: Any, kept: list[Tensor], device: torch.device) -> Any:
    array = output[0]
    if not isinstance(array, np.ndarray) or array.ndim < 3:
        return output
    # Some hand out a part of their array: three channels of more, as many values of a sound as were asked for.
    part = tuple(map(slice, array.shape))
    own = next((x[part] for x in reversed(kept) if x.ndim == array.ndim and np.array_equal(_array(x)[part], array)), None)
    if own is None and torch.is_grad_enabled():
        raise ValueError("The pipeline changes its pictures once they are arrays, where no gradient follows; call it under torch.no_grad().")
    found = (torch.from_numpy(array) if own is None else own).to(device)
    first = found.movedim(-1, -3) if array.ndim > 3 else found  # sounds have their channels there
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
