"""AlignProp: align a pipeline with a differentiable reward by its gradient through sampling, cut at a random step.

    accelerate launch training_scripts/train_alignprop.py --config training_scripts/recipes/alignprop_mini_sd.yaml

The algorithm's page is `diffusers_align/algorithms/alignprop.py` (https://arxiv.org/abs/2310.03739).
"""

from typing import Annotated, Literal

from annotated_types import Interval

from diffusers_align.training.flags.methods import RewardGradientArguments
from diffusers_align.training.flags.options import option, parse

# Official (mihirp1998/AlignProp): DDIM of 50 steps, eta 1, guidance 5, LoRA of rank and alpha 4, (1 - HPS) / 100.
DEFAULTS = {
    "rank": 4, "lora_alpha": 4, "num_inference_steps": 50, "guidance_scale": 5.0, "learning_rate": 1e-3, "stochastic": True,
    "reward_map": "shortfall", "reward_scale": 0.01,
}  # fmt: skip


class AlignPropArguments(RewardGradientArguments, defaults=DEFAULTS):
    """AlignProp"""

    truncation_schedule: Literal["gaussian", "uniform", "fixed"] = option("gaussian", "how the first step with gradient is drawn")
    truncation_mean: Annotated[float, Interval(ge=1, lt=50)] = option(
        42.0, "in steps of 50; draws beyond 1 to 49 are repeated", needs={"truncation_schedule": "gaussian"}
    )
    truncation_std: Annotated[float, Interval(ge=0, le=50)] = option(5.0, "in steps of 50", needs={"truncation_schedule": "gaussian"})
    truncation_step: Annotated[int, Interval(ge=0, le=49)] = option(49, "in steps of 50", needs={"truncation_schedule": "fixed"})

    def usual_target(self):
        return 1.0 if self.reward_map == "shortfall" else None


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(AlignPropArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from diffusers_align.algorithms.alignprop import alignprop_loss, grad_steps, truncation
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.training import Run
from diffusers_align.training.gradient.loop import RewardTraining


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "AlignProp")
    training = RewardTraining(run)
    num_steps = training.check_reward()
    schedule = {"strategy": args.truncation_schedule, "mean": args.truncation_mean, "std": args.truncation_std, "fixed": args.truncation_step}

    for update in training.updates():  # optimizer steps, each made when the loop comes back
        # 1 the steps that carry the gradient: the last ones, from a random one on
        steps = grad_steps(num_steps, truncation(num_steps, update.generator, **schedule))
        training.logged["truncation"].append(len(steps))
        for batch in update.batches:
            with run.accelerator.autocast():
                # 2 differentiable roll-out
                rollout = differentiable_rollout(training.policy, batch.condition, grad_steps=steps, **training.rollout_options)

                # 3 reward, loss and update
                rewards = batch.reward(rollout.images.float())
                loss = alignprop_loss(rewards, training.reward_map)
            training.descend(update, batch, rollout, rewards, loss)


if __name__ == "__main__":
    main()
