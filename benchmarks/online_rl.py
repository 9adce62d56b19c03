"""Every algorithm of online RL on the embedded models, for the same minutes of training; then one table of `evaluate.py` a model.

    python benchmarks/online_rl.py --minutes 2 --output_dir runs/online_rl

Each recipe `*_mini_*.yaml` runs on one thread until its epochs have had that much processor time (wall time would count what else the
machine does), one after the other, and is evaluated at its last checkpoint. What is there already is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from equal_time import checkpoints, evaluate, train

# For a recipe of another wish, what the others want.
LIKES_BLUE = ["--prompts", "likes_blue_train", "--eval_prompts", "likes_blue_heldout", "--reward", "background_color", "--eval_reward", "scene_score"]
# name: (base model, script, recipe, more flags)
RUNS = {
    "Flow-GRPO": ("mini-sd3", "train_flow_grpo", "flow_grpo_mini_sd3", [*LIKES_BLUE, "--kl_weight", "0.1"]),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of each algorithm")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/online_rl"))
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--num_samples", type=int, default=96, help="images of each model in the evaluation")
    args = parser.parse_args()
    for name in args.only:
        train(RUNS[name], args.output_dir / name, args.minutes)
        print(f"{name}: {checkpoints(args.output_dir / name)[-1].name}", flush=True)
    for base, flags in EVALUATION.items():
        names = [name for name in args.only if RUNS[name][0] == base]
        if names:
            task = ["--prompts", "likes_blue_heldout", "--reward", "background_color", "scene_score", "--guidance_scale", "3"]
            task += ["--num_samples", str(args.num_samples)]
            evaluate(base, {name: args.output_dir / name for name in names}, args.output_dir / f"evaluation-{base}", [*task, *flags])


if __name__ == "__main__":
    main()
