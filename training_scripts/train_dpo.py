"""Diffusion-DPO and its relatives: align a pipeline with pairs of images of which one is preferred.

    accelerate launch training_scripts/train_dpo.py --config training_scripts/recipes/dpo_mini_sd3.yaml --dataset_name my_pairs

The algorithms' pages are `diffusers_align/algorithms/{diffusion_dpo,mapo,linear_dpo,diffusion_sdpo,inpo}.py`; docs/preference_data.md
says what the data may look like, docs/why_is_my_loss_069.md what to expect of the first epochs.
"""

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.data import DataArguments, PairArguments
from diffusers_align.training.flags.options import Decay, NonNegative, Positive, Probability, StepIndex, option, parse

LINEAR_REFERENCE_DECAY = 0.99  # the official recipes'
OF_LABELS = {"loss": ("sigmoid", "hinge", "ipo", "dmpo")}


class DPOArguments(PairArguments, DataArguments, defaults={"rank": 16, "learning_rate": 1e-5}):
    """Diffusion-DPO"""

    loss: Literal["sigmoid", "hinge", "ipo", "dmpo", "mapo", "linear"] = option("sigmoid", "sigmoid is DPO's own, linear Linear-DPO's")
    beta: Positive | None = option(None, "preference temperature; if absent 5000 for diffusion, 2000 for flow matching; linear 100, 1000; mapo 0.1")
    ipo_tau: Positive = option(0.5, "IPO aims at the logit 1 / (2 tau); 0.5 is our choice, a preference of 73 %", needs={"loss": "ipo"})
    dmpo_alpha: Annotated[float, Interval(gt=0, lt=0.5)] = option(0.01, "DMPO aims at logit(1 - alpha) (official: 0.01)", needs={"loss": "dmpo"})
    linear_eta: Annotated[float, Interval(ge=0, le=0.5)] | None = option(
        None, "Linear-DPO's least weight; if absent 0.001 for diffusion (SD 1.5; SDXL 0), 0.05 for flow matching", needs={"loss": "linear"}
    )
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = option(0.0, "share of labels that are wrong", needs=OF_LABELS)
    sft_weight: NonNegative = option(0.0, "adds so much of the winner's own error", needs=OF_LABELS)
    safeguard_mu: Probability | None = option(None, "Diffusion-SDPO, pair by pair: share of its progress that the winner keeps (SD 1.5 0.9, SDXL 0.6)")
    inversion_steps: StepIndex = option(0, "InPO: noise by so many steps of DDIM inversion, in the place of random noise")
    reference_decay: Decay | None = option(None, "the reference follows the model with this decay; 0: it stays. Linear-DPO 0.99, others 0 if absent")

    @model_validator(mode="after")
    def _check_loss(self):
        if self.loss == "mapo" and self.reference_decay is not None:
            raise ValueError("--loss mapo has no reference, so --reference_decay means nothing")
        if self.loss == "linear" and self.reference_decay is None:
            self.reference_decay = LINEAR_REFERENCE_DECAY
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(DPOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

import torch

from diffusers_align.algorithms.diffusion_dpo import describe_beta, diffusion_dpo_loss, preference_metrics
from diffusers_align.algorithms.diffusion_sdpo import safeguard_scale, scale_gradient
from diffusers_align.algorithms.inpo import inversion_times, invert, inverted_noise
from diffusers_align.algorithms.linear_dpo import linear_dpo_loss, linear_weight
from diffusers_align.algorithms.mapo import mapo_loss, mapo_margin
from diffusers_align.policy import noise_seed
from diffusers_align.training import Run
from diffusers_align.training.offline.descent import descend
from diffusers_align.training.offline.loop import OfflineTraining
from diffusers_align.training.offline.rows import load_rows

# Diffusion, flow matching: official codes of Diffusion-DPO and Linear-DPO (SD 1.5, SD3), Flow-Factory's DPO, MaPO's for SDXL.
BETA = {"mapo": (0.1, 0.1), "linear": (100, 1000), "dpo": (5000, 2000)}
LINEAR_ETA = (1e-3, 0.05)


def pair_loss(args, errors, ref_errors, labels):
    """The loss of each pair, (B,). For MaPO and Linear-DPO, which know no labels, a pair with label p counts as (w, l) with weight p and (l, w) with 1 - p."""
    if args.loss == "mapo":
        return labels * mapo_loss(*errors, beta=args.beta) + (1 - labels) * mapo_loss(*errors[::-1], beta=args.beta)
    if args.loss == "linear":
        options = {"beta": args.beta, "eta": args.linear_eta}
        return labels * linear_dpo_loss(*errors, *ref_errors, **options) + (1 - labels) * linear_dpo_loss(*errors[::-1], *ref_errors[::-1], **options)
    options = {"label": labels, "label_smoothing": args.label_smoothing, "sft_weight": args.sft_weight}
    options |= {"ipo_tau": args.ipo_tau, "dmpo_alpha": args.dmpo_alpha}
    return diffusion_dpo_loss(*errors, *ref_errors, beta=args.beta, kind=args.loss, **options)


def pair_metrics(args, errors, ref_errors, labels):
    """What is logged of a batch; without a reference, the margin is MaPO's."""
    metrics = preference_metrics(*errors, *ref_errors, beta=args.beta, label=labels)
    if args.loss == "mapo":
        own = {name: metrics[name] for name in ("accuracy", "error_w", "error_l") if name in metrics}
        return own | {"margin": mapo_margin(*errors).mean().item()}
    if args.loss == "linear":
        metrics["linear_weight"] = linear_weight(*errors, *ref_errors, beta=args.beta, eta=args.linear_eta).mean().item()
    return metrics


def inverted(examples, x0, places, condition):
    """InPO: each image at the state that the sampler would come from, at the same time as the other's."""
    run, noising = examples.run, examples.noising
    drawn, forward = noising(x0, places, condition), noising.forward
    generators = [torch.Generator().manual_seed(noise_seed(place.seed, "inversion")) for place in places]

    def denoise(x, t):
        output = examples.policy.predict(x, t, condition)
        return forward.to_x0(output, x, t), forward.to_noise(output, x, t)

    times = inversion_times(drawn.t, num_steps=run.args.inversion_steps, clean=forward.clean_timestep)
    with torch.no_grad(), run.accelerator.autocast():
        x_t = invert(x0, times, denoise, lambda t: (forward.alpha(t), forward.sigma(t)), generator=generators)
    return noising.at(x0, x_t, drawn.t, inverted_noise(x_t, x0, forward.alpha(drawn.t), forward.sigma(drawn.t)), condition)


def safeguarded(args, step, sides, winner, loser):
    """The errors of both, the loser's with as much of its gradient as Diffusion-SDPO lets through."""
    if args.safeguard_mu is None:
        return winner.error, loser.error
    scale = safeguard_scale(sides[0].residual(winner.output), sides[1].residual(loser.output), mu=args.safeguard_mu, per_sample=True)
    step.log(safeguard=scale.mean().item())
    return winner.error, scale_gradient(loser.error, scale)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "Diffusion-DPO")
    run.batches(args.num_samples_per_epoch)
    noise = inverted if args.inversion_steps else None
    training = OfflineTraining(run, load_rows(run, "pair"), reference_decay=args.reference_decay or None, noise=noise)
    args.beta = BETA.get(args.loss, BETA["dpo"])[training.is_flow] if args.beta is None else args.beta
    args.linear_eta = LINEAR_ETA[training.is_flow] if args.linear_eta is None else args.linear_eta

    for step in training.steps():  # optimizer steps, each made when the loop comes back
        for b in step.batches:
            # 1 pairs, with the same noise for both
            sides, labels, weights = training.examples.pairs(step.epoch, b)

            # 2 what the pretrained model makes of them
            if args.loss != "mapo":
                run.explain_once(describe_beta(args.beta, sides[0].x_t[0].numel()))
                training.reference(*sides)
            ref_errors = [side.ref_error for side in sides]

            # 3 loss and update
            def loss(winner, loser):
                return weights * pair_loss(args, safeguarded(args, step, sides, winner, loser), ref_errors, labels)

            value, found = descend(run, training.policy, loss, sides, step.weight)
            step.log(loss=value.mean().item(), **pair_metrics(args, [own.error for own in found], ref_errors, labels))


if __name__ == "__main__":
    main()
