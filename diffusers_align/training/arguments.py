"""The flags that every training script knows, in diffusers' names, and recipes that set them from a YAML file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

import yaml

TRACKERS = ("tensorboard", "wandb", "trackio")
REQUIRED = ("pretrained_model_name_or_path", "prompts", "reward", "output_dir")
AT_LEAST_ONE = (
    "num_inference_steps",
    "train_batch_size",
    "num_epochs",
    "rank",
    "num_eval_samples",
    "checkpointing_epochs",
    "validation_epochs",
    "early_stop_patience",
)


def base_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the common flags; a script adds those of its algorithm and hands it to `parse`."""
    parser = run_parser(description)
    _add_model(parser.add_argument_group("model"))
    _add_task(parser.add_argument_group("prompts and reward"))
    _add_early_stop(parser.add_argument_group("early stop"))
    return parser


def run_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of a `Run` alone, for scripts that train no LoRA of a pipeline."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", help="YAML recipe: its values replace the defaults, flags on the command line replace its values")
    parser.set_defaults(shard_denoiser=False)
    _add_compute(parser.add_argument_group("compute"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_compute(group) -> None:
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="dtype of the frozen weights and of autocast")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute the denoiser's activations in the backward pass")
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later")


def _add_model(group) -> None:
    group.add_argument("--pretrained_model_name_or_path", help="a diffusers pipeline: Hub name, folder, or an embedded model (mini-sd, mini-sd3)")
    group.add_argument("--revision", help="revision of the pipeline on the Hub")
    group.add_argument("--variant", help="variant of its files, such as fp16")
    group.add_argument("--shard_denoiser", action="store_true", help="spread the frozen denoiser over the processes (FSDP2); the LoRA stays whole")
    group.add_argument("--rank", type=int, default=32, help="rank of the LoRA")
    group.add_argument("--lora_alpha", type=int, help="scale of the LoRA; twice the rank if absent")
    group.add_argument("--lora_layers", help="comma-separated modules that get a LoRA; the attention projections if absent")
    group.add_argument("--num_inference_steps", type=int, default=10, help="solver steps of training rollouts")
    group.add_argument("--eval_num_inference_steps", type=int, help="solver steps of evaluation; as in training if absent")
    group.add_argument(
        "--eval_scheduler", choices=["stock", "twin"], default="stock", help="evaluate with the pipeline's own solver, or along the SDE twin's ODE"
    )
    group.add_argument("--guidance_scale", type=float, help="classifier-free guidance of rollouts, replays and evaluation; the pipeline's default if absent")
    group.add_argument("--eval_guidance_scale", type=float, help="guidance of evaluation and pictures; as in training if absent")
    group.add_argument("--height", type=int, help="pixels; the pipeline's default if absent")
    group.add_argument("--width", type=int, help="pixels; the pipeline's default if absent")
    group.add_argument("--call_kwargs", type=json_object, default={}, help="other arguments of the pipeline's call, as JSON: '{\"num_frames\": 33}'")


def _add_task(group) -> None:
    group.add_argument("--prompts", help="prompts to train on: a .txt, .jsonl or .csv file, or a shipped set")
    group.add_argument("--prompt_column", default="prompt", help="field of the prompt in .jsonl and .csv files; rewards get the other fields")
    group.add_argument("--eval_prompts", help="held-out prompts; the training ones if absent")
    group.add_argument("--num_eval_samples", type=int, default=64, help="images of the evaluation before and after")
    group.add_argument("--reward", help="built-in reward, module:function, file.py:function, http://host:port, or a sum such as clip_score*1+scene_score*0.5")
    group.add_argument("--reward_model", help="checkpoint of the reward's model, where it has one; its public one if absent")
    group.add_argument("--eval_reward", help="a second reward, not trained on, to show whether the first was hacked")
    group.add_argument("--eval_reward_model", help="checkpoint of the second reward's model")
    group.add_argument("--invalid_rewards", choices=["error", "mask"], default="error", help="on rewards that are NaN, raise or hang: stop, or mask them")
    group.add_argument("--reward_timeout", type=float, help="seconds that the reward may take for a batch; no limit if absent")
    group.add_argument("--reward_in_background", action="store_true", help="score a batch while the next is sampled: for rewards on servers or on the CPU")


def _add_early_stop(group) -> None:
    group.add_argument(
        "--early_stop_metric", choices=["reward", "eval_reward"], help="stop when this held-out reward rises no more, and keep the weights of its peak"
    )
    group.add_argument("--early_stop_patience", type=int, default=3, help="after so many validations (--validation_epochs) without a new peak")
    group.add_argument("--early_stop_diversity", type=float, help="stop below this share of the pretrained model's diversity (RMS of pixels within prompts)")


def _add_optimisation(group) -> None:
    group.add_argument("--seed", type=int, default=42, help="seed of everything: prompts, noise, LoRA")
    group.add_argument("--num_epochs", type=int, default=100, help="rollouts, each followed by its updates")
    group.add_argument("--train_batch_size", type=int, default=8, help="samples of a rollout or replay at a time, on each process")
    group.add_argument(
        "--gradient_accumulation_steps", type=int, help="batches of one optimizer step; half of an epoch's if absent, so two steps an epoch (NFT, AWM: one)"
    )
    group.add_argument("--learning_rate", type=float, default=3e-4)
    group.add_argument("--lr_scheduler", default="constant", help="any name of diffusers.optimization.get_scheduler")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=1e-4)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=False, help="evaluate and save an exponential moving average of the LoRA")
    group.add_argument("--ema_decay", type=float, default=0.9, help="of the average, every --ema_interval optimizer steps")
    group.add_argument("--ema_interval", type=int, default=8)


def _add_output(group) -> None:
    group.add_argument("--output_dir", help="LoRA, pictures, metrics, model card and checkpoints")
    group.add_argument("--checkpointing_epochs", type=int, default=20, help="a checkpoint every so many epochs")
    group.add_argument("--checkpoints_total_limit", type=int, help="keep at most so many")
    group.add_argument("--resume_from_checkpoint", help="a checkpoint folder, or 'latest'")
    group.add_argument("--validation_epochs", type=int, default=20, help="a sample grid at fixed seeds every so many epochs")
    group.add_argument("--num_validation_images", type=int, default=16)
    group.add_argument("--report_to", default="none", help=f"none, {', '.join(TRACKERS)}, or several, comma-separated (pictures go to the first two)")
    group.add_argument("--run_name", help="name of the run in the trackers; the output folder's if absent")
    group.add_argument("--push_to_hub", action="store_true", help="upload the output folder at the end")
    group.add_argument("--hub_model_id", help="repository; named after the output folder if absent")
    group.add_argument("--hub_token", help="token; the stored login's if absent")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None, required: tuple[str, ...] = REQUIRED) -> argparse.Namespace:
    """Parse the recipe and the flags, and check what can be checked before anything is loaded.

    Exits with a message (argparse's convention) on an unknown flag, a recipe with unknown keys, or values that make no sense.
    """
    args = parse_with_recipe(parser, argv, required)
    for name in AT_LEAST_ONE:
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if getattr(args, "reward_timeout", None) is not None and args.reward_timeout <= 0:
        parser.error(f"--reward_timeout must be positive, got {args.reward_timeout}")
    if args.learning_rate <= 0:
        parser.error(f"--learning_rate must be positive, got {args.learning_rate}")
    if args.push_to_hub and args.hub_token and "wandb" in args.report_to:
        parser.error("--hub_token would be logged to wandb with the other arguments; log in with `hf auth login` instead")
    _check_early_stop(parser, args)
    _check_trackers(parser, args)
    args.command = _command(sys.argv[1:] if argv is None else argv)
    return args


def parse_with_recipe(parser: argparse.ArgumentParser, argv: list[str] | None, required: tuple[str, ...]) -> argparse.Namespace:
    """The flags over the values of the recipe `--config`; exits with a message where one of `required` is in neither."""
    known, _ = parser.parse_known_args(argv)
    if known.config:
        parser.set_defaults(**_recipe(parser, known.config))
    args = parser.parse_args(argv)
    for name in required:
        if not getattr(args, name):
            parser.error(f"--{name} is required (on the command line or in the recipe)")
    return args


def _command(argv: list[str]) -> str:
    """The command line that makes this run, for the model card: without the token."""
    kept = [word for before, word in zip(["", *argv], argv) if not word.startswith("--hub_token") and before != "--hub_token"]
    return shlex.join(["accelerate", "launch", sys.argv[0], *kept])


def _recipe(parser: argparse.ArgumentParser, path: str) -> dict:
    file = Path(path)
    if not file.is_file():
        parser.error(f"no recipe {path!r}")
    recipe = yaml.safe_load(file.read_text()) or {}
    actions = {action.dest: action for action in parser._actions}
    if unknown := sorted(set(recipe) - set(actions)):
        parser.error(f"{path}: unknown keys {', '.join(unknown)}")
    for name, value in recipe.items():
        try:
            recipe[name] = _typed(actions[name], value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            parser.error(f"{path}: {name}: {error}")
    return recipe


def _typed(action: argparse.Action, value):
    """A recipe's value as the flag would have it: YAML reads 1e-4 as a string, and an unquoted `no` as false."""
    if (value is None and not action.choices) or (isinstance(value, dict) and action.type is json_object):
        return value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, got {value!r}")
        return value
    if action.nargs == "+":
        return [(action.type or str)(str(item)) for item in (value if isinstance(value, list) else [value])]
    if isinstance(action.nargs, int):
        if not isinstance(value, list) or len(value) != action.nargs:
            raise ValueError(f"must be a list of {action.nargs}, got {value!r}")
        return [action.type(str(item)) for item in value]
    if isinstance(value, list):
        value = ",".join(map(str, value))
    value = "no" if value is False and action.choices else (action.type or str)(str(value))
    if action.choices and value not in action.choices:
        raise ValueError(f"must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return value


def _check_early_stop(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    metric, share = getattr(args, "early_stop_metric", None), getattr(args, "early_stop_diversity", None)
    if metric and not getattr(args, metric):
        parser.error(f"--early_stop_metric {metric} needs --{metric}")
    if share is not None and not 0 < share < 1:
        parser.error(f"--early_stop_diversity must lie between 0 and 1, got {share}")


def _check_trackers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.trackers = [] if args.report_to == "none" else [name.strip() for name in args.report_to.split(",")]
    for name in args.trackers:
        if name not in TRACKERS:
            parser.error(f"--report_to: unknown tracker {name!r}; choose among none, {', '.join(TRACKERS)}")
        # accelerate skips a tracker that is not installed without a word.
        if importlib.util.find_spec(name) is None:
            parser.error(f"--report_to {name}: not installed. Run `pip install {name}`, or pass --report_to none.")


def check_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Exit with a message where one of these flags is given and not above 0."""
    for name in names:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(args, name):g}")


def json_object(text: str) -> dict:
    """The type of a flag that holds a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def check_output_dir(path: str) -> Path:
    """Make the output folder and write to it now rather than find out after training that it cannot be done.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
    except OSError as error:
        raise OSError(f"Cannot write to --output_dir {path}: {error}. Choose another folder or free some space.") from error
    return folder
