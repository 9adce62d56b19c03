"""Memory of reward gradients: what autograd keeps, and the peak above what the process had, of a roll-out of eight pictures with its backward pass,
against the number of steps with gradient, with and without recomputed steps and decoder.

    python benchmarks/gradient_memory.py
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_align import Policy, embedded
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.rewards import load_reward

CALLS = {"mini-sd3": {"max_sequence_length": 1}, "mini-sd": {}}
NUM_STEPS, BATCH = 8, 8


def status_mib(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_mib(work: Callable[[], object]) -> float:
    """The peak resident memory of `work` above the start, in a process of its own: freed memory of earlier work cannot hide it."""
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        before = status_mib("VmRSS")
        work()
        os.write(send, f"{status_mib('VmHWM') - before}".encode())
        os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    with os.fdopen(receive) as pipe:
        return float(pipe.read())


def saved_mib(work: Callable[[], object]) -> float:
    """What autograd keeps of `work` for the way back, each tensor once; checkpoints keep their inputs elsewhere."""
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = work()
    del result
    return sum(saved.values()) / 2**20


def memory(base: str) -> None:
    policy = Policy(DiffusionPipeline.from_pretrained(embedded.path(base)), num_inference_steps=NUM_STEPS, guidance_scale=1.0, **CALLS[base])
    policy.add_lora(rank=16)
    reward, prompts = load_reward("clip_score", model=embedded.path("mini-clip")), ["a fox on a red background"] * BATCH
    condition = policy.condition(prompts, seeds=list(range(BATCH)))

    def loss(number: int, checkpoint: bool) -> torch.Tensor:
        steps = range(NUM_STEPS - number, NUM_STEPS)
        rollout = differentiable_rollout(policy, condition, grad_steps=steps, checkpoint=checkpoint, decode_checkpoint=checkpoint)
        return -reward(rollout.images, prompts).sum()

    loss(1, True).backward()
    # Each tensor in a mapping of its own (M_MMAP_THRESHOLD), given back when it is freed: peaks without the heap's fragments.
    ctypes.CDLL(None).mallopt(-3, 2**16)
    print(f"\n{base}, {BATCH} pictures, {NUM_STEPS} steps; MiB\n")
    print("| steps with gradient | kept | kept, checkpointed | peak | peak, checkpointed |\n|---|---|---|---|---|")
    for number in (1, 2, 4, 8):
        kept = [saved_mib(lambda: loss(number, checkpoint)) for checkpoint in (False, True)]
        peaks = [peak_mib(lambda: loss(number, checkpoint).backward()) for checkpoint in (False, True)]
        print(f"| {number} | " + " | ".join(f"{value:.0f}" for value in kept + peaks) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CALLS), default=list(CALLS))
    for base in parser.parse_args().models:
        memory(base)


if __name__ == "__main__":
    main()
