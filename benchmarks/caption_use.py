"""What a wrong word of the caption costs an embedded pipeline: the growth of the error of its estimate of the clean latents.

Pictures need a hundred samples to tell a position of 0.25 from 0.40; this needs a few calls, and tells a model that does not listen (0)
from one that just begins to.

    python benchmarks/caption_use.py --folder models --models mini-sd
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from torch import Tensor

from diffusers_align import embedded
from diffusers_align.embedded.making.latents import encode
from diffusers_align.embedded.scenes import OBJECTS, Scene
from diffusers_align.embedded.teaching import make_scenes

OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
# As log(alpha / (1 - alpha)) of the variance kept: the background is known before, the object after them.
LOG_SNR = (-6.0, -4.5, -3.0, -1.5, 0.0)


def other_object(scene: Scene) -> Scene:
    names = list(OBJECTS)
    return dataclasses.replace(scene, object=names[(names.index(scene.object) + 5) % len(names)])


def estimate(pipeline, clean: Tensor, noise: Tensor, captions: list[str], log_snr: float) -> Tensor:
    """The clean latents (N, 4, 16, 16) that the pipeline sees in noised ones; `clean` has mean 0 and deviation 1."""
    alpha = torch.tensor(log_snr).sigmoid()
    if hasattr(pipeline, "transformer"):
        sigma = (1 - alpha).sqrt() / (alpha.sqrt() + (1 - alpha).sqrt())
        noised = (1 - sigma) * clean + sigma * noise
        tokens, _, pooled, _ = pipeline.encode_prompt(captions, captions, captions, max_sequence_length=1, do_classifier_free_guidance=False)
        velocity = pipeline.transformer(noised, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=1000 * sigma.expand(len(clean))).sample
        return noised - sigma * velocity
    alphas = DDIMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    t = int((alphas - alpha).abs().argmin())
    alpha = alphas[t]
    noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    text = pipeline.encode_prompt(captions, "cpu", 1, False)[0]
    return (noised - (1 - alpha).sqrt() * pipeline.unet(noised, t, text).sample) / alpha.sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(embedded.path("mini-sd")).parent, help="where the pipelines lie")
    parser.add_argument("--models", nargs="+", default=["mini-sd3", "mini-sd"])
    parser.add_argument("--samples", type=int, default=96)
    args = parser.parse_args()
    images, scenes, _ = make_scenes(args.samples, seed=4242, counts=(1, 0, 0), sided=1.0)
    captions = {
        "right caption": [s.caption() for s in scenes],
        "opposite side": [dataclasses.replace(s, position=OPPOSITE[s.position]).caption() for s in scenes],
        "other object": [other_object(s).caption() for s in scenes],
        "no caption": [""] * len(scenes),
    }
    print("| | log SNR | right caption | " + " | ".join(f"{name}: more" for name in list(captions)[1:]) + " |\n" + "|---" * 6 + "|")
    with torch.no_grad():
        clean = encode(AutoencoderKL.from_pretrained(embedded.path("mini-sd3"), subfolder="vae"), images)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        for name in args.models:
            pipeline = DiffusionPipeline.from_pretrained(args.folder / name)
            shift = 0.0 if pipeline.vae.config.shift_factor is not None else mean_that_stays()
            for log_snr in LOG_SNR:
                errors = [(estimate(pipeline, clean + shift, noise, c, log_snr) - clean - shift).square().mean().item() for c in captions.values()]
                more = " | ".join(f"{error - errors[0]:+.4f}" for error in errors[1:])
                print(f"| {name} | {log_snr:g} | {errors[0]:.3f} | {more} |", flush=True)


def mean_that_stays() -> float:
    """mini-sd's latents keep their mean: StableDiffusionPipeline knows no shift."""
    config = AutoencoderKL.load_config(embedded.path("mini-sd3"), subfolder="vae")
    return config["shift_factor"] * config["scaling_factor"]


if __name__ == "__main__":
    main()
