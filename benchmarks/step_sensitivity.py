"""Which solver steps a policy-gradient update is about: how far one step of Adam moves each step's log-probability.

    python benchmarks/step_sensitivity.py

On an embedded model with a new LoRA: samples by the SDE twin, one score-function gradient of `background_color`, one step of Adam, and the same samples
replayed. For each solver step with noise: the noise's standard deviation, the move of the mean with the model's output over it, the norm of that step's part of
the gradient, and the mean |log p - log p_old| a dimension of the latents, which is what `--clip_range` bounds. A second round leaves the last step out
(`sde_window`). Prints the table for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import product

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_align import Policy, Trajectory, embedded, sde_twin
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.data import load_prompts
from diffusers_align.rewards import load_reward
from diffusers_align.rl import batch_advantages
from diffusers_align.rl.trust_region import flat_gradient
from diffusers_align.training.online.ruling_steps import sensitivities

CALL = {"mini-sd3": {"max_sequence_length": 1}, "mini-sd": {}}


@dataclass(frozen=True)
class StepRow:
    """Of a solver step: its noise, J / s, its part of the gradient, and its move per dimension, a mean over samples."""

    k: int
    timestep: float
    std: float
    sensitivity: float
    gradient: float
    move: float


def sampled(policy: Policy, number: int) -> tuple[Trajectory, Tensor]:
    """A sample of each of so many prompts, and their advantages (N,)."""
    prompts = load_prompts("likes_blue_train")[:number]
    texts, columns = [p.text for p in prompts], {"background": [p.columns.get("background") for p in prompts]}
    trajectory = policy.rollout(texts, seeds=list(range(number)))
    rewards = load_reward("background_color")(policy.decode(trajectory.final, trajectory.condition).float(), texts, **columns)
    return trajectory, batch_advantages(rewards)


def part_of_step(policy: Policy, trajectory: Trajectory, k: int, advantages: Tensor, parameters: list[Tensor]) -> tuple[Tensor, float]:
    """Step k's gradient (P,) of the score-function loss, and the standard deviation of its noise."""
    found = {}

    def on_step(k, transition):
        loss = reinforce_loss(transition.log_prob(trajectory.actions[:, k]), advantages, per_dim=trajectory.final[0].numel())
        found[k] = flat_gradient(loss.mean(), parameters), float(transition.std.max())

    policy.replay(trajectory, on_step, [k])
    return found[k]


def moves(policy: Policy, trajectory: Trajectory) -> dict[int, float]:
    """Mean |log p - log p_old| a dimension by solver step."""
    found = {}

    def on_step(k, transition):
        found[k] = float((transition.log_prob(trajectory.actions[:, k]) - trajectory.log_probs[:, k]).abs().mean() / trajectory.final[0].numel())

    with torch.no_grad():
        policy.replay(trajectory, on_step, trajectory.noisy_steps)
    return found


def measure(model: str, steps: int, number: int, learning_rate: float, window: tuple[int, int] | None) -> list[StepRow]:
    """A row a solver step with noise."""
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(embedded.path(model))
    pipeline.set_progress_bar_config(disable=True)
    policy = Policy(pipeline, sde_twin(pipeline.scheduler, sde_window=window), num_inference_steps=steps, guidance_scale=1.0, **CALL[model])
    parameters = list(policy.add_lora(rank=16, alpha=32))
    trajectory, advantages = sampled(policy, number)
    parts = {k: part_of_step(policy, trajectory, k, advantages, parameters) for k in trajectory.noisy_steps}
    total, optimizer = sum(part for part, _ in parts.values()), torch.optim.AdamW(parameters, learning_rate, weight_decay=0)
    for parameter, gradient in zip(parameters, total.split([p.numel() for p in parameters])):
        parameter.grad = gradient.view_as(parameter).clone()
    optimizer.step()
    moved, answers = moves(policy, trajectory), sensitivities(policy.scheduler, trajectory, trajectory.noisy_steps)
    return [StepRow(k, float(trajectory.timesteps[k]), std, answers[k], float(part.norm()), moved[k]) for k, (part, std) in parts.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted(CALL), choices=sorted(CALL))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3])
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    print(f"| model | rate | step | timestep | std | J / std | gradient | moved | moved, no noise in step {args.steps - 1} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model, rate in product(args.models, args.learning_rates):
        rows, without = (measure(model, args.steps, args.samples, rate, window) for window in (None, (0, args.steps - 1)))
        moved = {row.k: f"{row.move:.1e}" for row in without}
        for row in rows:
            cells = f"{row.std:.3f} | {row.sensitivity:.1f} | {row.gradient:.4f} | {row.move:.1e} | {moved.get(row.k, '')}"
            print(f"| {model} | {rate:g} | {row.k} | {row.timestep:.0f} | {cells} |", flush=True)
    print(f"{time.process_time() - start:.0f} s of one thread")


if __name__ == "__main__":
    main()
