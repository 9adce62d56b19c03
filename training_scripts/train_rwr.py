"""Reward-weighted regression: fine-tune a pipeline on scored images in proportion to how good they are.

    accelerate launch training_scripts/train_rwr.py --config training_scripts/recipes/rwr_mini_sd3.yaml --dataset_name my_scored_images

The algorithm's page is `diffusers_align/algorithms/reward_weighted_regression.py`; docs/preference_data.md says what the data may
look like.
"""

from typing import Literal

from diffusers_align.training.flags.data import DataArguments
from diffusers_align.training.flags.methods import PretrainingLossArguments
from diffusers_align.training.flags.options import Count, NonNegative, Positive, PositiveShare, option, parse

RENAMED = {"pretrain_weight": "beta_pretrain", "pretrain_dataset_name": "pretraining_dataset"}


class RWRArguments(PretrainingLossArguments, DataArguments, defaults={"rank": 16, "learning_rate": 1e-5}, was=RENAMED):
    """reward-weighted regression"""

    weights: Literal["softmax", "rank", "top_k", "top_q", "exp_clipped", "raw"] = option("softmax", "how rewards become weights")
    scope: Literal["global", "prompt"] = option(
        "global", "weigh images against all others, or those of their prompt (of their group, where a group is a prompt's samples)"
    )
    temperature: Positive = option(1.0, "divides the rewards (or ranks): small is greedy", needs={"weights": ("softmax", "rank", "exp_clipped")})
    top_k: Count = option(1, "train on so many best alone", needs={"weights": "top_k"})
    top_q: PositiveShare = option(0.1, "train on this best share alone", needs={"weights": "top_q"})
    max_weight: Positive = option(20.0, "bound of a weight", needs={"weights": "exp_clipped"})
    force: bool = option(False, "go on where an effective 1 % of the images bears all the weight")
    kl_weight: NonNegative = option(0.0, "weight of the distance to the pretrained model's answers", was="beta_kl", resume="takes effect")


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(RWRArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

import torch

from diffusers_align.algorithms.reward_weighted_regression import reward_weighted_loss, reward_weights, weight_statistics
from diffusers_align.training import Run
from diffusers_align.training.offline.descent import descend
from diffusers_align.training.offline.loop import OfflineTraining
from diffusers_align.training.offline.pairs_and_batches import Examples
from diffusers_align.training.offline.rows import load_captioned, load_rows
from diffusers_align.training.run.inputs import prompt_of


def weighted(run, rows):
    """The rows that weigh anything beside the others, their weights (N,) as shares of the mean over all rows, and the weights' statistics.

    Raises:
        ValueError: all weigh alike, so that the rewards say nothing.
    """
    args, tasks = run.args, [prompt_of(row).key for row in rows]
    numbers = {task: i for i, task in enumerate(tasks)}
    rewards, groups = torch.tensor([row["reward"] for row in rows]), torch.tensor([numbers[task] for task in tasks])
    options = {name: getattr(args, name) for name in ("scope", "temperature", "top_k", "top_q", "max_weight", "force")}
    weights = reward_weights(rewards, groups, kind=args.weights, **options)
    if weights.max() - weights.min() < 1e-6 * weights.max() and not args.allow_no_signal:
        why = "take other --weights"
        if len(rewards.unique()) == 1:
            why = "they are equal, so give others"
        elif args.scope == "prompt":
            why = "images are compared with those of their prompt: take --scope global"
        raise ValueError(
            f"{args.dataset_name}: all {len(rows)} images weigh alike by --weights {args.weights} --scope {args.scope}, so their rewards would teach nothing: "
            f"{why}. With --allow_no_signal it is plain fine-tuning."
        )
    statistics = weight_statistics(weights)
    run.print(", ".join(f"{name.replace('_', ' ')} {number:.4g}" for name, number in statistics.items()) + f", of {len(rows)} images")
    # Below this share of the largest an image adds nothing that float32 could hold, and its gradients are numbers too small to reckon with fast.
    kept = weights > 1e-12 * weights.max()
    if none := len(rows) - int(kept.sum()):
        run.print(f"{none} of {len(rows)} images weigh nothing beside the others and are left out")
    return [row for row, own in zip(rows, kept) if own], (weights[kept] * kept.double().mean()).float(), statistics


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "Reward-weighted regression")
    run.batches(args.num_samples_per_epoch)
    rows, weights, statistics = weighted(run, load_rows(run, "scored"))
    real = load_captioned(run, args.pretrain_dataset_name) if args.pretrain_weight else []
    training = OfflineTraining(run, rows)
    pretraining = Examples(run, training.policy, real, "pretraining") if real else None

    for step in training.steps(**statistics):  # optimizer steps, each made when the loop comes back
        for b in step.batches:
            # 1 images with noise
            index, side = training.examples.batch(step.epoch, b)
            sides = [side] + ([pretraining.batch(step.epoch, b)[1]] if pretraining else [])
            own_weights = weights[index].to(training.policy.device)

            # 2 what the pretrained model makes of them
            if args.kl_weight:
                training.reference(side)

            # 3 loss and update
            def loss(own, real=None):
                options = {"kl_weight": args.kl_weight, "pretrain_weight": args.pretrain_weight}
                return reward_weighted_loss(own.error, own_weights, own.distance, real.error if real else 0.0, **options)

            value, (own, *_) = descend(run, training.policy, loss, sides, step.weight)
            metrics = {"loss": value, "weighted_error": own_weights * own.error, "error": own.error}
            metrics |= {"ref_distance": own.distance} if args.kl_weight else {}
            step.log(**{name: number.mean().item() for name, number in metrics.items()})


if __name__ == "__main__":
    main()
