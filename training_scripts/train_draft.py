"""DRaFT and its relatives: align a pipeline with a differentiable reward by its gradient through sampling.

    accelerate launch training_scripts/train_draft.py --config training_scripts/recipes/draft_mini_sd3.yaml

The algorithms' pages are `diffusers_align/algorithms/{draft,drtune,srpo}.py`, and `continuous_adjoint.py` for `--adjoint`.
"""

from typing import Annotated, Literal

from pydantic import StringConstraints, model_validator

from diffusers_align.training.flags.methods import RewardGradientArguments
from diffusers_align.training.flags.options import StepIndex, Steps, option, parse

# The paper prints no table of learning rate, rank and batch: AlignProp's, https://arxiv.org/abs/2310.03739.
DEFAULTS = {"rank": 4, "lora_alpha": 4, "num_inference_steps": 50, "learning_rate": 1e-3}
Words = Annotated[str, StringConstraints(min_length=0)]
SRPO = {"method": "srpo"}


class DRaFTArguments(RewardGradientArguments, defaults=DEFAULTS):
    """DRaFT"""

    method: Literal["draft", "draft_k", "draft_lv", "drtune", "srpo"] = option(
        "draft_k", "all steps; the last ones; the last one on several noises; spaced; any level"
    )
    truncation: Steps = option(1, "number of last steps with gradient", needs={"method": "draft_k"})
    num_renoised: Steps = option(2, "how often a sample is noised and denoised anew", needs={"method": "draft_lv"})
    num_trained_steps: Steps = option(5, "evenly spaced steps with gradient", needs={"method": "drtune"})
    skip_last_steps: StepIndex = option(
        0, "leave out up to so many of the last steps, a number drawn anew each time", needs={"method": "drtune"}, advanced=True, was="early_stop"
    )
    wanted_words: Words = option("Realistic photo of", "what comes before the prompt in the text to move towards", needs=SRPO)
    unwanted_words: Words = option("CG render of", "and in the text to move away from", needs=SRPO)
    adjoint: bool = option(False, "gradients step by step from stored states, for one-step solvers", needs={"method": ("draft", "draft_k")}, advanced=True)

    @model_validator(mode="after")
    def _check_method(self):
        steps = self.num_inference_steps
        if self.adjoint and (self.method not in ("draft", "draft_k") or self.kl_weight or self.stochastic or self.mixed_precision == "fp16"):
            raise ValueError("--adjoint is for --method draft and draft_k along an ODE, without --kl_weight, --stochastic and fp16")
        if self.method == "srpo" and self.kl_weight:
            raise ValueError("--method srpo trains no step of the roll-out, so there is none to hold with --kl_weight")
        if self.method == "draft_k" and self.truncation > steps:
            raise ValueError(f"--truncation must be a whole number from 1 to the {steps} solver steps of --num_inference_steps, got {self.truncation}")
        if self.method == "drtune" and self.num_trained_steps + self.skip_last_steps > steps:
            raise ValueError(
                f"--num_trained_steps {self.num_trained_steps} and --skip_last_steps {self.skip_last_steps} are more than the {steps} steps of "
                "--num_inference_steps"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_reward_map(cls, values):
        if values.get("method") == "srpo" and "reward_map" not in values:
            return {"reward_target": 0.7, **values, "reward_map": "hinge"}  # official, on normalised HPS
        return values


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(DRaFTArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

import torch

from diffusers_align.algorithms import draft, drtune, srpo
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.training import Run
from diffusers_align.training.gradient import renoised
from diffusers_align.training.gradient.adjoints import adjoint_backward
from diffusers_align.training.gradient.loop import RewardTraining, checkpoint_options
from diffusers_align.training.gradient.losses import finite


def choices(args, num_steps, generator):
    """Which steps of the roll-out carry gradient."""
    if args.method == "srpo":
        return {"grad_steps": [], "decode": False}
    if args.method == "drtune":
        steps, stop = drtune.grad_steps(num_steps, generator, number=args.num_trained_steps, skip_last_steps=args.skip_last_steps)
        return {"grad_steps": steps, "stop_step": stop, "detach_input": True}
    return {"grad_steps": draft.grad_steps(num_steps, {"draft": None, "draft_k": args.truncation, "draft_lv": 1}[args.method])}


def reward_and_loss(training, batch, rollout, drawn):
    """The rewards of a roll-out and their loss, (B,) each; `drawn` in [0, 1) says where SRPO looks."""
    args, policy, reward_map = training.run.args, training.policy, training.reward_map
    if args.method == "srpo":
        return aligned(training, batch, rollout, drawn)
    rewards = batch.reward(rollout.images.float())
    if args.method == "draft_lv":
        again = renoised.renoised_images(policy, rollout, args.num_renoised, **checkpoint_options(args))
        return rewards, draft.low_variance_loss([rewards, *(batch.reward(images) for images in again)], reward_map)
    return rewards, draft.draft_loss(rewards, reward_map)


def aligned(training, batch, rollout, drawn):
    """SRPO: a step denoised is to be better under the wanted words, a step inverted no worse."""
    run, policy, args = training.run, training.policy, training.run.args
    levels = renoised.alignable_steps(policy, rollout)
    k, number = levels[int(drawn * len(levels))], len(renoised.noising_times(policy, rollout))
    denoised, inverted = renoised.aligned_images(policy, rollout, k, **checkpoint_options(args))
    words = (args.wanted_words, args.unwanted_words)
    rewards = renoised.relative_rewards(run, batch, denoised, words, float(srpo.discounts(number)[k]))
    penalty = renoised.relative_rewards(run, batch, inverted, words[::-1], float(srpo.discounts(number, inversion=True)[k]))
    training.logged["penalty"] += finite(penalty)
    return rewards, srpo.srpo_loss(rewards, penalty, training.reward_map)


def adjoint_update(training, update, num_steps):
    """The continuous adjoint in the place of the roll-out's graph."""
    args = training.run.args
    truncation = len(draft.grad_steps(num_steps, None if args.method == "draft" else args.truncation))
    for batch in update.batches:
        rewards, mismatch = adjoint_backward(training.run, training.policy, batch, truncation, update.weight)
        training.logged.add_rewards(batch, rewards, args)
        training.logged["mismatch"].append(mismatch)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DRaFT")
    training = RewardTraining(run)
    num_steps = training.check_reward()
    choices(args, num_steps, torch.Generator())  # fails before the evaluation where the call has too few steps

    for update in training.updates():  # optimizer steps, each made when the loop comes back
        # 1 the steps that carry the gradient
        chosen, drawn = choices(args, num_steps, update.generator), float(torch.rand((), generator=update.generator))
        if args.method == "drtune":
            training.logged["stop_step"].append(chosen["stop_step"])
        if args.adjoint:
            adjoint_update(training, update, num_steps)
            continue
        for batch in update.batches:
            with run.accelerator.autocast():
                # 2 differentiable roll-out
                rollout = differentiable_rollout(training.policy, batch.condition, **training.rollout_options, **chosen)

                # 3 reward, loss and update
                rewards, loss = reward_and_loss(training, batch, rollout, drawn)
            training.descend(update, batch, rollout, rewards, loss)


if __name__ == "__main__":
    main()
