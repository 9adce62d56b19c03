"""MV-GRPO: Flow-GRPO that looks at each group of images under several captions. Experimental.

    accelerate launch training_scripts/train_mv_grpo.py --config training_scripts/recipes/mv_grpo_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/mv_grpo.py` (https://arxiv.org/abs/2603.12648).
"""

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import WITH_STRENGTH, SamplingArguments
from diffusers_align.training.flags.methods import GroupArguments, NoiseLevel, check_window
from diffusers_align.training.flags.options import NonNegative, Positive, PositiveShare, StepIndex, option, parse, required


class MVGRPOArguments(GroupArguments, SamplingArguments, defaults={"global_std": False}):
    """MV-GRPO"""

    views: str = required(".json or .jsonl file of captions, or a function (prompt, images or None) -> captions: module:function")
    num_views: Annotated[int, Interval(ge=1, le=1000)] = option(
        2, "captions beside the prompt, drawn anew for each group and epoch; without any, train_flow_grpo.py is this algorithm"
    )
    posterior_views: bool = option(False, "hand the group's images to the function: a captioner, no rewriter")
    sde_type: Literal["flow_grpo", "dance_grpo", "memoryless", "memoryless_em"] = option("flow_grpo", "kernel of the noise: the papers'")
    noise_level: NoiseLevel | None = option(None, "the papers' a or eta; 0.7 for flow_grpo, 0.3 for dance_grpo if absent", needs={"sde_type": WITH_STRENGTH})
    sde_window: tuple[StepIndex, StepIndex] | None = option(None, "steps with noise; all if absent", metavar=("FIRST", "END"))
    timestep_fraction: PositiveShare = option(0.99, "train the first steps only; 0.99 leaves out the last one")
    clip_range: Positive = option(1e-4, "of the ratio per dimension")
    kl_beta: NonNegative = option(0.0, "weight of the Gaussian KL to the pretrained model, under each view")

    @model_validator(mode="after")
    def _check_views(self):
        self.noise_level = (0.3 if self.sde_type == "dance_grpo" else 0.7) if self.noise_level is None else self.noise_level
        check_window(self.sde_window, self.num_inference_steps)
        if self.multi_reward != "sum":
            raise ValueError(f"--multi_reward {self.multi_reward}: for each view there is only the sum of the rewards; leave it out")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(MVGRPOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from diffusers_align.algorithms.flow_grpo import gaussian_kl
from diffusers_align.algorithms.mv_grpo import mv_grpo_loss
from diffusers_align.rl import describe_clip, ratio_diagnostics
from diffusers_align.training import Report, Run
from diffusers_align.training.online.captions import decoded, load_views, view_conditions, view_log_probs, view_rewards, write_views
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.sampling import sample_epoch


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "MV-GRPO")
    num_batches, batches_a_step = run.batches(args.num_prompts_per_epoch * args.group_size)
    report = Report(run)
    writer = load_views(args.views, report.prompts, args.num_views)
    policy = run.load_policy(sde_type=args.sde_type, noise_level=args.noise_level, sde_window=args.sde_window)
    policy.remember_prompts(max(32, (1 + args.num_views) * num_batches + 2))
    run.load_optimizer(args.num_epochs * -(-num_batches // batches_a_step))
    run.resume()
    report.start()

    for epoch in run.epochs():
        # 1 roll out, and look at the images under every view
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, args.group_size, args.same_latent)
        trajectory, images = samples.batches[0], decoded(run, policy, samples)
        last = int(trajectory.num_steps * args.timestep_fraction)
        steps = [k for k in trajectory.noisy_steps if k < max(1, last)]
        dimensions = trajectory.final[0].numel()
        run.explain_once(describe_clip(args.clip_range, dimensions))
        captions = write_views(run, writer, samples, images, epoch)
        rewards = view_rewards(run, report.reward, samples, images, captions)
        conditions = view_conditions(samples, captions)
        old = [view_log_probs(run, policy, trajectory, calls, steps) for trajectory, calls in zip(samples.batches, conditions)]

        # 2 advantages
        advantages = advantages_of(samples, args, report.reward, rewards).to(run.accelerator.device)

        # 3 loss and update
        diagnostics, norms, kls = [], [], []
        for chunk in run.chunks(num_batches, batches_a_step):
            diagnostics.append([])
            weight = run.loss_weight(samples, chunk, len(steps))
            for b, view in [(b, view) for b in chunk for view in range(len(captions))]:
                trajectory, condition, reference = samples.batches[b], conditions[b][view], {}
                advantage, before = advantages[samples.index[b], view], old[b][view]
                if args.kl_beta > 0:
                    with policy.reference(), run.accelerator.autocast():
                        reference = policy.transitions(trajectory, steps, condition)

                def on_step(k, transition):
                    new = transition.log_prob(trajectory.actions[:, k])
                    loss = mv_grpo_loss(new, before[k], advantage, num_views=len(captions), per_dim=dimensions, clip_range=args.clip_range)
                    if args.kl_beta > 0:
                        kl = gaussian_kl(transition.mean, reference[k].mean, transition.std)
                        loss = loss + args.kl_beta * kl / len(captions)
                        kls.append(kl.mean().item())
                    run.accelerator.backward(loss.sum() * weight)
                    diagnostics[-1].append(ratio_diagnostics(new, before[k], args.clip_range, dimensions))

                with run.accelerator.autocast():
                    policy.replay(trajectory, on_step, steps, condition)
            norms.append(run.optimizer_step())
        run.log(run.epoch_metrics(samples, diagnostics, norms, {"kl": kls, "reward/view": [rewards[:, 1:].nanmean().item()]}))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
