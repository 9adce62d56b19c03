"""Learn a reward from preferences: a head on a CLIP model, with or without a LoRA, from pairs, rankings, likes and dislikes, or scores.

    python training_scripts/train_reward.py --dataset_name my_preferences/pairs --kind pair --model mini-clip --output_dir rewards/mine

The folder is a reward's name: `--reward rewards/mine`. Pairs are fitted by the Bradley-Terry model, ties as labels of one half; rankings by
Plackett and Luce's; likes by logistic regression; scores by least squares. On a frozen CLIP model the images are embedded once, so an epoch takes
a moment; `--rank` trains its vision tower as well. `--step_aware` makes a reward for train_spo.py, which also judges predictions from noisy
samples. What is reported and kept in `learned_reward.json` is of prompts that were held out.
"""

from typing import Annotated, ClassVar, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import LearningRate, PlaceArguments, SeedArguments, SignalArguments
from diffusers_align.training.flags.data import BadRowArguments, SourceArguments
from diffusers_align.training.flags.model import PipelineArguments, PrecisionArguments, SizeArguments
from diffusers_align.training.flags.options import Count, option, parse

PREDICTED = {"step_aware": True}


class StepAwareArguments(
    PipelineArguments,
    SizeArguments,
    PrecisionArguments,
    needs={name: PREDICTED for name in ("single_file_config", "revision", "variant", "height", "width", "call_kwargs", "mixed_precision")},
):
    """step-aware rewards"""

    num_inference_steps: ClassVar[None] = None  # the samples are predicted, not sampled
    guidance_scale: ClassVar[None] = None

    step_aware: bool = option(False, "learn from clean samples predicted at random noise levels too, and take the level (SPO)")
    num_noise_levels: Annotated[int, Interval(ge=1, le=1000)] = option(8, "noise levels of each row, in equal strata", needs=PREDICTED)
    pretrained_model_name_or_path: str | None = option(None, "the pipeline that predicts: the one to be aligned")

    @model_validator(mode="after")
    def _check_step_aware(self):
        if self.step_aware != bool(self.pretrained_model_name_or_path):
            raise ValueError("--step_aware and --pretrained_model_name_or_path go together: the pipeline predicts the clean samples that are judged")
        return self


class RewardModelArguments(SourceArguments, BadRowArguments, StepAwareArguments, SeedArguments, SignalArguments, PlaceArguments):
    """reward model"""

    kind: Literal["pair", "binary", "scored", "ranked"] = option("pair", "what to learn from")
    ties: Literal["drop", "soft"] = option("soft", "pairs without a winner: labels of one half, or left out", needs={"kind": "pair"}, advanced=True)
    held_out: Annotated[float, Interval(gt=0, lt=1)] = option(0.2, "share of the prompts that is not trained on")
    model: str = option("openai/clip-vit-large-patch14", "a CLIP model: Hub name, folder, or mini-clip")
    hidden: Annotated[int, Interval(ge=0, le=65536)] = option(0, "units of the head's hidden layer; 0 is a linear head", advanced=True)
    rank: Annotated[int, Interval(ge=0, le=4096)] = option(0, "of a LoRA on the vision tower's attention; 0 leaves CLIP frozen")
    num_epochs: Count = option(100, "over the data")
    train_batch_size: Count = option(128, "examples of an optimizer step", was="batch_size")
    learning_rate: LearningRate = option(1e-3, "of AdamW")
    adam_weight_decay: Annotated[float, Interval(ge=0, le=100)] = option(
        0.1, "times the learning rate, the share of the weights that a step takes off", advanced=True, was="weight_decay"
    )


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(RewardModelArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once


import torch
from accelerate import Accelerator

from diffusers_align.data import load_preferences, parse_column_map
from diffusers_align.data.conversions import indifferent
from diffusers_align.policy import Policy
from diffusers_align.rewards.learned import FILES, RewardModel
from diffusers_align.training.checkpoints.checkpoints import set_results_aside
from diffusers_align.training.flags import common
from diffusers_align.training.offline.reward_fitting import Logits, described, examples_of, fit, judge, noised_examples, split, targets_of
from diffusers_align.training.report.model_card import public
from diffusers_align.training.run.failures import writing
from diffusers_align.training.run.model_loading import call_arguments, load_pipeline


def load_examples(args):
    """The data set as examples to fit: for a step-aware reward, also as a model sees them under noise."""
    columns = parse_column_map(args.column_map) if args.column_map else None
    options = {"column_map": columns, "ties": args.ties, "bad_rows": args.bad_rows, "split": args.dataset_split, "image_root": args.image_root}
    rows, report = load_preferences(args.dataset_name, args.kind, **options)
    print(report)
    rows = weighing(rows, args.dataset_name)
    examples = examples_of(rows, args.kind)
    if args.step_aware:
        accelerator = Accelerator(mixed_precision=args.mixed_precision)
        pipeline = load_pipeline(args).to(accelerator.device)
        policy = Policy(pipeline, **call_arguments(args, pipeline))
        examples += noised_examples(args, accelerator, policy, rows, args.kind, args.num_noise_levels)
    if (reason := indifferent(rows, args.kind)) and not args.allow_no_signal:
        raise ValueError(f"{args.dataset_name}: {reason}, so there is nothing to learn. Give other data, or pass --allow_no_signal.")
    return examples


def weighing(rows, source):
    """The rows whose weight is not 0: in a batch of nothing else there would be no mean."""
    kept = [row for row in rows if row.get("weight", 1.0) > 0]
    if not kept:
        raise ValueError(f"{source}: all {len(rows)} rows have the weight 0, so there is nothing to learn. Give some of them a weight above 0.")
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} rows have the weight 0 and are left out.")
    return kept


def standardise(examples, train, alike=False):
    """Scores as the model is to learn them, in place: with mean 0 and standard deviation 1 on `train`. Returns the scale and the shift back.

    Raises:
        ValueError: the scores of `train` do not differ, unless they may be `alike`.
    """
    targets = targets_of(train)
    if len(targets.unique()) < 2 and not alike:
        raise ValueError(f"The {len(targets)} images to learn from have no two different scores: give more images, or hold fewer back with --held_out.")
    scale, shift = targets.std().clamp(min=1e-6).item() if len(targets.unique()) > 1 else 1.0, targets.mean().item()
    for example in examples:
        example.target = (example.target - shift) / scale
    return scale, shift


def new_model(args):
    """The CLIP model with a head that has learned nothing yet.

    Raises:
        FileNotFoundError: the CLIP model could not be had.
    """
    try:
        model = RewardModel(args.model, args.hidden, args.rank, args.step_aware)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} --model takes another: a folder, or mini-clip, a small one that ships with the package.") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def main(argv=None):
    args = parse_args(argv)
    out = common.check_output_dir(args.output_dir)
    torch.manual_seed(args.seed)

    # 1 preferences
    examples = load_examples(args)
    train, held_out = ([examples[i] for i in part] for part in split([vars(example) for example in examples], args.held_out, args.seed))
    scale, shift = standardise(examples, train, args.allow_no_signal) if args.kind == "scored" else (1.0, 0.0)

    # 2 fit
    model = new_model(args)
    logits = Logits(model, args.train_batch_size)
    logits.embed(examples)
    learned = fit(args, logits, train)

    # 3 judge and save
    metrics = {name: judge(args.kind, logits, part) for name, part in (("train", train), ("held_out", held_out))}
    for name, values in metrics.items():
        print(f"{name}: {described({key: value for key, value in values.items() if key != 'by_noise_level'})}")
        for level, worth in values.get("by_noise_level", {}).items():
            print(f"  noise level {level}: {described(worth)}")
    set_results_aside(out, FILES)
    with writing(out, lambda: "Free some space and give the same command again."):
        model.save(out, scale, shift, kind=args.kind, data=public(args.dataset_name), metrics=metrics)
    print(f"Use it as --reward {args.output_dir}")
    if not (learned or args.allow_no_signal):
        raise SystemExit(
            f"NOTHING WAS LEARNED: no weight has moved in {args.num_epochs} epochs. --learning_rate {args.learning_rate:g} is too small to change a weight in "
            "float32: raise it (as a rule 1e-4 to 1e-2). The files are complete; with --allow_no_signal the exit status would be 0."
        )


if __name__ == "__main__":
    main()
