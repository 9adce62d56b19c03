"""Diffusion-KTO: align a pipeline with likes and dislikes of single images.

    accelerate launch training_scripts/train_kto.py --config training_scripts/recipes/kto_mini_sd3.yaml --dataset_name my_likes

The algorithm's page is `diffusers_align/algorithms/diffusion_kto.py`; docs/preference_data.md says what the data may look like.
Pairs do as well: an image that won at least once is desirable.
"""

from typing import Literal

from pydantic import model_validator

from diffusers_align.training.flags.data import DataArguments
from diffusers_align.training.flags.options import Decay, NonNegative, Positive, Probability, option, parse


class KTOArguments(DataArguments, defaults={"rank": 16, "learning_rate": 1e-5}):
    """Diffusion-KTO"""

    beta: Positive | None = option(None, "temperature; 5000 for diffusion, 1000 for flow matching if absent")
    utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking", "logistic"] = option("kahneman_tversky", "how gains are valued")
    reference_point: Literal["batch_mean", "class_mean", "mismatched", "ema", "zero"] = option(
        "batch_mean", "what gains are compared with, over an optimizer step"
    )
    reference_point_decay: Decay = option(0.99, "of the running mean", needs={"reference_point": "ema"})
    clamp: bool = option(True, "a reference point of no less than 0")
    gamma: Probability = option(0.8, "share of desirable images in training, whatever it is in the data")
    lambda_d: NonNegative = option(1.0, "weight of desirable images")
    lambda_u: NonNegative = option(1.0, "weight of undesirable images")

    @model_validator(mode="after")
    def _check_weights(self):
        if not self.gamma * self.lambda_d + (1 - self.gamma) * self.lambda_u:
            raise ValueError("--gamma, --lambda_d and --lambda_u leave no image with a weight")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(KTOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from dataclasses import replace

import torch

from diffusers_align.algorithms.diffusion_kto import ReferencePoint, describe_balance, kto_loss, kto_metrics
from diffusers_align.data import balanced_batch_of
from diffusers_align.training import Run
from diffusers_align.training.offline.descent import descend, measure
from diffusers_align.training.offline.loop import OfflineTraining
from diffusers_align.training.offline.rows import load_rows

BETA = (5000, 1000)  # diffusion (the paper), flow matching: the logit scale of Diffusion-DPO's 2000


def balanced(run, rows):
    """How to draw rows: of either class by its share. Says how the classes weigh in the data and in training.

    Raises:
        ValueError: a class is empty that training asks for.
    """
    args, classes = run.args, [[i for i, row in enumerate(rows) if row["label"] is kind] for kind in (True, False)]
    run.print(f"data: {describe_balance(*map(len, classes))}")
    drawn = round(args.gamma * args.num_samples_per_epoch)
    run.print(f"an epoch: {describe_balance(drawn, args.num_samples_per_epoch - drawn, args.lambda_d, args.lambda_u)}")

    def draw(step, size, seed):
        return balanced_batch_of(step, size, *classes, seed, gamma=args.gamma)

    draw(0, 1, args.seed)  # raises now what it would raise after the model is loaded and evaluated
    return draw


def measured(training, sides, graph):
    """What model and reference make of each of `sides`, batch by batch as the loss sees them; with `graph`, the loss can go back through it."""
    for side in sides:
        training.reference(side)
    with torch.set_grad_enabled(graph):
        return [measure(training.run, training.policy, side)[0] for side in sides]


def gains(sides, found):
    """How much better than the reference the model denoises each image, (N,) for all of `sides`."""
    return torch.cat([side.ref_error - own.error.detach() for side, own in zip(sides, found)])


def with_others_captions(sides, captions, places):
    """The same noised images, each under the caption of the next of the optimizer step that has another one.

    `captions` are those of the step on all processes, `places` for each of `sides` where its images are among them.
    """
    if len(set(captions)) < 2:
        raise ValueError(
            f"An optimizer step whose images have one caption ({captions[0]!r}) has no other's: raise --train_batch_size, or choose another --reference_point."
        )
    turned = [next(other for other in captions[i:] + captions[:i] if other != own) for i, own in enumerate(captions)]
    return [replace(side, condition=replace(side.condition, prompts=[turned[i] for i in own])) for side, own in zip(sides, places)]


def mismatched_gains(training, step, sides):
    """The gains of the same noised images under others' captions, of the whole optimizer step on all processes."""
    division = training.run.division
    positions = division.step(division.step_of(step.batches[0]))
    captions = training.examples.captions(training.examples.at(step.epoch, positions))
    places = [[i - positions.start for i in division.batches[b]] for b in step.batches]
    sides = with_others_captions(sides, captions, places)
    return gains(sides, measured(training, sides, graph=False))


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "Diffusion-KTO")
    _, batches_a_step = run.batches(args.num_samples_per_epoch)
    rows = load_rows(run, "binary")
    training = OfflineTraining(run, rows, draw=balanced(run, rows), batches_in_turn=batches_a_step)
    args.beta = args.beta if args.beta is not None else BETA[training.is_flow]
    point_of = ReferencePoint(args.reference_point, decay=args.reference_point_decay, clamp=args.clamp)
    run.register("reference_point", point_of)

    for step in training.steps():  # optimizer steps, each made when the loop comes back
        # 1 images with noise
        index, sides = zip(*(training.examples.batch(step.epoch, b) for b in step.batches))
        labels = [torch.tensor([rows[i]["label"] for i in own], device=training.policy.device) for own in index]

        # 2 their gains over the pretrained model, and those that they are compared with; a step of one batch is measured with its graph, which the loss uses
        other = mismatched_gains(training, step, sides) if args.reference_point == "mismatched" else None
        once = len(sides) == 1
        found = measured(training, sides, graph=once)
        gain = gains(sides, found)
        point = point_of(gain, torch.cat(labels), mismatched_gain=other, reduce=lambda total: run.accelerator.reduce(total, "sum"))

        # 3 loss and update
        for side, liked, own in zip(sides, labels, found):

            def loss(own):
                options = {"beta": args.beta, "utility": args.utility, "lambda_d": args.lambda_d, "lambda_u": args.lambda_u}
                return kto_loss(own.error, side.ref_error, liked, point, **options)

            value, (own,) = descend(run, training.policy, loss, [side], step.weight, measured=[own] if once else None)
            step.log(**kto_metrics(own.error, side.ref_error, liked, point, beta=args.beta), loss=value.mean().item())


if __name__ == "__main__":
    main()
