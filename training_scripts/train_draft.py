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
    early_stop: StepIndex = option(0, "leave out at most so many of the last steps, drawn", needs={"method": "drtune"})
    wanted_words: Words = option("Realistic photo of", "what comes before the prompt in the text to move towards", needs=SRPO)
    unwanted_words: Words = option("CG render of", "and in the text to move away from", needs=SRPO)
    adjoint: bool = option(False, "gradients step by step from stored states, for one-step solvers", needs={"method": ("draft", "draft_k")})

    @model_validator(mode="after")
    def _check_method(self):
        steps = self.num_inference_steps
        if self.adjoint and (self.method not in ("draft", "draft_k") or self.kl_weight or self.stochastic or self.mixed_precision == "fp16"):
            raise ValueError("--adjoint is for --method draft and draft_k along an ODE, without --kl_weight, --stochastic and fp16")
        if self.method == "srpo" and self.kl_weight:
            raise ValueError("--method srpo trains no step of the roll-out, so there is none to hold with --kl_weight")
        if self.method == "draft_k" and self.truncation > steps:
            raise ValueError(f"--truncation must be a whole number from 1 to the {steps} solver steps of --num_inference_steps, got {self.truncation}")
        if self.method == "drtune" and self.num_trained_steps + self.early_stop > steps:
            raise ValueError(
                f"--num_trained_steps {self.num_trained_steps} and --early_stop {self.early_stop} are more than the {steps} steps of --num_inference_steps"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_reward_map(cls, values):
        if values.get("method") == "srpo" and values.get("reward_map", "none") == "none":
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
from diffusers_align.training import Report, Run
from diffusers_align.training.gradient import renoised
from diffusers_align.training.gradient import updates as shared
from diffusers_align.training.gradient.pretraining import Pretraining


def choices(args, num_steps, generator):
    """Which steps of the roll-out carry gradient."""
    if args.method == "srpo":
        return {"grad_steps": [], "decode": False}
    if args.method == "drtune":
        steps, stop = drtune.grad_steps(num_steps, generator, number=args.num_trained_steps, early_stop=args.early_stop)
        return {"grad_steps": steps, "stop_step": stop, "detach_input": True}
    return {"grad_steps": draft.grad_steps(num_steps, {"draft": None, "draft_k": args.truncation, "draft_lv": 1}[args.method])}


def scored_loss(run, policy, batch, rollout, k, logged):
    """The loss (B,) of a roll-out's rewards; `k` is SRPO's step."""
    args, reward_map = run.args, shared.reward_map(run.args)
    if args.method == "srpo":
        denoised, inverted = renoised.aligned_images(policy, rollout, k, **shared.checkpoint_options(args))
        words, number = (args.wanted_words, args.unwanted_words), len(renoised.noising_times(policy, rollout))
        rewards = shared.relative_rewards(run, batch, denoised, words, float(srpo.discounts(number)[k]))
        penalty = shared.relative_rewards(run, batch, inverted, words[::-1], float(srpo.discounts(number, inversion=True)[k]))
        logged["penalty"] += shared.finite(penalty)
        loss = srpo.srpo_loss(rewards, penalty, reward_map)
        if args.reward_map == "hinge":
            logged["hinge_inactive"] += [float(r >= args.reward_target) for r in shared.finite(rewards)]
    else:
        rewards = batch.reward(rollout.images.float())
        if args.method == "draft_lv":
            again = renoised.renoised_images(policy, rollout, args.num_renoised, **shared.checkpoint_options(args))
            loss = draft.low_variance_loss([rewards, *(batch.reward(images) for images in again)], reward_map)
        else:
            loss = draft.draft_loss(rewards, reward_map)
    logged.add_rewards(batch, rewards)
    return loss


def adjoint_update(args, run, policy, update, num_steps, logged):
    """The continuous adjoint in the place of the roll-out's graph."""
    truncation = len(draft.grad_steps(num_steps, None if args.method == "draft" else args.truncation))
    for batch in update.batches:
        rewards, mismatch = shared.adjoint_backward(run, policy, batch, truncation, update.weight)
        logged.add_rewards(batch, rewards)
        logged["mismatch"].append(mismatch)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DRaFT")
    batches = run.batches(args.num_samples_per_epoch)
    report, pretraining = Report(run), Pretraining(run)
    policy = shared.load_policy(run)
    clip = shared.GradientClip(run)
    run.load_optimizer(args.num_epochs * -(-batches[0] // batches[1]))
    run.resume()
    num_steps = shared.check_reward(run, policy, report)
    choices(args, num_steps, torch.Generator())  # fails before the evaluation where the call has too few steps
    report.start()

    for epoch in run.epochs():
        logged = shared.EpochLog()
        for update in shared.updates_of_epoch(run, policy, report, epoch, *batches):
            chosen = choices(args, num_steps, update.generator)
            drawn = float(torch.rand((), generator=update.generator))
            if args.adjoint:
                adjoint_update(args, run, policy, update, num_steps, logged)
            for batch in update.batches if not args.adjoint else ():
                with run.accelerator.autocast():
                    # 1 differentiable roll-out
                    rollout = differentiable_rollout(policy, batch.condition, **shared.rollout_options(args), **chosen)
                    levels = renoised.alignable_steps(policy, rollout) if args.method == "srpo" else [0]

                    # 2 reward and loss
                    loss = scored_loss(run, policy, batch, rollout, levels[int(drawn * len(levels))], logged)
                    loss = shared.total_loss(policy, rollout, loss, args, logged)

                # 3 update
                run.accelerator.backward(shared.scored_sum(loss) * update.weight)
            if args.method == "drtune":
                logged["stop_step"].append(chosen["stop_step"])
            pretraining.descend(policy, epoch, update.numbers, logged)
            logged.norms.append(clip.step())
        run.log(logged.metrics(run, report))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
