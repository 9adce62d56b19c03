"""Preference flow matching on a generator that stays closed: pairs from its samples alone, then the gain on held-out prompts.

    python benchmarks/preference_flow.py --task likes_blue
    python benchmarks/preference_flow.py --task scene_score

Samples the embedded mini-sd, pairs the better with the worse of eight images of each prompt under the task's reward, trains
`train_pfm.py` with the recipe `pfm_<task>_mini_sd.yaml`, and prints the win rate of transported over original images.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_align import embedded
from diffusers_align.data import load_prompts
from diffusers_align.rewards import load_reward
from diffusers_align.training.pictures import to_pil

ROOT = Path(__file__).parent.parent
TASKS = {
    "likes_blue": ("likes_blue_train", "likes_blue_heldout", "background_color"),
    "scene_score": ("mini_train", "mini_heldout", "scene_score"),
}


def sample(pipeline, prompts, number, seed):
    """`number` images of each prompt: [(Prompt, (3, H, W))], prompt after prompt."""
    jobs, images = [prompt for prompt in prompts for _ in range(number)], []
    for start in range(0, len(jobs), 64):
        texts = [prompt.text for prompt in jobs[start : start + 64]]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))]
        images += pipeline(texts, num_inference_steps=10, guidance_scale=3.0, generator=generators, output_type="pt").images
    return list(zip(jobs, images))


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


def make_data(task, folder, per_prompt=8, fresh=4):
    """`folder/pairs`, the better half of each training prompt's samples against the worse, and `folder/outputs`, fresh samples of the held-out prompts."""
    train, held_out, reward = TASKS[task]
    pipeline, reward = DiffusionPipeline.from_pretrained(embedded.path("mini-sd")), load_reward(reward)
    pipeline.set_progress_bar_config(disable=True)
    samples, rows = sample(pipeline, load_prompts(train), per_prompt, seed=0), []
    for start in range(0, len(samples), per_prompt):
        order = (scores(reward, samples[start : start + per_prompt]).argsort() + start).tolist()
        for worse, better in zip(order[: per_prompt // 2], reversed(order)):
            names = {"image_0_file_name": f"{better:05d}.png", "image_1_file_name": f"{worse:05d}.png"}
            rows.append({"prompt": samples[start][0].text, **names, "label_0": 1})
    write(folder / "pairs", rows, samples)
    outputs = sample(pipeline, load_prompts(held_out), fresh, seed=10**6)
    write(folder / "outputs", [{"prompt": prompt.text, "file_name": f"{i:05d}.png"} for i, (prompt, _) in enumerate(outputs)], outputs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(TASKS), default="likes_blue")
    parser.add_argument("--folder", type=Path, default=Path("runs/preference_flow"))
    args, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    if not (args.folder / args.task / "outputs" / "metadata.jsonl").is_file():
        make_data(args.task, args.folder / args.task)
    script = ROOT / "training_scripts" / "train_pfm.py"
    sys.argv = [str(script), "--config", str(script.parent / "recipes" / f"pfm_{args.task}_mini_sd.yaml"), *rest]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
