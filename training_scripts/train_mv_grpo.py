"""MV-GRPO: Flow-GRPO that looks at each group of images under several captions. Experimental.

    accelerate launch training_scripts/train_mv_grpo.py --config training_scripts/recipes/mv_grpo_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/mv_grpo.py` (https://arxiv.org/abs/2603.12648).
"""

from typing import Annotated

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import KLShareArguments, NoiseArguments, NoisyGroupArguments, ReplayArguments, StepArguments
from diffusers_align.training.flags.options import NonNegative, Positive, option, parse, required

DEFAULTS = {"global_std": False, "sde_type": "flow_grpo"}


class MVGRPOArguments(
    NoisyGroupArguments, NoiseArguments, StepArguments, ReplayArguments, KLShareArguments, SamplingArguments, defaults=DEFAULTS, advanced={"eta"}
):
    """MV-GRPO"""

    views: str = required(".json or .jsonl file of captions, or a function (prompt, images or None) -> captions: module:function", resume="content")
    num_views: Annotated[int, Interval(ge=1, le=1000)] = option(
        2, "captions beside the prompt, drawn anew for each group and epoch; without any, train_flow_grpo.py is this algorithm"
    )
    posterior_views: bool = option(False, "hand the group's images to the function: a captioner, no rewriter")
    clip_range: Positive = option(1e-4, "of the ratio per dimension")
    kl_weight: NonNegative = option(0.0, "of the Gaussian KL to the pretrained model, under each view", was="kl_beta", resume="takes effect")

    @model_validator(mode="after")
    def _check_views(self):
        if self.sde_type == "cps":
            raise ValueError("--sde_type cps needs a loss of its own scale, which train_flow_grpo.py has: choose another one")
        if self.multi_reward != "sum":
            raise ValueError(f"--multi_reward {self.multi_reward}: for each view there is only the sum of the rewards; leave it out")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(MVGRPOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from functools import partial

from diffusers_align.algorithms.flow_grpo import gaussian_kl
from diffusers_align.algorithms.mv_grpo import mv_grpo_loss
from diffusers_align.training import Report, Run
from diffusers_align.training.online.captions import decoded, load_views, view_rewards, view_trajectories, write_views
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.policy_gradient import policy_gradient_epoch
from diffusers_align.training.online.sampling import noise_fields, sample_epoch
from diffusers_align.training.online.trained_steps import trained_steps


def loss(args, advantages, step):
    """A view's part of the loss of a step, (B,)."""
    options = {"num_views": 1 + args.num_views, "per_dim": step.per_dim, "clip_range": args.clip_range}
    return mv_grpo_loss(step.log_prob, step.old_log_prob, advantages[step.index, step.view], **options)


def kl(step, reference):
    """The divergence from the pretrained model under the same view, (B,)."""
    return gaussian_kl(step.transition.mean, reference.mean, step.transition.std)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "MV-GRPO")
    num_batches, _ = run.batches(args.num_prompts_per_epoch * args.group_size)
    report = Report(run)
    writer = load_views(args.views, report.prompts, args.num_views)
    policy = run.load_policy(**noise_fields(args))
    policy.remember_prompts(max(32, (1 + args.num_views) * num_batches + 2))
    run.load_optimizer(args.num_epochs * run.division.num_steps)
    run.resume()
    report.start()
    options = {"clip_range": args.clip_range, "kl": kl, "kl_weight": args.kl_weight, "kl_share": args.kl_share}

    for epoch in run.epochs():
        # 1 roll out, and look at the images under every view
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, args.group_size, args.same_latent)
        steps = trained_steps(samples.batches[0], args.timestep_fraction, args.random_timestep_fraction, f"{args.seed}/{epoch}/steps")
        images = decoded(run, policy, samples)
        captions = write_views(run, writer, samples, images, epoch)
        rewards = view_rewards(run, report.reward, samples, images, captions)
        views = view_trajectories(run, policy, samples, captions, steps)

        # 2 advantages under each view
        advantages = advantages_of(samples, args, report.reward, rewards).to(run.accelerator.device)

        # 3 loss
        objective = partial(loss, args, advantages)

        # 4 update
        logged = {"reward/view": [rewards[:, 1:].nanmean().item()]}
        run.log(policy_gradient_epoch(run, policy, samples, steps, objective, views=views, logged=logged, **options))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
