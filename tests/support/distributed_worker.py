"""What `test_sharding.py` launches on two processes: python -m torch.distributed.run ... distributed_worker.py '{"name": {...}}' TASK OUT

Runs training scripts one after the other, and compares sharded with whole pipelines of several families. Each process leaves
`rank-<i>.json` in OUT with what it saw.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from script_runs import train
from tiny_pipelines import FAMILIES
from torch.distributed.tensor import DTensor

from diffusers_align import Policy
from diffusers_align.training.run import sharding
from diffusers_align.training.run.run import Run

# A UNet whose loop takes one time per batch, a large one, and transformers of several makes.
SHARDED = ("sd15_img2img", "sdxl", "flux_true_cfg", "lumina2", "qwen_image", "wan")
PROMPTS = ["a cat", "a large red dog"]


def placement(policy: Policy) -> dict:
    """Of the first denoiser: its classes, how much of its frozen weights this process holds, the types of what is trained."""
    module = next(iter(policy.denoisers.values()))
    frozen = [p for p in module.parameters() if not p.requires_grad]
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in frozen)
    return {
        "classes": [cls.__name__ for cls in type(module).__mro__[:3]],
        "share": held / sum(p.numel() for p in frozen),
        "trained": sorted({type(p).__name__ for p in policy.trainable_parameters()}),
    }


def replayed(policy: Policy, trajectory) -> torch.Tensor:
    """The gradient of the LoRA, from a replay of two steps."""
    steps = trajectory.stochastic.nonzero().flatten().tolist()[:2]
    policy.replay(trajectory, lambda k, transition: (transition.log_prob(trajectory.actions[:, k]).sum() * 1e-3).backward(), steps)
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.trainable_parameters()])


def made(family, sharded: bool) -> Policy:
    pipeline = copy.deepcopy(family.build())
    policy = Policy(pipeline, **family.call)
    policy.lockstep = sharded
    if sharded:
        sharding.shard(policy.denoisers.values(), torch.device("cpu"))
    policy.add_lora(4)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trainable_parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return policy


def compared(name: str) -> dict:
    """The largest differences between a sharded and a whole pipeline."""
    rank, results = torch.distributed.get_rank(), []
    for sharded in (False, True):
        policy = made(FAMILIES[name], sharded)
        trajectory = policy.rollout(PROMPTS, seeds=[10 * rank, 10 * rank + 1])
        # Different times on one process, equal ones on the other.
        times = trajectory.timesteps[[1, 2]] if rank else trajectory.timesteps[[1, 1]]
        with torch.no_grad():
            predicted = policy.predict(trajectory.states[:, 1], times, trajectory.condition)
        results.append((trajectory.final, predicted, replayed(policy, trajectory)))
    (final, predicted, whole), (sharded_final, sharded_predicted, parts) = results
    return {
        "final": float((final - sharded_final).abs().max()),
        "predicted": float((predicted - sharded_predicted).abs().max()),
        "gradient": float((whole - parts).norm() / whole.norm()),
        "share": placement(policy)["share"],
        "own_times": policy._prediction._own_times,
    }


def main() -> None:
    jobs, task, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    seen, load_policy = {}, Run.load_policy
    Accelerator.end_training = lambda self: None  # it would end the process group, which the next run needs

    for name, job in jobs.items():

        def load_and_look(run, **fields):
            policy = load_policy(run, **fields)
            seen[name] = placement(policy)
            return policy

        Run.load_policy = load_and_look
        os.environ.update(job.get("environment", {}))
        train(job["script"], out / job["out"], task, **job["flags"])
    seen["families"] = {name: compared(name) for name in SHARDED}
    seen["processes"] = torch.distributed.get_world_size()
    (out / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
