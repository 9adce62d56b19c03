"""Learning from preferences on the embedded mini-sd3, each method for the same minutes; then one table of `evaluate.py`.

    python benchmarks/preferences.py --minutes 1 --output_dir runs/preferences

First `make_preferences.py` makes the data: 60 prompts, eight of the model's own images each, scored by `background_color`. D3PO and SPO
roll out for themselves. Processor time, one thread, as for route_c.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from equal_time import SCRIPTS, checkpoints, evaluate, train

CALL = ["--call_kwargs", '{"max_sequence_length": 1}']
# name: (script, recipe, kind of data, more flags)
RUNS = {
    "Diffusion-DPO": ("train_dpo", "dpo_mini_sd3", "pairs", []),
    "DSPO": ("train_dspo", "dspo_mini_sd3", "pairs", []),
    "Diffusion-KTO": ("train_kto", "kto_mini_sd3", "binary", []),
    "RWR": ("train_rwr", "rwr_mini_sd3", "scored", []),
    "D3PO": ("train_d3po", "d3po_mini_sd3", None, []),
    "SPO": ("train_spo", "spo_mini_sd3", None, []),
}


def make_data(folder: Path) -> None:
    command = [sys.executable, SCRIPTS / "make_preferences.py", "--pretrained_model_name_or_path", "mini-sd3", *CALL, "--prompts", "likes_blue_train"]
    command += ["--reward", "background_color", "--num_images_per_prompt", "8", "--num_prompts", "60", "--num_inference_steps", "12"]
    command += ["--guidance_scale", "3", "--batch_size", "24", "--output_dir", folder]
    subprocess.run(list(map(str, command)), check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="training time of each method")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--num_samples", type=int, default=96, help="images of each model in the evaluation")
    args = parser.parse_args()
    make_data(args.output_dir / "data")
    for name in args.only:
        script, recipe, kind, flags = RUNS[name]
        if kind:
            flags = [*flags, "--dataset_name", str(args.output_dir / "data" / kind), "--cache_dir", str(args.output_dir / "latents")]
        train(("mini-sd3", script, recipe, flags), args.output_dir / name, args.minutes)
        print(f"{name}: {checkpoints(args.output_dir / name)[-1].name}", flush=True)
    flags = [*CALL, "--prompts", "likes_blue_heldout", "--reward", "background_color", "scene_score", "--num_samples", str(args.num_samples)]
    evaluate("mini-sd3", {name: args.output_dir / name for name in args.only}, args.output_dir / "evaluation", [*flags, "--guidance_scale", "3"])


if __name__ == "__main__":
    main()
