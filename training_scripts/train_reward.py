"""Learn a reward from preferences: a head on a CLIP model, with or without a LoRA, from pairs, rankings, likes and dislikes, or scores.

    python training_scripts/train_reward.py --dataset_name my_preferences/pairs --kind pair --model mini-clip --output_dir rewards/mine

The folder is a reward's name: `--reward rewards/mine`. Pairs are fitted by the Bradley-Terry model, ties as labels of one half; rankings by
Plackett and Luce's; likes by logistic regression; scores by least squares. On a frozen CLIP model the images are embedded once, so an epoch takes
a moment; `--rank` trains its vision tower as well. `--step_aware` makes a reward for train_spo.py, which also judges predictions from noisy
samples. What is reported and kept in `learned_reward.json` is of prompts that were held out.
"""

import argparse

import torch
from accelerate import Accelerator

from diffusers_align.data import load_preferences, parse_column_map
from diffusers_align.policy import Policy
from diffusers_align.rewards.learned import RewardModel
from diffusers_align.training import arguments
from diffusers_align.training.loading import call_arguments, load_pipeline
from diffusers_align.training.reward_learning import TARGET, Logits, examples_of, fit, judge, noised_examples, split, targets_of


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", help="YAML recipe: its values replace the defaults, flags on the command line replace its values")
    parser.add_argument("--dataset_name", help="a .jsonl, .csv or .parquet file, a folder, or a set of the Hub")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--kind", choices=list(TARGET), default="pair", help="what to learn from")
    parser.add_argument("--column_map", help="its columns, where they have other names: prompt=caption,image_0=left")
    parser.add_argument("--image_root", help="folder of relative image paths; the file's own if absent")
    parser.add_argument("--ties", choices=["drop", "soft"], default="soft", help="pairs without a winner: labels of one half, or left out")
    parser.add_argument("--bad_rows", choices=["skip", "error"], default="skip", help="broken rows: report and leave out, or stop")
    parser.add_argument("--held_out", type=float, default=0.2, help="share of the prompts that is not trained on")
    parser.add_argument("--model", default="openai/clip-vit-large-patch14", help="a CLIP model: Hub name, folder, or mini-clip")
    parser.add_argument("--hidden", type=int, default=0, help="units of the head's hidden layer; 0 is a linear head")
    parser.add_argument("--rank", type=int, default=0, help="of a LoRA on the vision tower's attention; 0 leaves CLIP frozen")
    parser.add_argument("--num_epochs", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", help="the reward: learned_reward.json, head.safetensors and perhaps lora.safetensors")
    group = parser.add_argument_group("step-aware rewards")
    group.add_argument("--step_aware", action="store_true", help="learn from clean samples predicted at random noise levels too, and take the level (SPO)")
    group.add_argument("--num_noise_levels", type=int, default=8, help="noise levels of each row, in equal strata")
    group.add_argument("--pretrained_model_name_or_path", help="the pipeline that predicts: the one to be aligned")
    group.add_argument("--revision", help="revision of the pipeline on the Hub")
    group.add_argument("--variant", help="variant of its files, such as fp16")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="dtype of its weights and of autocast")
    group.add_argument("--height", type=int, help="pixels; the pipeline's default if absent")
    group.add_argument("--width", type=int, help="pixels; the pipeline's default if absent")
    group.add_argument("--call_kwargs", type=arguments.json_object, default={}, help="other arguments of the pipeline's call, as JSON")
    parser.set_defaults(num_inference_steps=None, guidance_scale=None)
    args = arguments.parse_with_recipe(parser, argv, ("dataset_name", "output_dir"))
    for name in ("num_epochs", "batch_size", "num_noise_levels"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.held_out < 1:
        parser.error(f"--held_out is a share of the prompts, above 0 and below 1, got {args.held_out}")
    if args.hidden < 0 or args.learning_rate <= 0:
        parser.error(f"--hidden must not be negative and --learning_rate positive, got {args.hidden} and {args.learning_rate}")
    if args.rank < 0:
        parser.error(f"--rank must not be negative, got {args.rank}")
    if args.step_aware != bool(args.pretrained_model_name_or_path):
        parser.error("--step_aware and --pretrained_model_name_or_path go together: the pipeline predicts the clean samples that are judged")
    return args


def main(argv=None):
    args = parse_args(argv)
    arguments.check_output_dir(args.output_dir)
    torch.manual_seed(args.seed)

    # 1 preferences, for a step-aware reward also as a model sees them under noise
    columns = parse_column_map(args.column_map) if args.column_map else None
    options = {"column_map": columns, "ties": args.ties, "bad_rows": args.bad_rows, "split": args.dataset_split, "image_root": args.image_root}
    rows, report = load_preferences(args.dataset_name, args.kind, **options)
    print(report)
    examples = examples_of(rows, args.kind)
    if args.step_aware:
        accelerator = Accelerator(mixed_precision=args.mixed_precision)
        policy = Policy(load_pipeline(args).to(accelerator.device), **call_arguments(args))
        examples += noised_examples(args, accelerator, policy, rows, args.kind, args.num_noise_levels)
        del policy
    train, held_out = ([examples[i] for i in part] for part in split([vars(example) for example in examples], args.held_out, args.seed))
    scale, shift = 1.0, 0.0
    if args.kind == "scored":
        targets = targets_of(train)
        scale, shift = targets.std().clamp(min=1e-6).item(), targets.mean().item()
        for example in examples:
            example.target = (example.target - shift) / scale

    # 2 fit
    model = RewardModel(args.model, args.hidden, args.rank, args.step_aware).to("cuda" if torch.cuda.is_available() else "cpu")
    logits = Logits(model, args.batch_size)
    logits.embed(examples)
    fit(args, logits, train)

    # 3 judge and save
    metrics = {name: judge(args.kind, logits, part) for name, part in (("train", train), ("held_out", held_out))}
    model.save(args.output_dir, scale, shift, kind=args.kind, data=args.dataset_name, metrics=metrics)
    for name, values in metrics.items():
        by_level = values.pop("by_noise_level", {})
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
        for level, worth in by_level.items():
            print(f"  noise level {level}: " + ", ".join(f"{key} {value:.4g}" for key, value in worth.items()))
    print(f"Use it as --reward {args.output_dir}")


if __name__ == "__main__":
    main()
