"""ReFL: align a pipeline with a differentiable reward of the clean sample predicted in mid-denoising.

    accelerate launch training_scripts/train_refl.py --config training_scripts/recipes/refl_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/refl.py` (https://arxiv.org/abs/2304.05977). The paper's loss on captioned
images, which the official code leaves out, is added by `--pretrain_dataset_name`.
"""

from pydantic import model_validator

from diffusers_align.training.flags.methods import RewardGradientArguments
from diffusers_align.training.flags.options import Probability, option, parse

# Official (THUDM/ImageReward, ReFL.py): 40 steps without guidance, max(0, 2 - r) / 1000 of a normalised reward.
DEFAULTS = {"num_inference_steps": 40, "guidance_scale": 1.0, "reward_map": "hinge", "reward_scale": 1e-3, "adam_weight_decay": 1e-2}


class ReFLArguments(RewardGradientArguments, defaults=DEFAULTS):
    """ReFL"""

    window: tuple[Probability, Probability] = option(
        (0.75, 0.975), "where to predict, in fractions of the chain; the next step where none lies there", metavar=("FIRST", "LAST")
    )

    def usual_target(self):
        return 2.0 if self.reward_map == "hinge" else None

    @model_validator(mode="after")
    def _check_order(self):
        if self.window[0] > self.window[1]:
            raise ValueError(f"--window must be two fractions in order within [0, 1], got {self.window[0]:g} {self.window[1]:g}")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(ReFLArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from diffusers_align.algorithms.refl import middle_step, refl_loss
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.training import Run
from diffusers_align.training.gradient.loop import RewardTraining


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "ReFL")
    training = RewardTraining(run)
    num_steps = training.check_reward()

    for update in training.updates():  # optimizer steps, each made when the loop comes back
        # 1 the step that carries the gradient, at which the roll-out stops
        k = middle_step(num_steps, update.generator, window=tuple(args.window))
        training.logged["step"].append(k)
        for batch in update.batches:
            with run.accelerator.autocast():
                # 2 differentiable roll-out, to the clean sample predicted there
                rollout = differentiable_rollout(training.policy, batch.condition, grad_steps=[k], stop_step=k, **training.rollout_options)

                # 3 reward, loss and update
                rewards = batch.reward(rollout.images.float())
                loss = refl_loss(rewards, training.reward_map)
            training.descend(update, batch, rollout, rewards, loss)


if __name__ == "__main__":
    main()
