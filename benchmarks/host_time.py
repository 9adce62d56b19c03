"""Time that is neither denoiser nor autoencoder: what the host does around them, at the module trees of real models.

    python -m benchmarks.host_time --repeats 15

The pipelines have the depth of the real ones, so that their trees have as many modules, at a width of 8 to 32. The denoiser is free: it returns its input
times a number that a LoRA's parameter is part of. Figures are milliseconds of process time, medians of calls made in turns; the stock call of as many
steps stands beside them, and `bare` is one call of the free denoiser, forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

from diffusers_align import Policy
from tests.families.cases.flux import flux
from tests.families.cases.stable_diffusion_3 import DENOISER, stable_diffusion_3
from tests.families.cases.wan import wan
from tests.families.parts import CLIP_WIDTH, STABLE_DIFFUSION_BETAS, TEXT_WIDTH, clip_tokenizer, image_vae, seeded, t5_tokenizer, unet, xl_scheduler, xl_unet
from tests.families.video_parts import wan_transformer

STEPS = 10
SMALL = {"height": 32, "width": 32, "num_inference_steps": STEPS, "guidance_scale": 1.0}
VAE = {"levels": 4}


def clip(layers: int, suffix: str = "", projected: bool = False) -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=1, hidden_size=CLIP_WIDTH,
        intermediate_size=16, num_attention_heads=2, num_hidden_layers=layers, projection_dim=CLIP_WIDTH,
    )  # fmt: skip
    model = seeded(transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel, config)
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": model}


def t5(suffix: str = "") -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_heads=4, num_layers=24, dropout_rate=0.0)
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": seeded(transformers.T5EncoderModel, config)}


def sd15():
    across, levels = "CrossAttn{}Block2D", (8, 8, 16, 16)
    denoiser = unet(
        block_out_channels=levels, layers_per_block=2, down_block_types=(*[across.format("Down")] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *[across.format("Up")] * 3),
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(unet=denoiser, vae=image_vae(**VAE), scheduler=scheduler, **clip(12), **absent)


def sdxl():
    denoiser = xl_unet(
        block_out_channels=(8, 16, 16), layers_per_block=2, transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(unet=denoiser, vae=image_vae(**VAE), scheduler=xl_scheduler(), **clip(12), **clip(32, "_2", projected=True))


def sd35():
    denoiser = seeded(diffusers.SD3Transformer2DModel, **{**DENOISER, "num_layers": 24, "dual_attention_layers": tuple(range(13))})
    pipeline = stable_diffusion_3()
    pipeline.register_modules(transformer=denoiser, vae=image_vae(**VAE), **clip(12, projected=True), **clip(32, "_2", projected=True), **t5("_3"))
    return pipeline


def flux_dev():
    pipeline = flux(num_layers=19, num_single_layers=38)
    pipeline.register_modules(**clip(12), **t5("_2"))
    return pipeline


def wan_small():
    return wan(transformer=wan_transformer(num_layers=30), **t5())


SHORT = {"max_sequence_length": 32}
MODELS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "SD 1.5": (sd15, SMALL),
    "SDXL": (sdxl, SMALL),
    "SD3.5 medium": (sd35, {**SMALL, **SHORT}),
    "FLUX.1 dev": (flux_dev, {**SMALL, **SHORT}),
    "Wan 2.1 1.3B": (wan_small, {**SMALL, **SHORT, "num_frames": 5}),
}


def make_free(module: torch.nn.Module) -> None:
    """Its forward returns the latents that it is given, with a graph to a LoRA's parameter."""
    parameter = next(p for p in module.parameters() if p.requires_grad)

    def forward(*args: Any, **kwargs: Any):
        latents = args[0] if args else kwargs["hidden_states"]
        return (latents * (0.5 + parameter.flatten()[0]),)

    module.forward = forward


def in_turns(repeats: int, functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of process time of each function, called in turns after a first round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if repeat:
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def functions(policy: Policy) -> dict[str, Callable[[], Any]]:
    """What is timed, of two samples."""
    prompts, seeds = ["a fox", "a lemon"], [0, 1]
    condition = policy.condition(prompts, seeds=seeds)
    trajectory = policy.rollout(prompts, seeds=seeds)
    latents, times = trajectory.final, policy.scheduler.timesteps[:1].repeat(2)
    denoiser = next(iter(policy.denoisers.values()))

    @torch.no_grad()
    def stock():
        policy.pipeline(prompts, generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="latent", **policy.call_kwargs)

    def reference():
        with policy.reference():
            pass

    @torch.no_grad()
    def predict_without_gradient():
        policy.predict(latents, times, condition)

    return {
        "stock call": stock,
        "rollout": lambda: policy.rollout(prompts, seeds=seeds),
        "replay": lambda: policy.replay(trajectory, lambda k, step: step.log_prob(trajectory.actions[:, k]).sum().backward()),
        "transition": lambda: policy.transition(trajectory, 2).log_prob(trajectory.actions[:, 2]).sum().backward(),
        "predict": lambda: policy.predict(latents, times, condition).sum().backward(),
        "predict, no grad": predict_without_gradient,
        "reference()": reference,
        "bare": lambda: denoiser(latents)[0].sum().backward() if latents.ndim else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", action="append", choices=MODELS, help="this one alone; may be repeated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = ["stock call", "rollout", "replay", "transition", "predict", "predict, no grad", "reference()", "bare"]
    print(
        f"| modules with LoRA | {' | '.join(f'{name}, ms' for name in names)} |\n|---|{'---|' * (len(names) + 1)}".replace("| modules", "| model | modules", 1)
    )
    for name in args.model or MODELS:
        build, call = MODELS[name]
        torch.manual_seed(0)
        pipeline = build()
        pipeline.set_progress_bar_config(disable=True)
        policy = Policy(pipeline, **call)
        policy.add_lora(rank=4)
        for denoiser in policy.denoisers.values():
            make_free(denoiser)
        modules = sum(len(list(c.modules())) for c in pipeline.components.values() if isinstance(c, torch.nn.Module))
        found = in_turns(args.repeats, functions(policy))
        print(f"| {name} | {modules:,} | " + " | ".join(f"{found[column]:.1f}" for column in names) + " |", flush=True)


if __name__ == "__main__":
    main()
