"""VADER: align a video pipeline with a differentiable reward of some decoded frames; image pipelines as well.

    accelerate launch training_scripts/train_vader.py --config training_scripts/recipes/vader_wan.yaml

The algorithm's page is `diffusers_align/algorithms/vader.py` (https://arxiv.org/abs/2407.08737).
"""

from typing import Annotated, Literal

from annotated_types import Interval

from diffusers_align.training.flags.methods import RewardGradientArguments
from diffusers_align.training.flags.options import option, parse

# Official (mihirp1998/VADER): 50 steps, eta 1, LoRA of rank 8 to 16, |1 - HPS|, no penalty.
DEFAULTS = {"rank": 16, "lora_alpha": 16, "num_inference_steps": 50, "learning_rate": 2e-4, "stochastic": True, "reward_map": "distance"}


class VADERArguments(RewardGradientArguments, defaults=DEFAULTS):
    """VADER"""

    backprop_mode: Literal["last", "random", "specific"] = option("last", "gradient through the last step, from a random one on, or a given one")
    backprop_step: Annotated[int, Interval(ge=0, le=49)] = option(15, "the first step with gradient, in steps of 50", needs={"backprop_mode": "specific"})
    frames: Literal["random", "ends", "alternate", "all"] = option("random", "which frames of a video are decoded and scored")

    def usual_target(self):
        return 1.0 if self.reward_map == "distance" else None


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(VADERArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from diffusers_align.algorithms.vader import frame_indices, grad_steps, vader_loss
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.training import Run
from diffusers_align.training.gradient.loop import RewardTraining
from diffusers_align.training.gradient.reward_check import count_frames


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "VADER")
    training = RewardTraining(run)
    num_frames = count_frames(training.policy, training.report.prompts[0])
    if num_frames is None and args.given("frames"):
        run.print(f"--frames {args.frames} has no effect: the pipeline makes images, not videos.")
    num_steps = training.check_reward(frames=None if num_frames is None else [0])

    for update in training.updates():  # optimizer steps, each made when the loop comes back
        # 1 the steps that carry the gradient, and the frames that are decoded
        steps = grad_steps(num_steps, update.generator, mode=args.backprop_mode, specific=args.backprop_step)
        frames = None if num_frames is None else frame_indices(num_frames, update.generator, mode=args.frames)
        training.logged["truncation"].append(len(steps))
        for batch in update.batches:
            with run.accelerator.autocast():
                # 2 differentiable roll-out
                rollout = differentiable_rollout(training.policy, batch.condition, grad_steps=steps, frames=frames, **training.rollout_options)

                # 3 reward, loss and update
                rewards = batch.reward(rollout.images.float())
                loss = vader_loss(rewards, training.reward_map)
            training.descend(update, batch, rollout, rewards, loss)


if __name__ == "__main__":
    main()
