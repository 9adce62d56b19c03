"""How good the embedded models are: what both classifiers read in real scenes and in samples, and how samples vary.

`scene_score` is what trainings are rewarded by; `scene_judge` took no part in anything. Ceilings: real scenes, the same through the
autoencoder, and the best of eight samples by `scene_score`, which only the column of the judge shows without favour.

    python benchmarks/embedded_models.py --picture samples.png --sheet sheet.png
    python benchmarks/embedded_models.py --folder models --samples 192 --models mini-sd3 --guidance 3
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from diffusers_align import embedded
from diffusers_align.data import load_prompts
from diffusers_align.embedded.scenes import COLORS, OBJECTS, Scene, render
from diffusers_align.embedded.teaching import make_scenes
from diffusers_align.rewards import load_reward
from diffusers_align.training.report.pictures import grid

CALL = {"mini-sd3": {"max_sequence_length": 1}, "mini-sd": {}}
JUDGES = ("scene_judge", "scene_score")
COLUMNS = {"object": "object", "color": "colour", "count": "count", "position": "position", "correct": "all right"}
SHOWN = [
    "a fox", "a fox on a blue background", "a lemon on a black background", "two cars on a white background", "a rocket on a purple background",
    "a panda on the left on a green background", "a house", "three strawberries on a white background",
]  # fmt: skip


class Samples:
    """Images of a folder's pipeline, with seeds that depend on the sample alone."""

    def __init__(self, folder: Path, name: str):
        self.pipeline, self.call = DiffusionPipeline.from_pretrained(folder / name), CALL[name]
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, prompts: list[str], guidance: float, first_seed: int = 0) -> Tensor:
        images = []
        for start in range(0, len(prompts), 32):
            part = prompts[start : start + 32]
            generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
            call = {"num_inference_steps": 20, "guidance_scale": guidance, "output_type": "pt"} | self.call
            images.append(self.pipeline(part, generator=generators, **call)[0])
        return torch.cat(images)

    def best_of(self, number: int, prompts: list[str], guidance: float) -> Tensor:
        """Of so many samples of each prompt the one that `scene_score` likes best."""
        candidates = torch.stack([self(prompts, guidance, 10000 * n) for n in range(1, number + 1)])
        rewards = torch.stack([load_reward("scene_score")(images, prompts)["reward"] for images in candidates])
        return candidates[rewards.argmax(0), torch.arange(len(prompts))]


def row(title: str, judge: str, images: Tensor, prompts: list[str]) -> str:
    scores = load_reward(judge)(images, prompts)
    means = {name: values[~values.isnan()].mean().item() for name, values in scores.items()}
    clip = load_reward("clip_score", model=embedded.path("mini-clip"))(images, prompts).mean().item()
    return f"| {title} | {judge} | " + " | ".join(f"{means[name]:.2f}" for name in COLUMNS) + f" | {clip:.2f} |"


def show(title: str, images: Tensor, prompts: list[str]) -> None:
    for judge in JUDGES:
        print(row(title, judge, images, prompts), flush=True)


def calibration(title: str, judge: str, images: Tensor, truth: list[Scene]) -> str:
    """Accuracy of a classifier, and the probability that it gives to its own answer on average: equal if it is calibrated."""
    predicted = load_reward(judge).classifier(images)
    right = {
        "object": torch.tensor([list(OBJECTS).index(s.object) for s in truth]),
        "color": torch.tensor([list(COLORS).index(s.color) for s in truth]),
        "count": torch.tensor([s.count - 1 for s in truth]),
    }
    read = {name: predicted[name].softmax(1).max(1) for name in right}
    cells = (f"{(read[name].indices == label).float().mean():.3f} ({read[name].values.mean():.3f})" for name, label in right.items())
    return f"| {title} | {judge} | " + " | ".join(cells) + " |"


def diversity(images: Tensor) -> float:
    """Mean pixel distance (root mean square) between samples of one prompt."""
    flat = images.flatten(1)
    return float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5)


def contact_sheet(models: dict[str, Samples], across: int = 8) -> Image.Image:
    """All objects: a real scene of each, and below it a sample of each model for its bare name, at guidance 3."""
    rng, names = random.Random(7), list(OBJECTS)
    scenes = [Scene(name, 1, rng.choice(list(COLORS)), None) for name in names]
    rows = {"real": list(VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy([render(scene, rng) for scene in scenes])))}
    rows |= {model: list(sample([scene.caption() for scene in scenes], 3.0, 500)) for model, sample in models.items()}
    images, captions = [], []
    for start in range(0, len(names), across):
        for title, found in rows.items():
            images += found[start : start + across]
            captions += [f"{name}, {title}" for name in names[start : start + across]]
    return grid(images, captions, columns=across, cell=96)


def judge_the_judges(vae: AutoencoderKL, number: int = 1000) -> None:
    images, truth, _ = make_scenes(number, seed=99)
    images = images.float() / 255
    decoded = (vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)
    print(f"\nAccuracy on {number} fresh scenes (mean probability of the own answer)\n| scenes | by | object | colour | count |\n|---|---|---|---|---|")
    for judge in JUDGES:
        print(calibration("real", judge, images, truth))
        print(calibration("through the autoencoder", judge, decoded, truth))
    print(f"\nAutoencoder: PSNR {-10 * torch.log10((decoded - images).square().mean()):.1f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--folder", type=Path, default=Path(embedded.path("mini-sd")).parent, help="where the pipelines lie")
    parser.add_argument("--models", nargs="+", choices=CALL, default=list(CALL))
    parser.add_argument("--guidance", nargs="+", type=float, default=[3.0, 1.0])
    parser.add_argument("--best_of", type=int, default=0, help="a row for the best of so many samples of each prompt, at the first guidance")
    parser.add_argument("--no_ceilings", action="store_true", help="leave out real scenes and the judges' own accuracy")
    parser.add_argument("--picture", help="write a grid of samples here")
    parser.add_argument("--sheet", help="write all objects here, real ones above each model's")
    args = parser.parse_args()
    prompts = [p.text for name in ("mini_train", "mini_heldout") for p in load_prompts(name)]
    prompts = (prompts * (args.samples // len(prompts) + 1))[: args.samples]
    models = {name: Samples(args.folder, name) for name in args.models}
    print("| images | by | " + " | ".join(COLUMNS.values()) + " | mini-clip |\n" + "|---" * 8 + "|")
    with torch.no_grad():
        images, truth, _ = make_scenes(args.samples, seed=12345)
        if not args.no_ceilings:
            show("real scenes", images.float() / 255, [s.caption() for s in truth])
        for name, sample in models.items():
            for guidance in args.guidance:
                show(f"{name}, guidance {guidance:g}", sample(prompts, guidance), prompts)
            if args.best_of:
                show(f"{name}, guidance {args.guidance[0]:g}, best of {args.best_of}", sample.best_of(args.best_of, prompts, args.guidance[0]), prompts)
        real = torch.stack([x for x, s in zip(images, truth) if s.object == "fox"]).float() / 255
        distances = ", ".join(f"{name} {diversity(sample(['a fox'] * 16, 3.0)):.3f}" for name, sample in models.items())
        print(f"\nDistance between samples of 'a fox': real {diversity(real):.3f}, {distances}", flush=True)
        if not args.no_ceilings:
            judge_the_judges(next(iter(models.values())).pipeline.vae)
        if args.picture:
            shown = [p for p in SHOWN for _ in range(4)]
            pictures = [x for sample in models.values() for x in sample(shown, 3.0)]
            grid(pictures, [f"{p}" for p in shown] * len(models), columns=8, cell=96).save(args.picture)
        if args.sheet:
            contact_sheet(models).save(args.sheet)


if __name__ == "__main__":
    main()
