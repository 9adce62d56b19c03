"""Reward gradients through sampling: their memory, and every image method on the embedded models for the same minutes of training.

    python benchmarks/reward_gradients.py memory
    python benchmarks/reward_gradients.py methods --minutes 2 --output_dir runs/reward_gradients

Memory: what autograd keeps, and the peak above what the process had, of a roll-out of eight pictures with its backward pass, against
the number of steps with gradient. Methods: mini-clip's score is trained on, or the background's colour; the scene classifier, another
network, is the judge. Each recipe has that much processor time on one thread, then one table of `evaluate.py` and one picture of
learning curves a model and reward. Flow-GRPO (DDPO on mini-sd) and Adjoint Matching learn from the same reward for comparison.
SRPO is left out: it needs words of style, which mini-clip has never seen.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from equal_time import Recipe, checkpoints, curves, evaluate, train

from diffusers_align import Policy, embedded
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.rewards import load_reward

# Training prompts, held-out prompts, and the checkpoint of the reward's model
TASKS = {"clip_score": ("mini_train", "mini_heldout", "mini-clip"), "background_color": ("likes_blue_train", "likes_blue_heldout", None)}
CALLS = {"mini-sd3": {"max_sequence_length": 1}, "mini-sd": {}}
SDE = {"mini-sd3": ["--sde_type", "flow_grpo", "--noise_level", "0.7"], "mini-sd": ["--eta", "1.0"]}
NUM_STEPS, BATCH = 8, 8
METHODS = {
    "DRaFT-1": ("train_draft", "draft_mini_sd3", ["--truncation", "1"]),
    "DRaFT-3": ("train_draft", "draft_mini_sd3", []),
    "DRaFT": ("train_draft", "draft_mini_sd3", ["--method", "draft"]),
    "DRaFT-LV": ("train_draft", "draft_mini_sd3", ["--method", "draft_lv"]),
    "DRTune": ("train_draft", "draft_mini_sd3", ["--method", "drtune", "--num_trained_steps", "3", "--skip_last_steps", "2"]),
    "ReFL": ("train_refl", "refl_mini_sd3", []),
    "AlignProp": ("train_alignprop", "alignprop_mini_sd", []),
}


def runs(base: str, reward: str) -> dict[str, Recipe]:
    """Every method on one of the models, and what they are compared with."""
    prompts, held_out, model = TASKS[reward]
    task = ["--prompts", prompts, "--eval_prompts", held_out, "--reward", reward, "--reward_model", model or ""]
    task += ["--pretrained_model_name_or_path", base, "--call_kwargs", json.dumps(CALLS[base])]
    methods = dict(METHODS)
    if base == "mini-sd3":
        methods["Flow-GRPO"] = ("train_flow_grpo", "flow_grpo_mini_sd3", ["--kl_weight", "0"])
    else:
        methods["DDPO"] = ("train_ddpo", "ddpo_mini_sd", [])
    methods["Adjoint Matching"] = ("train_adjoint_matching", f"adjoint_matching_{base.replace('-', '_')}", ["--num_prompts_per_epoch", "48"])
    return {name: (base, script, recipe, [*task, *flags]) for name, (script, recipe, flags) in methods.items()}


# --- memory --------------------------------------------------------------------------------------------------------------


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


# --- methods -------------------------------------------------------------------------------------------------------------


def compare(base: str, reward: str, args: argparse.Namespace) -> None:
    recipes, output = runs(base, reward), args.output_dir / f"{base}-{reward}"
    folders = {name: output / name for name in recipes if not args.only or name in args.only}
    for name, folder in folders.items():
        train(recipes[name], folder, args.minutes)
        print(f"{base}, {reward}, {name}: {checkpoints(folder)[-1].name}", flush=True)
    curves(folders, "reward", output / "curves.png", f"{reward} of training samples, {base}")
    _, prompts, model = TASKS[reward]
    task = ["--prompts", prompts, "--reward", reward, "scene_score", "--reward_model", model or "default", "default", "--guidance_scale", "1"]
    task += ["--call_kwargs", json.dumps(CALLS[base]), *SDE[base], "--num_samples", str(args.num_samples)]
    evaluate(base, folders, output / "evaluation", task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "methods"])
    parser.add_argument("--models", nargs="+", choices=list(CALLS), default=list(CALLS))
    parser.add_argument("--rewards", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of each method")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reward_gradients"))
    parser.add_argument("--only", nargs="+", help="some of the methods")
    parser.add_argument("--num_samples", type=int, default=96, help="images of each model in the evaluation")
    args = parser.parse_args()
    for base in args.models:
        if args.what == "memory":
            memory(base)
        for reward in args.rewards if args.what == "methods" else []:
            compare(base, reward, args)


if __name__ == "__main__":
    main()
