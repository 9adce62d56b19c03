"""Learning from preferences on the embedded mini-sd3, each method for the same minutes; then one table of `evaluate.py`.

    python benchmarks/preferences.py --minutes 1 --output_dir runs/preferences
    python benchmarks/preferences.py --minutes 1 --reward clip_score --reward_model mini-clip --output_dir runs/preferences_clip

First `make_preferences.py` makes the data: 60 prompts, eight of the model's own images each, scored by the reward; and as many images of prompts
that are held out, whose pairs give the implicit accuracy. D3PO and SPO roll out for themselves. Processor time, one thread, as for online_rl.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from equal_time import SCRIPTS, checkpoints, evaluate, train

CALL = ["--call_kwargs", '{"max_sequence_length": 1}']
PLAIN = "plain"  # without what the recipe of Diffusion-DPO adds to its loss
ADDED = ("sft_weight", "safeguard_mu")
# name: (script, recipe, kind of data, more flags)
RUNS = {
    "Diffusion-DPO": ("train_dpo", "dpo_mini_sd3", "pairs", [PLAIN]),
    "DPO, safeguard": ("train_dpo", "dpo_mini_sd3", "pairs", []),
    "MaPO": ("train_dpo", "dpo_mini_sd3", "pairs", [PLAIN, "--loss", "mapo", "--beta", "0.1"]),
    "Linear-DPO": ("train_dpo", "dpo_mini_sd3", "pairs", [PLAIN, "--loss", "linear", "--beta", "200", "--linear_eta", "0.001", "--reference_decay", "0.99"]),
    "InPO": ("train_dpo", "dpo_mini_sd3", "pairs", [PLAIN, "--inversion_steps", "2"]),
    "DSPO": ("train_dspo", "dspo_mini_sd3", "pairs", []),
    "Diffusion-KTO": ("train_kto", "kto_mini_sd3", "binary", []),
    "RWR": ("train_rwr", "rwr_mini_sd3", "scored", []),
    "D3PO": ("train_d3po", "d3po_mini_sd3", None, []),
    "SPO": ("train_spo", "spo_mini_sd3", None, []),
}
# training and held-out prompts by reward: in the one case the preference is no part of the prompt
PROMPTS = {"background_color": ("likes_blue_train", "likes_blue_heldout")}
OTHERS = ("mini_train", "mini_heldout")


def make_data(folder: Path, prompts: str, reward: list[str], seed: int) -> None:
    command = [sys.executable, SCRIPTS / "make_preferences.py", "--pretrained_model_name_or_path", "mini-sd3", *CALL, "--prompts", prompts]
    command += [*reward, "--num_images_per_prompt", "8", "--num_prompts", "60", "--num_inference_steps", "12"]
    command += ["--guidance_scale", "3", "--batch_size", "24", "--seed", str(seed), "--output_dir", folder]
    subprocess.run(list(map(str, command)), check=True)


def plain_recipe(folder: Path) -> Path:
    """The recipe of Diffusion-DPO without the additions."""
    lines = (SCRIPTS / "recipes" / "dpo_mini_sd3.yaml").read_text().splitlines(keepends=True)
    (folder / "plain.yaml").write_text("".join(line for line in lines if not line.startswith(ADDED)))
    return folder / "plain.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="training time of each method")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--reward", default="background_color", help="what is preferred")
    parser.add_argument("--reward_model", help="its model, where it has one: mini-clip for clip_score")
    parser.add_argument("--num_samples", type=int, default=96, help="images of each model in the evaluation")
    args = parser.parse_args()
    reward = ["--reward", args.reward, *(["--reward_model", args.reward_model] if args.reward_model else [])]
    known, new = PROMPTS.get(args.reward, OTHERS)
    make_data(args.output_dir / "data", known, reward, seed=42)
    make_data(args.output_dir / "held_out", new, reward, seed=43)
    for name in args.only:
        script, recipe, kind, flags = RUNS[name]
        flags = ["--config", str(plain_recipe(args.output_dir)), *flags[1:]] if PLAIN in flags else flags
        flags = [*flags, *reward, "--prompts", known, "--eval_prompts", new]
        if kind:
            flags += ["--dataset_name", str(args.output_dir / "data" / kind), "--cache_dir", str(args.output_dir / "cache")]
        train(("mini-sd3", script, recipe, flags), args.output_dir / name, args.minutes)
        print(f"{name}: {checkpoints(args.output_dir / name)[-1].name}", flush=True)
    measured = dict.fromkeys([args.reward, "scene_score", "background_color"])
    models = [args.reward_model if name == args.reward and args.reward_model else "default" for name in measured]
    flags = [*CALL, "--prompts", new, "--reward", *measured, "--reward_model", *models, "--guidance_scale", "3"]
    flags += ["--eval_dataset_name", str(args.output_dir / "held_out" / "pairs"), "--num_samples", str(args.num_samples)]
    evaluate("mini-sd3", {name: args.output_dir / name for name in args.only}, args.output_dir / "evaluation", flags)


if __name__ == "__main__":
    main()
