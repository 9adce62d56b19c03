"""Make the embedded models from nothing but composed scenes.

    python -m diffusers_align.embedded.train vae clip classifier judge noisy_classifier noisy_clip --output_dir models --minutes 10 8 8 10 4 13
    python -m diffusers_align.embedded.train sd3 --output_dir models --minutes 600
    python -m diffusers_align.embedded.train sd3 --output_dir models --minutes 15 --decay

Needs no GPU: the shipped files were made on two shared CPU cores. Each stage draws its own scenes, prints its loss and leaves a folder in
diffusers' or transformers' own format. `vae` must come first, `clip` before `noisy_clip`. What is not asked for is taken from the output
folder: a copy of the shipped models there is trained further.

`sd3` and `sd` may be killed at any time. They train at a constant rate and write all they need into the output folder every three
minutes; the same command goes on from there. `--decay` starts from that state, lets the rate fall to zero over its minutes, and writes
the pipeline; the state stays, so the long training can go on afterwards. `--minutes 0` writes the pipeline of the average as it is. With
`--shorten` the state is kept half as long, in a file that may be moved to the state's place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .making.autoencoder import train_vae
from .making.clips import train_clip, train_noisy_clip
from .making.endless import shorten, state_file
from .making.judges import train_classifier, train_judge, train_noisy_classifier
from .making.mini_sd import train_sd
from .making.mini_sd3 import train_sd3

ENDLESS = {"sd3": train_sd3, "sd": train_sd}
STAGES = {
    "vae": train_vae, "clip": train_clip, "classifier": train_classifier, "judge": train_judge, "noisy_classifier": train_noisy_classifier,
    "noisy_clip": train_noisy_clip,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the stages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, *ENDLESS])
    parser.add_argument("--minutes", nargs="+", type=float, required=True, help="training time of each stage; of sd3, sd and judge, the process's own time")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--decay", action="store_true", help="sd3 and sd: end a training, with a rate that falls to zero")
    parser.add_argument("--shorten", action="store_true", help="sd3 and sd: write the state once more, half as long, as STAGE.short.safetensors")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    if len(args.minutes) != len(args.stages):
        parser.error(f"{len(args.stages)} stages need as many --minutes, got {len(args.minutes)}")
    if (args.decay or args.shorten) and (others := [stage for stage in args.stages if stage in STAGES]):
        parser.error(f"--decay and --shorten are for sd3 and sd, and mean nothing for {', '.join(others)}: run them in a call of their own")
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for stage, minutes in zip(args.stages, args.minutes):
        torch.manual_seed(0)
        if stage in ENDLESS:
            ENDLESS[stage](args.output_dir, minutes, args.decay)
            if args.shorten:
                shorten(state_file(args.output_dir, stage), args.output_dir / f"{stage}.short.safetensors")
        else:
            STAGES[stage](args.output_dir, minutes)


if __name__ == "__main__":
    main()
