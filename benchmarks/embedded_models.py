"""How good the embedded models are: what the scene classifier reads in real scenes and in samples, and how samples vary.

python benchmarks/embedded_models.py --picture samples.png
"""

import argparse

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from diffusers_align import embedded
from diffusers_align.data import load_prompts
from diffusers_align.embedded.classifier import SceneClassifier
from diffusers_align.embedded.scenes import COLORS, OBJECTS
from diffusers_align.embedded.teaching import make_scenes
from diffusers_align.rewards import load_reward
from diffusers_align.training.report.pictures import grid

CALL = {"mini-sd3": {"max_sequence_length": 1}, "mini-sd": {}}
SHOWN = [
    "a fox", "a fox on a blue background", "a lemon on a black background", "two cars on a white background", "a rocket on a purple background",
    "a panda on the left on a green background", "a house", "three strawberries on a white background",
]  # fmt: skip


def sample(name: str, prompts: list[str], guidance: float) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(embedded.path(name))
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), 32):
        part = prompts[start : start + 32]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images.append(pipeline(part, generator=generators, num_inference_steps=20, guidance_scale=guidance, output_type="pt", **CALL[name])[0])
    return torch.cat(images)


def row(title: str, images: torch.Tensor, prompts: list[str]) -> str:
    scores = load_reward("scene_score")(images, prompts)
    means = {name: values[~values.isnan()].mean().item() for name, values in scores.items()}
    clip = load_reward("clip_score", model=embedded.path("mini-clip"))(images, prompts).mean().item()
    return f"| {title} | " + " | ".join(f"{means[n]:.2f}" for n in ("object", "color", "count", "position", "correct")) + f" | {clip:.2f} |"


def judge_the_judge(number: int = 1000) -> str:
    """Accuracy of the classifier on fresh real scenes, and what the autoencoder keeps of them."""
    images, truth, _ = make_scenes(number, seed=99)
    images = images.float() / 255
    predicted = SceneClassifier.from_pretrained(embedded.path("scene-classifier"))(images)
    right = {
        "object": torch.tensor([list(OBJECTS).index(s.object) for s in truth]),
        "color": torch.tensor([list(COLORS).index(s.color) for s in truth]),
        "count": torch.tensor([s.count - 1 for s in truth]),
    }
    accuracy = ", ".join(f"{name} {(predicted[name].argmax(1) == label).float().mean():.3f}" for name, label in right.items())
    vae = AutoencoderKL.from_pretrained(embedded.path("mini-sd3"), subfolder="vae")
    decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
    psnr = -10 * torch.log10((decoded - images).square().mean())
    return f"Classifier on {number} real scenes: accuracy {accuracy}. Autoencoder: PSNR {psnr:.1f} dB."


def diversity(images: torch.Tensor) -> float:
    """Mean pixel distance (root mean square) between samples of one prompt."""
    flat = images.flatten(1)
    return float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--picture", help="write a grid of samples of both pipelines here")
    args = parser.parse_args()
    prompts = [p.text for name in ("mini_train", "mini_heldout") for p in load_prompts(name)]
    prompts = (prompts * (args.samples // len(prompts) + 1))[: args.samples]
    print("| images | object | colour | count | position | all right | mini-clip |\n|---|---|---|---|---|---|---|")
    with torch.no_grad():
        images, truth, _ = make_scenes(args.samples, seed=12345)
        print(row("real scenes", images.float() / 255, [s.caption() for s in truth]), flush=True)
        for name in CALL:
            for guidance in (3.0, 1.0):
                print(row(f"{name}, guidance {guidance:g}", sample(name, prompts, guidance), prompts), flush=True)
        real = torch.stack([x for x, s in zip(images, truth) if s.object == "fox"]).float() / 255
        print(
            f"\nDistance between samples of 'a fox': real {diversity(real):.3f}, "
            + ", ".join(f"{n} {diversity(sample(n, ['a fox'] * 16, 3.0)):.3f}" for n in CALL)
        )
        print(judge_the_judge())
        if args.picture:
            shown = [p for p in SHOWN for _ in range(4)]
            pictures = [x for name in CALL for x in sample(name, shown, 3.0)]
            grid(pictures, [f"{p}" for p in shown] * 2, columns=8, cell=96).save(args.picture)


if __name__ == "__main__":
    main()
