"""The frozen denoiser spread over the processes (FSDP2), for models that are too large for one device.

`torch.distributed.fsdp.fully_shard` keeps the module, and its class as a base class, so the pipeline sees the denoiser that it
knows. Every process holds a part of each frozen weight and gathers a block's weights for the time of its forward or backward
pass. The LoRA is added afterwards and stays whole on every process: it is about a hundredth of the weights, its gradients are
summed as they are without sharding, and its checkpoints do not depend on the number of processes.

A gather waits for all processes, so each must call the denoiser equally often, and in the same order: batches, their sizes and
the steps that are replayed may depend on the epoch, never on the process. Text encoders and autoencoders stay whole: how often
they run depends on each process's prompts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, MutableMapping

import torch
from torch import nn
from torch.utils import _pytree as pytree


def wanted(flag: bool, environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether to shard: `--shard_denoiser`, or accelerate was configured for FSDP2, which this module then does in its place.

    Call it before the `Accelerator` is made: accelerate's own FSDP2 is switched off in `environment`, because it prepares a model
    and its optimizer together, and the model here is a part of a pipeline.

    Raises:
        ValueError: accelerate was configured for DeepSpeed, Megatron-LM, FSDP1, FSDP's CPU offload or its own gradient
            accumulation. Each would change the gradient that the scripts sum and clip themselves.
    """
    on = {name for name in ("DEEPSPEED", "MEGATRON_LM", "FSDP") if environment.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"}
    refused = on - {"FSDP"}
    if "FSDP" in on and environment.get("FSDP_VERSION", "1") != "2":
        refused.add("FSDP version 1")
    if "FSDP" in on and environment.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        refused.add("FSDP with fsdp_offload_params")
    if refused:
        raise ValueError(
            f"accelerate is configured for {', '.join(sorted(refused))}, which these scripts do not support: they sum and clip the LoRA's gradients "
            "themselves. Launch with accelerate_configs/multi_gpu.yaml, and for a denoiser that does not fit on one device with "
            "accelerate_configs/fsdp2.yaml or --shard_denoiser."
        )
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise ValueError(
            "accelerate is configured for gradient accumulation and would scale every loss a second time. Remove it there and pass "
            "--gradient_accumulation_steps to the script."
        )
    if "FSDP" in on:
        environment["ACCELERATE_USE_FSDP"] = "false"
    return flag or "FSDP" in on


def blocks(module: nn.Module) -> list[nn.Module]:
    """What is gathered at a time, inner before outer: the children of outermost `ModuleList`s, and of nested ones those that are
    made of lists themselves (the transformer blocks of a UNet, but not the linear layers of a feed-forward)."""
    return list(dict.fromkeys(_blocks(module, nested=False)))


def _blocks(module: nn.Module, nested: bool) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for block in child.children():
                yield from _blocks(block, nested=True)
                if not isinstance(block, nn.ModuleList) and (not nested or any(isinstance(m, nn.ModuleList) for m in block.modules())):
                    yield block
        else:
            yield from _blocks(child, nested)


def _without_views(module: nn.Module, args, output):
    """FSDP gathers for the backward pass when the gradient reaches a block's output, which it would miss if a pipeline or a model
    edited, in place, an output that is a view."""
    return pytree.tree_map_only(torch.Tensor, lambda x: x.clone() if x.requires_grad and x._is_view() else x, output)


def shard(denoisers: Iterable[nn.Module], device: torch.device) -> None:
    """Freeze the denoisers and spread their weights over all processes, block by block, onto `device`.

    Call it before they are moved to the device, so that no device ever holds the whole, and before the LoRA is added, so that it
    stays whole.

    Raises:
        ValueError: there is one process.
        ImportError: torch is older than 2.6.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise ImportError(f"--shard_denoiser needs torch 2.6 or later for torch.distributed.fsdp.fully_shard; this is {torch.__version__}.") from error
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        raise ValueError("--shard_denoiser spreads the denoiser over processes, and there is one. Launch several, or leave the flag out.")
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in denoisers:
        module.requires_grad_(False)
        for part in (*blocks(module), module):
            part.register_forward_hook(_without_views)
            # The root too: a process that saves lets go of what it has gathered, and would then gather at another call than the others.
            fully_shard(part, mesh=mesh, reshard_after_forward=True)


def sum_over_processes(parameters: list[torch.nn.Parameter]) -> None:
    """All gradients, in one message; that of a parameter without one counts as 0."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(total)
    for parameter, part in zip(parameters, total.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)
