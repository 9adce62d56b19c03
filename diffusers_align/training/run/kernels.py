"""`--gradient_checkpointing`, `--attention_backend` and `--compile`: how a denoiser is computed, the same way wherever it is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...checks.given_names import did_you_mean
from ...driving.module_tree import modules_of
from ...driving.replacements import InPlace


def set_up(args, name: str, module: nn.Module) -> None:
    """A denoiser, with its LoRA, as the flags ask for it.

    Raises:
        ValueError: what `use_attention` raises.
    """
    if args.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    if args.attention_backend:
        use_attention(name, module, args.attention_backend)
    if args.compile:
        compile_denoiser(module)


def compile_denoiser(module: nn.Module, backend: str = "inductor") -> None:
    """`torch.compile` of a denoiser with its LoRA, in place, so that names and files stay as they are: block by block where its class says which blocks it
    repeats (`compile_repeated_blocks`, which takes a fraction of the time), otherwise whole. Copies are not compiled.

    Calls without gradients run the graph of those with gradients, and drop what it keeps. A compiler fuses, and in half precision rounds, otherwise where
    nothing is kept: replays would not have the log-probabilities that their steps were drawn with. So a roll-out holds a call's activations, as the
    update does anyway.
    """
    forward = module.forward
    try:
        module.compile_repeated_blocks(backend=backend)
    except (AttributeError, ValueError):  # a class that names no blocks
        forward = torch.compile(forward, backend=backend)
    module.forward = InPlace(partial(_with_its_graph, forward), module.forward)


def _with_its_graph(forward: Callable, original: Callable, *args: Any, **kwargs: Any):
    if torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with torch.enable_grad():
        output = forward(*args, **kwargs)
    return pytree.tree_map_only(Tensor, Tensor.detach, output)


def use_attention(name: str, module: nn.Module, backend: str) -> None:
    """`set_attention_backend` of a denoiser, when a small attention on its device has shown that the kernels run there and have a gradient. diffusers keeps
    the choice for all models of the process.

    Args:
        name: of the component, for messages.

    Raises:
        ValueError: diffusers has no such back end, it does not run here or has no gradient, or the model's attention goes by none.
    """
    known = [known.value for known in attention_dispatch.AttentionBackendName]
    if backend not in known:
        raise ValueError(f"--attention_backend {backend}: diffusers has {', '.join(known)}.{did_you_mean(backend, known)}")
    if not any(hasattr(getattr(part, "processor", None), "_attention_backend") for part in modules_of(module)):
        raise ValueError(
            f"--attention_backend {backend}: the attention of the {name} ({type(module).__name__}) goes by none of diffusers' back ends, but by torch's "
            "own scaled_dot_product_attention, or by processors of its own: leave the flag out."
        )
    try:
        module.set_attention_backend(backend)
        query = torch.randn(1, 128, 2, 64, device=module.device, dtype=module.dtype, requires_grad=True)
        gradient = attention_dispatch.dispatch_attention_fn(query, query, query, backend=attention_dispatch.AttentionBackendName(backend)).requires_grad
    except Exception as error:
        raise ValueError(
            f"--attention_backend {backend} does not run here, on {module.device} in {str(module.dtype).removeprefix('torch.')}: {error} Others are "
            f"{', '.join(other for other in known if other != backend)}."
        ) from error
    if not gradient:
        raise ValueError(f"--attention_backend {backend} has no gradient, so nothing before an attention would be trained: use native, flash or xformers.")
