"""What `--compile` is worth on this machine's CPU, and what it costs first: eager and compiled in turns in one process.

    python benchmarks/compiled.py --repeats 5

A batch of Flow-GRPO's epoch: a roll-out of six steps, then a replay of two of them with the reference's kernels and a backward pass. mini-sd3, and the
random denoiser of `overhead.py`. Seconds of process time, medians; `first` is the first compiled batch, compilation included (its compiler's own processes
too). The ratio's error is the largest |exp(log p of the replay - log p of the roll-out) - 1|, compiled; the samples' that of compiled against eager, of
the largest value.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).parent))
from overhead import PROMPTS, large

from diffusers_align import Policy, embedded
from diffusers_align.training.run.kernels import compile_denoiser

SEEDS = list(range(len(PROMPTS)))


def seconds() -> float:
    """Of this process and of those that it has waited for, on the CPU."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def batch(policy: Policy) -> tuple[torch.Tensor, float]:
    """The final latents (B, *D), and the error of the ratios."""
    trajectory, errors = policy.rollout(PROMPTS, seeds=SEEDS), []

    def look(k, kernel):
        log_ratio = kernel.log_prob(trajectory.actions[:, k]) - trajectory.log_probs[:, k]
        errors.append(float((log_ratio.detach().exp() - 1).abs().max()))
        (log_ratio.exp() * weights).mean().backward()

    weights = torch.linspace(-1, 1, len(PROMPTS))
    with policy.reference():
        policy.transitions(trajectory, [0, 1])
    policy.replay(trajectory, look, [0, 1])
    return trajectory.final, max(errors)


def measure(name: str, pipeline, repeats: int, backend: str) -> str:
    policy = Policy(pipeline, num_inference_steps=6, guidance_scale=1.0, max_sequence_length=1)
    torch.manual_seed(0)
    for parameter in policy.add_lora(rank=16):
        parameter.data += 0.01 * torch.randn_like(parameter)
    (module,) = policy.denoisers.values()
    eager = module.forward
    compile_denoiser(module, backend)
    forwards, times, made = {"eager": eager, "compiled": module.forward}, {"eager": [], "compiled": []}, {}
    for _ in range(repeats + 1):
        for kind, forward in forwards.items():
            module.forward = forward
            start = seconds()
            made[kind] = batch(policy)
            times[kind].append(seconds() - start)
    (own, _), (compiled, error) = made["eager"], made["compiled"]
    apart = float((compiled - own).abs().max() / own.abs().max())
    plain, fast = (statistics.median(times[kind][1:]) for kind in ("eager", "compiled"))
    return f"| {name} | {plain:.2f} | {fast:.2f} | {plain / fast:.2f} | {times['compiled'][0]:.0f} | {error:.1g} | {apart:.1g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", default="inductor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| denoiser | eager, s | compiled, s | eager / compiled | first, s | error of the ratio | of the samples |")
    print("|---|---|---|---|---|---|---|", flush=True)
    print(measure("mini-sd3", DiffusionPipeline.from_pretrained(embedded.path("mini-sd3")), args.repeats, args.backend), flush=True)
    print(measure("random weights, large", large(), args.repeats, args.backend), flush=True)


if __name__ == "__main__":
    main()
