"""How well the noise-aware classifier reads noised latents, and how far its guidance carries the embedded models.

    python benchmarks/classifier_guidance.py --samples 64

Prints accuracy against noise level on fresh scenes, then, for each model, what the scene classifier (which knows nothing of the guidance) gives to the
attribute asked for, before and after, with standard errors.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from diffusers_align import embedded
from diffusers_align.embedded.noisy_classifier import CLASSES, NoisySceneClassifier
from diffusers_align.embedded.teaching import make_scenes
from diffusers_align.pipelines.reward_guided import RewardGuidedPipeline
from diffusers_align.rewards import load_reward

TASKS = {"object": ("a fox", "a fox"), "color": ("a fox", "a fox on a blue background")}


@torch.no_grad()
def accuracy(classifier: NoisySceneClassifier, number: int) -> None:
    """Prints a row for each noise level sigma of flow matching."""
    vae = AutoencoderKL.from_pretrained(embedded.path("mini-sd3"), subfolder="vae")
    images, scenes, _ = make_scenes(number, seed=777)
    z = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(250)])
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    for s in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
        sigma = torch.full((number,), s)
        logits = classifier((1 - s) * z + s * torch.randn_like(z), 1 - sigma, sigma)
        truth = {name: torch.tensor([classes.index(getattr(scene, name)) for scene in scenes]) for name, classes in CLASSES.items()}
        print(f"sigma {s}: " + ", ".join(f"{name} {(logits[name].argmax(1) == truth[name]).float().mean():.2f}" for name in CLASSES), flush=True)


def guidance(model: str, classifier: NoisySceneClassifier, number: int, scales: list[float], steps: int) -> None:
    """Prints a row for each task and strength."""
    pipe = RewardGuidedPipeline(DiffusionPipeline.from_pretrained(embedded.path(model)))
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "pt"} | ({"max_sequence_length": 1} if model == "mini-sd3" else {})
    for attribute, (prompt, wanted) in TASKS.items():

        def log_prob(latents, prompts, alpha, sigma):
            return classifier.log_prob(latents, [wanted] * len(prompts), alpha, sigma, (attribute,))

        for scale in scales:
            found = []
            for start in range(0, number, 16):
                generators = [torch.Generator().manual_seed(i) for i in range(start, min(number, start + 16))]
                output = pipe([prompt] * len(generators), preset="classifier", reward=log_prob, reward_scale=scale, generator=generators, **call)
                found.append(load_reward("scene_score")(output.images, [wanted] * len(generators))[attribute])
            p = torch.cat(found)
            print(f"{model}, p({attribute}), scale {scale:g}: {p.mean():.3f} +- {p.std() / len(p) ** 0.5:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 3.0])
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    classifier = NoisySceneClassifier.from_pretrained(embedded.path("noisy-classifier")).eval()
    accuracy(classifier, 1000)
    for model in ("mini-sd", "mini-sd3"):
        guidance(model, classifier, args.samples, args.scales, args.steps)


if __name__ == "__main__":
    main()
