"""The flags of scripts that learn from a data set, and what can be said about them before it is read."""

from __future__ import annotations

import argparse

from ..data import parse_column_map
from ..forward_process import WEIGHTINGS

REQUIRED = ("pretrained_model_name_or_path", "dataset_name", "output_dir")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the data set and of how its images are noised."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="a .jsonl, .csv or .parquet file, a folder, or a set of the Hub")
    group.add_argument("--dataset_split", default="train")
    group.add_argument("--column_map", help="its columns, where they have other names: prompt=caption,image_0=left")
    group.add_argument("--image_root", help="folder of relative image paths; the file's own if absent")
    group.add_argument("--num_samples_per_epoch", type=int, default=1024, help="rows an epoch: the stretch between two lines of the log")
    group.add_argument("--eval_dataset_name", help="held-out pairs, read as the data set is, for the implicit accuracy at each validation; none if absent")
    group.add_argument("--eval_dataset_split", default="train", help="their split")
    add_image_arguments(parser)


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of how a data set's rows are read, its images prepared and noised."""
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group("images")
    group.add_argument("--bad_rows", choices=["skip", "error"], default="skip", help="broken rows: report and leave out, or stop")
    group.add_argument("--verify", choices=["full", "header", "none"], default="full", help="decode each image before training, read its header, or neither")
    group.add_argument("--max_rows", type=int, help="read the first so many rows only")
    group.add_argument("--random_crop", action=flag, default=False, help="crop at random, both images of a pair alike; centred otherwise")
    group.add_argument("--random_flip", action=flag, default=False, help="mirror at random, both images of a pair alike")
    group.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="share of captions that are emptied, which keeps guidance working")
    group.add_argument("--cache_dir", help="keep latents and encoded prompts on disk here; encoded at every use if absent. Not with --random_crop")
    group = parser.add_argument_group("noise")
    group.add_argument("--timestep_scheme", choices=["uniform", "logit_normal"], help="logit_normal for flow matching, uniform for diffusion if absent")
    group.add_argument("--error_weighting", choices=WEIGHTINGS, default="native", help="errors in the model's own terms, or converted")


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of scripts that learn from pairs."""
    group = parser.add_argument_group("pairs")
    group.add_argument("--ties", choices=["drop", "soft", "keep"], default="drop", help="pairs without a winner: leave out, label 1/2, or one of each label")
    group.add_argument("--pair_weighting", choices=["row", "prompt"], default="row", help="weights as the rows have them, or summing to 1 for each prompt")
    group.add_argument("--two_pass", action="store_true", help="errors first, then gradients side by side: the same update with half the memory")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a message where flags of `add_data_arguments` make no sense."""
    if args.num_samples_per_epoch < 1:
        parser.error(f"--num_samples_per_epoch must be at least 1, got {args.num_samples_per_epoch}")
    if args.column_map:
        try:
            parse_column_map(args.column_map)
        except ValueError as error:
            parser.error(str(error))
    check_images(parser, args)


def check_images(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a message where flags of `add_image_arguments` make no sense."""
    if args.max_rows is not None and args.max_rows < 1:
        parser.error(f"--max_rows must be at least 1, got {args.max_rows}")
    if not 0 <= args.proportion_empty_prompts <= 1:
        parser.error(f"--proportion_empty_prompts must lie in [0, 1], got {args.proportion_empty_prompts}")
    if args.cache_dir and args.random_crop:
        parser.error("--cache_dir with --random_crop would keep every crop and use none twice: leave out one of them")
