"""What the policy costs beside the stock pipeline and the bare denoiser, measured side by side in one process.

    python benchmarks/overhead.py --repeats 7

Compares `Policy.rollout` with the stock pipeline's call on the same scheduler, and `Policy.transition` forward and backward
with the bare denoiser's on the same inputs: for a denoiser of about 200 ms a call (random weights) and for the mini models.
Pairs are measured in turns; the figures are medians.
"""

import argparse
import statistics
import time

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel

from diffusers_align import Policy, embedded

PROMPTS = ["a fox on a red background"] * 8


def large(width: int = 448, layers: int = 8) -> DiffusionPipeline:
    """mini-sd3 with a denoiser of some 200 ms a call."""
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    config = dict(pipeline.transformer.config) | {"num_layers": layers, "num_attention_heads": width // 32, "caption_projection_dim": width}
    pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config))
    return pipeline


def in_turns(repeats: int, **functions) -> dict[str, float]:
    """Median seconds of each function, called in turns."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, pipeline, repeats: int, **call) -> None:
    policy = Policy(pipeline, num_inference_steps=6, guidance_scale=1.0, **call)
    policy.add_lora(rank=16)
    seeds = list(range(len(PROMPTS)))
    trajectory = policy.rollout(PROMPTS, seeds=seeds)
    denoiser, inputs = next(iter(policy.denoisers.values())), {}
    handle = denoiser.register_forward_pre_hook(lambda m, args, kwargs: inputs.update(args=args, kwargs=kwargs), with_kwargs=True)
    policy.transition(trajectory, 2)
    handle.remove()

    def stock():
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipeline(PROMPTS, generator=generators, output_type="latent", num_inference_steps=6, guidance_scale=1.0, **call)

    def transition():
        policy.transition(trajectory, 2).log_prob(trajectory.actions[:, 2]).sum().backward()

    def bare():
        out = denoiser(*inputs["args"], **inputs["kwargs"])
        (out[0] if isinstance(out, tuple) else out.sample).square().sum().backward()

    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        call_ms = 1000 * in_turns(repeats, call=lambda: denoiser(*inputs["args"], **inputs["kwargs"]))["call"]
    t = in_turns(repeats, rollout=lambda: policy.rollout(PROMPTS, seeds=seeds), stock=stock, transition=transition, bare=bare)
    rollout, step = t["rollout"] / t["stock"], t["transition"] / t["bare"]
    print(
        f"| {name} | {call_ms:.0f} | {rollout:.3f} | {1000 * (t['rollout'] - t['stock']):+.1f} | {step:.3f} | {1000 * (t['transition'] - t['bare']):+.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| denoiser | forward, ms | rollout / stock call | difference, ms | transition / bare, forward and backward | difference, ms |")
    print("|---|---|---|---|---|---|")
    mini = {"mini-sd3": {"max_sequence_length": 1}, "mini-sd": {}}
    for name, call in mini.items():
        measure(name, DiffusionPipeline.from_pretrained(embedded.path(name)), args.repeats, **call)
    measure("random, 200 ms", large(), args.repeats, max_sequence_length=1)


if __name__ == "__main__":
    main()
