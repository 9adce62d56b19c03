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

    window: tuple[Probability, Probability] = option((0.75, 0.975), "where to predict, in fractions of the chain", metavar=("FIRST", "LAST"))

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
from diffusers_align.training import Report, Run
from diffusers_align.training.gradient import updates as shared
from diffusers_align.training.gradient.pretraining import Pretraining


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "ReFL")
    batches = run.batches(args.num_samples_per_epoch)
    report, pretraining = Report(run), Pretraining(run)
    policy = shared.load_policy(run)
    clip = shared.GradientClip(run)
    run.load_optimizer(args.num_epochs * -(-batches[0] // batches[1]))
    run.resume()
    num_steps = shared.check_reward(run, policy, report)
    report.start()

    for epoch in run.epochs():
        logged = shared.EpochLog()
        for update in shared.updates_of_epoch(run, policy, report, epoch, *batches):
            k = middle_step(num_steps, update.generator, window=tuple(args.window))
            for batch in update.batches:
                with run.accelerator.autocast():
                    # 1 differentiable roll-out
                    rollout = differentiable_rollout(policy, batch.condition, grad_steps=[k], stop_step=k, **shared.rollout_options(args))

                    # 2 reward and loss
                    rewards = batch.reward(rollout.images.float())
                    loss = shared.total_loss(policy, rollout, refl_loss(rewards, shared.reward_map(args)), args, logged)

                # 3 update
                run.accelerator.backward(shared.scored_sum(loss) * update.weight)
                logged.add_rewards(batch, rewards)
                if args.reward_map == "hinge":
                    logged["hinge_inactive"] += [float(r >= args.reward_target) for r in shared.finite(rewards)]
            logged["step"].append(k)
            pretraining.descend(policy, epoch, update.numbers, logged)
            logged.norms.append(clip.step())
        run.log(logged.metrics(run, report))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
