"""Every algorithm of online RL on the embedded models, for the same minutes of training; then one table of `evaluate.py` a model.

    python benchmarks/route_c.py --minutes 2 --output_dir runs/route_c

Each recipe `*_mini_*.yaml` runs on one thread until its epochs have had that much processor time (wall time would count what else the
machine does), one after the other, and is evaluated at its last checkpoint. What is there already is not run again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "training_scripts"
# name: (base model, script, recipe, more flags)
RUNS = {
    "Flow-GRPO": ("mini-sd3", "train_flow_grpo", "flow_grpo_mini_sd3", []),
    "Flow-CPS": ("mini-sd3", "train_flow_grpo", "flow_grpo_cps_mini_sd3", []),
    "DanceGRPO": ("mini-sd3", "train_flow_grpo", "flow_grpo_dance_mini_sd3", []),
    "MixGRPO": ("mini-sd3", "train_flow_grpo", "flow_grpo_mix_mini_sd3", []),
    "GRPO-Guard": ("mini-sd3", "train_flow_grpo", "flow_grpo_guard_mini_sd3", []),
    "DenseGRPO": ("mini-sd3", "train_dense_grpo", "dense_grpo_mini_sd3", []),
    "MV-GRPO": ("mini-sd3", "train_mv_grpo", "mv_grpo_mini_sd3", []),
    "DiffusionNFT": ("mini-sd3", "train_nft", "nft_mini_sd3", []),
    "AWM": ("mini-sd3", "train_awm", "awm_mini_sd3", []),
    "DDPO-SF": ("mini-sd", "train_ddpo", "ddpo_mini_sd", ["--estimator", "sf"]),
    "DDPO-IS": ("mini-sd", "train_ddpo", "ddpo_mini_sd", []),
    "TRPO": ("mini-sd", "train_ddpo", "ddpo_mini_sd", ["--update", "trpo", "--cg_iterations", "3"]),
    "DPOK": ("mini-sd", "train_dpok", "dpok_mini_sd", []),
}
# What both models are evaluated with: the guidance of the recipes' own evaluation, and the SDE of the recipes for the path KL.
EVALUATION = {
    "mini-sd3": ["--call_kwargs", '{"max_sequence_length": 1}', "--sde_type", "flow_grpo", "--noise_level", "0.7"],
    "mini-sd": ["--eta", "1.0"],
}


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def processor_seconds(process: subprocess.Popen) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def train(name: str, folder: Path, minutes: float) -> None:
    """Run a recipe until its epochs have had their time; evaluation before training does not count."""
    _, script, recipe, flags = RUNS[name]
    command = [sys.executable, SCRIPTS / f"{script}.py", "--config", SCRIPTS / "recipes" / f"{recipe}.yaml", "--output_dir", folder, *flags]
    command += ["--num_epochs", "1000", "--checkpointing_epochs", "1", "--checkpoints_total_limit", "2", "--validation_epochs", "1000"]
    command += ["--num_eval_samples", "48", "--num_validation_images", "8"]
    folder.mkdir(parents=True, exist_ok=True)
    spent, start = 0.0, None
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
        while spent < 60 * minutes and process.poll() is None:
            time.sleep(0.5)
            if start is None and "before:" in (folder / "log.txt").read_text():
                start = processor_seconds(process)
            spent = processor_seconds(process) - start if start is not None else 0.0
        process.send_signal(signal.SIGINT)
        process.wait()
    if spent < 60 * minutes:
        raise RuntimeError(f"{name} ended early; its output is in {folder / 'log.txt'}.")
    (folder / "processor_seconds").write_text(f"{spent:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of each algorithm")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/route_c"))
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--num_samples", type=int, default=96, help="images of each model in the evaluation")
    args = parser.parse_args()
    for name in args.only:
        if not (args.output_dir / name / "processor_seconds").is_file():
            train(name, args.output_dir / name, args.minutes)
        print(f"{name}: {checkpoints(args.output_dir / name)[-1].name}", flush=True)
    for base, flags in EVALUATION.items():
        names = [name for name in args.only if RUNS[name][0] == base]
        if names:
            loras = [checkpoints(args.output_dir / name)[-1] for name in names]
            command = [sys.executable, SCRIPTS / "evaluate.py", "--pretrained_model_name_or_path", base, "--lora", *loras, "--lora_names", *names]
            command += ["--prompts", "likes_blue_heldout", "--reward", "background_color", "scene_score", "--num_samples", str(args.num_samples)]
            command += ["--num_inference_steps", "12", "--guidance_scale", "3", "--diversity_model", "mini-clip", "--batch_size", "48"]
            command += ["--output_dir", args.output_dir / f"evaluation-{base}", *flags]
            subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    main()
