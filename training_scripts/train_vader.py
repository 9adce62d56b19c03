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
from diffusers_align.training import Report, Run
from diffusers_align.training.gradient import updates as shared
from diffusers_align.training.gradient.pretraining import Pretraining


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "VADER")
    batches = run.batches(args.num_samples_per_epoch)
    report, pretraining = Report(run), Pretraining(run)
    policy = shared.load_policy(run)
    clip = shared.GradientClip(run)
    run.load_optimizer(args.num_epochs * -(-batches[0] // batches[1]))
    run.resume()
    num_frames = shared.count_frames(policy, report.prompts[0])
    if num_frames is None and args.given("frames"):
        run.print(f"--frames {args.frames} has no effect: the pipeline makes images, not videos.")
    num_steps = shared.check_reward(run, policy, report, frames=None if num_frames is None else [0])
    report.start()

    for epoch in run.epochs():
        logged = shared.EpochLog()
        for update in shared.updates_of_epoch(run, policy, report, epoch, *batches):
            steps = grad_steps(num_steps, update.generator, mode=args.backprop_mode, specific=args.backprop_step)
            frames = None if num_frames is None else frame_indices(num_frames, update.generator, mode=args.frames)
            for batch in update.batches:
                with run.accelerator.autocast():
                    # 1 differentiable roll-out
                    rollout = differentiable_rollout(policy, batch.condition, grad_steps=steps, frames=frames, **shared.rollout_options(args))

                    # 2 reward and loss
                    rewards = batch.reward(rollout.images.float())
                    loss = shared.total_loss(policy, rollout, vader_loss(rewards, shared.reward_map(args)), args, logged)

                # 3 update
                run.accelerator.backward(shared.scored_sum(loss) * update.weight)
                logged.add_rewards(batch, rewards)
            logged["truncation"].append(len(steps))
            pretraining.descend(policy, epoch, update.numbers, logged)
            logged.norms.append(clip.step())
        run.log(logged.metrics(run, report))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
