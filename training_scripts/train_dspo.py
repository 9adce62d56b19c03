"""DSPO: score matching on the preferred images of pairs, with the preference's own score in the target.

    accelerate launch training_scripts/train_dspo.py --config training_scripts/recipes/dspo_mini_sd3.yaml --dataset_name my_pairs

The algorithm's page is `diffusers_align/algorithms/dspo.py`; docs/preference_data.md says what the data may look like.
"""

from typing import Literal

from pydantic import model_validator

from diffusers_align.training.flags.data import DataArguments, PairArguments
from diffusers_align.training.flags.options import NonNegative, Positive, option, parse

BETA = {"score": 0.001, "distance": 1000.0}  # the official code's, for SD 1.5 and for SDXL


class DSPOArguments(PairArguments, DataArguments, defaults={"rank": 16, "learning_rate": 1e-5}):
    """DSPO"""

    objective: Literal["score", "distance"] = option("score", "the paper's and the official code's for SD 1.5, or that code's for SDXL")
    beta: Positive | None = option(None, "temperature of the implicit reward; 0.001 for score, 1000 for distance if absent")
    dspo_beta: NonNegative = option(0.001, "weight of the reward's score; 0 is fine-tuning on winners", needs={"objective": "score"})

    @model_validator(mode="after")
    def _fill_beta(self):
        self.beta = BETA[self.objective] if self.beta is None else self.beta
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(DSPOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from diffusers_align.algorithms.diffusion_dpo import describe_beta, preference_metrics
from diffusers_align.algorithms.dspo import dspo_loss
from diffusers_align.training import Run
from diffusers_align.training.offline.descent import descend
from diffusers_align.training.offline.loop import OfflineTraining
from diffusers_align.training.offline.rows import load_rows


def pair_loss(args, winner, loser, ref_errors, labels):
    """The loss of each pair, (B,). DSPO knows no labels: one of p is the pair and its opposite, weighted p and 1 - p."""
    options = {"beta": args.beta, "dspo_beta": args.dspo_beta, "objective": args.objective}
    loss = dspo_loss(winner.error, loser.error, *ref_errors, winner.distance, **options)
    return labels * loss + (1 - labels) * dspo_loss(loser.error, winner.error, *ref_errors[::-1], loser.distance, **options)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DSPO")
    run.batches(args.num_samples_per_epoch)
    training = OfflineTraining(run, load_rows(run, "pair"))

    for step in training.steps():  # optimizer steps, each made when the loop comes back
        for b in step.batches:
            # 1 pairs, with the same noise for both
            sides, labels, weights = training.examples.pairs(step.epoch, b)
            run.explain_once(describe_beta(args.beta, sides[0].x_t[0].numel()))

            # 2 what the pretrained model makes of them
            training.reference(*sides)
            ref_errors = [side.ref_error for side in sides]

            # 3 loss and update
            def loss(winner, loser):
                return weights * pair_loss(args, winner, loser, ref_errors, labels)

            value, found = descend(run, training.policy, loss, sides, step.weight)
            metrics = preference_metrics(*(own.error for own in found), *ref_errors, beta=args.beta, label=labels)
            coefficient = args.dspo_beta * metrics["gradient_weight"]
            step.log(**metrics, loss=value.mean().item(), ref_distance=found[0].distance.mean().item(), dspo_coefficient=coefficient)


if __name__ == "__main__":
    main()
