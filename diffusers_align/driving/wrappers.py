"""What is wrapped around a denoiser leaves no trace in names and files: `torch.compile`, FSDP, activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Attributes under which wrappers keep what they wrap: of torch.compile, of FSDP, of activation checkpointing.
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers; itself if there are none."""
    while True:
        if isinstance(module, _PARALLEL):
            module = module.module
        elif inner := next((name for name in _INNER if name in module._modules), None):
            module = module._modules[inner]
        else:
            return module


@contextmanager
def bare(module: nn.Module) -> Iterator[nn.Module]:
    """Context: the module inside its wrappers, with no wrapper around any of its parts either; those are back afterwards.

    What is changed within, such as layers that get an adapter, stays: wrappers hold the very module.
    """
    inside, taken_off = unwrapped(module), []
    for parent in list(inside.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and unwrapped(child) is not child:
                taken_off.append((parent, name, child))
    for parent, name, child in taken_off:
        parent._modules[name] = unwrapped(child)
    try:
        yield inside
    finally:
        for parent, name, child in taken_off:
            parent._modules[name] = child
