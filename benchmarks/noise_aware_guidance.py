"""How well the noise-aware judges (classifier, CLIP) read noised latents, and how far their guidance carries the embedded models.

    python benchmarks/noise_aware_guidance.py

Prints accuracy against noise level on fresh scenes; then, for each model, what the scene classifier (which knows nothing of the guidance) gives to
what is asked for, with standard errors: by the classifier towards one attribute, which the prompt need not name, and by CLIP towards the prompt.
"""

from __future__ import annotations

import argparse
import random

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from diffusers_align import embedded
from diffusers_align.data import load_prompts
from diffusers_align.embedded.noisy_classifier import CLASSES, NoisySceneClassifier
from diffusers_align.embedded.noisy_clip import NoisyCLIPScore
from diffusers_align.embedded.teaching import make_scenes
from diffusers_align.pipelines.reward_guided import RewardGuidedPipeline
from diffusers_align.rewards import load_reward

LEVELS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
TASKS = {"object": ("a fox", "a fox"), "color": ("a fox", "a fox on a blue background")}
CHOICES = 100  # captions that CLIP chooses among


@torch.no_grad()
def accuracy(classifier: NoisySceneClassifier, clip: NoisyCLIPScore, number: int) -> None:
    """Prints a row for each noise level sigma of flow matching."""
    vae = AutoencoderKL.from_pretrained(embedded.path("mini-sd3"), subfolder="vae")
    images, scenes, _ = make_scenes(number, seed=777)
    z = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(250)])
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    truth = {name: torch.tensor([classes.index(getattr(scene, name)) for scene in scenes]) for name, classes in CLASSES.items()}
    captions = [scene.caption() for scene in scenes]
    texts, objects = dict(zip(captions, clip.text_tower(captions))), clip.text_tower([f"a {name}" for name in CLASSES["object"]])
    for s in LEVELS:
        sigma = torch.full((number,), s)
        state = ((1 - s) * z + s * torch.randn_like(z), 1 - sigma, sigma)
        logits, seen = classifier(*state), clip.image_tower(*state)
        right = {name: (logits[name].argmax(1) == truth[name]).float().mean() for name in CLASSES}
        right |= {"CLIP, caption": retrieval(seen, texts, captions), "CLIP, object": ((seen @ objects.T).argmax(1) == truth["object"]).float().mean()}
        print(f"sigma {s}: " + ", ".join(f"{name} {share:.2f}" for name, share in right.items()), flush=True)


def retrieval(seen: Tensor, texts: dict[str, Tensor], captions: list[str]) -> Tensor:
    """The share of images (embeddings `seen`) whose own caption comes first among `CHOICES` different ones."""
    rng, hits = random.Random(0), []
    for image, own in zip(seen, captions):
        choices = [own, *rng.sample([caption for caption in texts if caption != own], CHOICES - 1)]
        hits.append((torch.stack([texts[caption] for caption in choices]) @ image).argmax() == 0)
    return torch.stack(hits).float().mean()


class Guided:
    """An embedded model under noise-aware guidance, without classifier-free guidance, judged by the scene classifier."""

    def __init__(self, model: str, steps: int):
        self.model, self.judge = model, load_reward("scene_score")
        self.pipe = RewardGuidedPipeline(DiffusionPipeline.from_pretrained(embedded.path(model)))
        self.pipe.set_progress_bar_config(disable=True)
        self.call = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "pt"}
        self.call |= {"max_sequence_length": 1} if model == "mini-sd3" else {}

    def show(self, what: str, prompts: list[str], wanted: list[str], attributes: tuple[str, ...], scales: list[float], **guidance) -> None:
        """Prints a row for each strength."""
        for scale in scales:
            found = []
            for start in range(0, len(prompts), 16):
                rows = slice(start, min(start + 16, len(prompts)))
                generators = [torch.Generator().manual_seed(i) for i in range(rows.start, rows.stop)]
                images = self.pipe(prompts[rows], reward_scale=scale, generator=generators, **guidance, **self.call).images
                scores = self.judge(images, wanted[rows])
                found.append(torch.stack([scores[name] for name in attributes], 1))
            columns = [column[column.isfinite()] for column in torch.cat(found).unbind(1)]
            cells = (f"{name} {p.mean():.3f} +- {p.std() / len(p) ** 0.5:.3f}" for name, p in zip(attributes, columns))
            print(f"{self.model}, {what}, scale {scale:.3g}: {', '.join(cells)}", flush=True)


def guide_by_classifier(guided: Guided, classifier: NoisySceneClassifier, args: argparse.Namespace) -> None:
    """Prints a row for each task and strength."""
    for attribute, (prompt, wanted) in TASKS.items():

        def log_prob(latents, prompts, alpha, sigma, wanted=wanted, attribute=attribute):
            return classifier.log_prob(latents, [wanted] * len(prompts), alpha, sigma, (attribute,))

        what, number = f"classifier to {wanted!r}", args.samples
        guided.show(what, [prompt] * number, [wanted] * number, (attribute,), args.scales, preset="classifier", reward=log_prob)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="of classifier guidance")
    parser.add_argument("--samples_per_prompt", type=int, default=2, help="of CLIP guidance, for each prompt of `mini_heldout`")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 3.0], help="strengths of classifier guidance")
    parser.add_argument("--clip_scales", type=float, nargs="+", default=[0.0, 1 / 3, 1.0], help="strengths of CLIP guidance, in units of GLIDE's s = 3")
    parser.add_argument("--judges", nargs="+", choices=["classifier", "clip"], default=["classifier", "clip"])
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    classifier, clip = NoisySceneClassifier.from_pretrained(embedded.path("noisy-classifier")).eval(), NoisyCLIPScore()
    accuracy(classifier, clip, 1000)
    prompts = [prompt.text for prompt in load_prompts("mini_heldout") for _ in range(args.samples_per_prompt)]
    for model in ("mini-sd", "mini-sd3"):
        guided = Guided(model, args.steps)
        if "classifier" in args.judges:
            guide_by_classifier(guided, classifier, args)
        if "clip" in args.judges:
            guided.show("CLIP to the prompt", prompts, prompts, ("object", "reward"), args.clip_scales, preset="glide_clip", reward=clip)


if __name__ == "__main__":
    main()
