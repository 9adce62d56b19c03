"""Preference flow matching on a generator that stays closed: pairs from its images alone, then the gain on held-out prompts.

    python benchmarks/preference_flow.py --task likes_blue
    python benchmarks/preference_flow.py --task scene_score
    python benchmarks/preference_flow.py --task variations

Pairs come from the embedded mini-sd under the task's reward: the better with the worse of eight images of each prompt; or, in `variations`, an image
with the best of four variations of it (image to image). `train_pfm.py` learns from them with the recipe `pfm_<task>_mini_sd.yaml`, carries fresh images of
held-out prompts over, and prints the win rates over the originals.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

from diffusers_align import embedded
from diffusers_align.data import load_prompts
from diffusers_align.rewards import load_reward
from diffusers_align.training.report.pictures import to_pil

ROOT = Path(__file__).parent.parent
TASKS = {
    "likes_blue": ("likes_blue_train", "likes_blue_heldout", "background_color"),
    "scene_score": ("mini_train", "mini_heldout", "scene_score"),
    "variations": ("mini_train", "mini_heldout", "scene_score"),
}


def sample(pipeline, prompts, number, seed):
    """`number` images of each prompt: [(Prompt, (3, H, W))], prompt after prompt."""
    jobs = [prompt for prompt in prompts for _ in range(number)]
    return list(zip(jobs, in_batches(pipeline, [prompt.text for prompt in jobs], seed)))


def in_batches(pipeline, texts, seed, images=None, **call):
    """One image a text, [(3, H, W)]; with `images`, variations of them."""
    made = []
    for start in range(0, len(texts), 64):
        part = slice(start, min(start + 64, len(texts)))
        generators = [torch.Generator().manual_seed(seed + i) for i in range(part.start, part.stop)]
        given = {} if images is None else {"image": torch.stack(images[part])}
        made += pipeline(texts[part], num_inference_steps=10, guidance_scale=3.0, generator=generators, output_type="pt", **given, **call).images
    return made


def scores(reward, samples):
    columns = {name: [prompt.columns[name] for prompt, _ in samples] for name in samples[0][0].columns}
    values = reward(torch.stack([image for _, image in samples]), [prompt.text for prompt, _ in samples], **columns)
    return values["reward"] if isinstance(values, dict) else values


def write(folder, rows, samples):
    """Rows {column: value, or the number of a sample} as a folder with its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (_, image) in enumerate(samples):
        to_pil(image).save(folder / f"{number:05d}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(task, folder):
    """`folder/pairs`, and `folder/outputs`, fresh samples of the held-out prompts."""
    train, held_out, reward = TASKS[task]
    pipeline, reward = DiffusionPipeline.from_pretrained(embedded.path("mini-sd")), load_reward(reward)
    pipeline.set_progress_bar_config(disable=True)
    pairs, samples = (variations if task == "variations" else better_and_worse)(pipeline, load_prompts(train), reward)
    rows = [
        {"prompt": samples[worse][0].text, "image_0_file_name": f"{better:05d}.png", "image_1_file_name": f"{worse:05d}.png", "label_0": 1}
        for better, worse in pairs
    ]
    write(folder / "pairs", rows, samples)
    outputs = sample(pipeline, load_prompts(held_out), 4, seed=10**6)
    write(folder / "outputs", [{"prompt": prompt.text, "file_name": f"{i:05d}.png"} for i, (prompt, _) in enumerate(outputs)], outputs)


def better_and_worse(pipeline, prompts, reward, number=8):
    """The better half of each prompt's samples against the worse: [(better, worse)] and the samples that they number."""
    samples, pairs = sample(pipeline, prompts, number, seed=0), []
    for start in range(0, len(samples), number):
        order = (scores(reward, samples[start : start + number]).argsort() + start).tolist()
        pairs += zip(reversed(order[number // 2 :]), order[: number // 2])
    return pairs, samples


def variations(pipeline, prompts, reward, number=2, tries=4, strength=0.5):
    """Samples against the best of variations of them, where that is better: [(better, worse)] and the images that they number."""
    samples = sample(pipeline, prompts, number, seed=0)
    editor, jobs = AutoPipelineForImage2Image.from_pipe(pipeline), [row for row in samples for _ in range(tries)]
    editor.set_progress_bar_config(disable=True)
    edited = in_batches(editor, [prompt.text for prompt, _ in jobs], 10**5, [image for _, image in jobs], strength=strength)
    edited = [(prompt, image) for (prompt, _), image in zip(jobs, edited)]
    gains = scores(reward, edited).view(-1, tries) - scores(reward, samples)[:, None]
    best = gains.argmax(1)
    pairs = [(len(samples) + i * tries + int(best[i]), i) for i in range(len(samples)) if gains[i, best[i]] > 0]
    return pairs, samples + edited


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(TASKS), default="likes_blue")
    parser.add_argument("--folder", type=Path, default=Path("runs/preference_flow"))
    args, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    if not (args.folder / args.task / "outputs" / "metadata.jsonl").is_file():
        make_data(args.task, args.folder / args.task)
    script = ROOT / "training_scripts" / "train_pfm.py"
    folder = Path(__file__).parent if args.task == "variations" else script.parent / "recipes"
    data = ["--dataset_name", str(args.folder / args.task / "pairs"), "--outputs", str(args.folder / args.task / "outputs")]
    sys.argv = [str(script), "--config", str(folder / f"pfm_{args.task}_mini_sd.yaml"), *data, *rest]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
