"""Flow-GRPO and its variants: align a flow-matching pipeline with any reward by group-relative policy optimisation.

    accelerate launch training_scripts/train_flow_grpo.py --config training_scripts/recipes/flow_grpo_mini_sd3.yaml

The algorithms' pages are `diffusers_align/algorithms/{flow_grpo,flow_cps,dance_grpo,mix_grpo,grpo_guard}.py`; a variant is a
recipe, `flow_grpo_{dance,mix,guard,cps}_*`: which noise, which window, which samples and steps, which ratio.
"""

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import WITH_STRENGTH, SamplingArguments, SDEType
from diffusers_align.training.flags.methods import GroupArguments, NoiseLevel
from diffusers_align.training.flags.options import Count, NonNegative, Positive, PositiveShare, StepIndex, Steps, option, parse

KL_BETA = {"official": 0.04, "gaussian": 0.004, "mean_squared": 0.01}
CLIP_RANGE = {"flow_grpo": 1e-4, "flow_cps": 1e-5, "grpo_guard": 2e-6}
NOISE_LEVEL = {"dance_grpo": 0.3, "cps": 0.8}


class FlowGRPOArguments(GroupArguments, SamplingArguments):
    """Flow-GRPO"""

    sde_type: SDEType = option("flow_grpo", "kernel of the noise: the papers'")
    noise_level: NoiseLevel | None = option(
        None, "the papers' a or eta; 0.7 for flow_grpo, 0.3 for dance_grpo, 0.8 for cps if absent", needs={"sde_type": WITH_STRENGTH}
    )
    sde_window_size: Steps | None = option(None, "that many consecutive SDE steps, ODE elsewhere (Fast, MixGRPO); all steps if absent")
    sde_window_range: tuple[StepIndex, StepIndex] | None = option(
        None, "where the window may lie; the first half if absent", metavar=("FIRST", "END"), needs={"sde_window_size": True}
    )
    sde_window_strategy: Literal["random", "progressive", "exp_decay"] = option("random", "Fast draws it, MixGRPO slides it", needs={"sde_window_size": True})
    sde_window_interval: Count = option(
        25, "epochs that a sliding window stays at a place (MixGRPO)", needs={"sde_window_size": True, "sde_window_strategy": ("progressive", "exp_decay")}
    )
    timestep_fraction: PositiveShare = option(0.99, "train the first steps only; 0.99 leaves out the last one")
    random_timesteps: bool = option(False, "train that share of the steps, without the last, drawn each epoch (DanceGRPO)")
    best_of_n: Annotated[int, Interval(ge=2, le=10**6)] | None = option(
        None, "train on that many samples of a group, half the best and half the worst (DanceGRPO); all if absent"
    )
    loss: Literal["flow_grpo", "flow_cps", "grpo_guard"] | None = option(
        None, "the ratio: true, on the CPS code's scale (the default with cps), or GRPO-Guard's"
    )
    clip_range: Positive | None = option(None, f"of the ratio per dimension; by the loss if absent: {CLIP_RANGE}")
    clip_range_high: Positive | None = option(None, "of ratios above 1, where it differs: wider keeps unlikely steps growing (DAPO)")
    kl_beta: NonNegative | None = option(
        None, f"weight of the KL to the reference; by its form if absent: {KL_BETA}; with a window or GRPO-Guard 0, which saves a pass"
    )
    kl_form: Literal["official", "gaussian", "mean_squared"] | None = option(
        None, "official: the exact Gaussian KL times the step's length; mean_squared: FlowCPS's, the default with cps", needs={"kl_beta": True}
    )

    @model_validator(mode="after")
    def _fill_loss(self):
        self.loss = self.loss or ("flow_cps" if self.sde_type == "cps" else "flow_grpo")
        self.kl_form = self.kl_form or ("mean_squared" if self.sde_type == "cps" else "official")
        fast = bool(self.sde_window_size) or self.loss == "grpo_guard"  # the official recipes of both have no KL
        self.kl_beta = (0.0 if fast else KL_BETA[self.kl_form]) if self.kl_beta is None else self.kl_beta
        self.clip_range = CLIP_RANGE[self.loss] if self.clip_range is None else self.clip_range
        self.clip_range_high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        self.noise_level = NOISE_LEVEL.get(self.sde_type, 0.7) if self.noise_level is None else self.noise_level
        if self.loss == "flow_cps" and self.sde_type != "cps":
            raise ValueError(f"--loss flow_cps scales the ratio of --sde_type cps, got --sde_type {self.sde_type}")
        if self.sde_type == "cps" and self.noise_level > 1:
            raise ValueError(f"--noise_level of --sde_type cps must be above 0 and at most 1, got {self.noise_level:g}")
        if self.best_of_n is not None and (self.best_of_n % 2 or self.best_of_n > self.group_size):
            raise ValueError(f"--best_of_n must be even, at least 2 and at most --group_size {self.group_size}, got {self.best_of_n}")
        return self

    @model_validator(mode="after")
    def _check_window(self):
        """Wherever the window moves, all its steps must be trained: never the last one, whose noise some kernels do not have."""
        size, end_of_trained = self.sde_window_size, min(trainable(self.num_inference_steps, self), max(1, self.num_inference_steps - 1))
        if size is None:
            return self
        first, end = self.sde_window_range = self.sde_window_range or (0, max(size, self.num_inference_steps // 2))
        if end - first < size:
            raise ValueError(f"--sde_window_range {first} {end} has no room for a window of --sde_window_size {size}")
        if end > end_of_trained:
            raise ValueError(
                f"--sde_window_range {first} {end} (--sde_window_size {size}) goes beyond the steps that are trained, 0 to {end_of_trained - 1}: "
                f"end it at {end_of_trained}"
            )
        return self


def trainable(number, args):
    """How many of the first solver steps may be trained."""
    return number - 1 if args.random_timesteps else max(1, int(number * args.timestep_fraction))


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(FlowGRPOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

import random

import torch

from diffusers_align.algorithms.dance_grpo import best_and_worst
from diffusers_align.algorithms.flow_cps import cps_log_ratio, flow_cps_loss
from diffusers_align.algorithms.flow_grpo import describe_kl, flow_grpo_loss, kl_penalty
from diffusers_align.algorithms.grpo_guard import grpo_guard_loss, guard_log_ratio
from diffusers_align.algorithms.mix_grpo import window_at
from diffusers_align.rl import describe_clip, ratio_diagnostics
from diffusers_align.training import Report, Run
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.sampling import sample_epoch

# The paper's beta goes with the official form; for ten steps of equal length the exact KL is ten times as large.


def place_window(policy, args, epoch):
    """The window of an epoch is the same for every group and process: groups that mix windows compare unlike samples."""
    if args.sde_window_size is not None:
        (first, end), strategy = args.sde_window_range, args.sde_window_strategy
        window = window_at(epoch, size=args.sde_window_size, first=first, end=end, strategy=strategy, interval=args.sde_window_interval, seed=args.seed)
        policy.scheduler.register_to_config(sde_window=list(window))


def trained_steps(trajectory, args, epoch):
    """The stochastic steps among the first ones, or a random share of all but the last, in order."""
    candidates = [k for k in trajectory.noisy_steps if k < trainable(trajectory.num_steps, args)]
    if not args.random_timesteps:
        return candidates
    share = min(len(candidates), max(1, round(len(candidates) * args.timestep_fraction)))
    return sorted(random.Random(f"{args.seed}/{epoch}/steps").sample(candidates, share))


def policy_loss(args, transition, action, old, old_mean, advantage, step_size):
    """The loss (B,) of one step, and its diagnostics."""
    dimensions, new, clip_range = action[0].numel(), transition.log_prob(action), (args.clip_range, args.clip_range_high)
    if args.loss == "grpo_guard":
        log_ratio = guard_log_ratio(new, old, transition.mean, old_mean, transition.std, per_dim=dimensions)
        loss = grpo_guard_loss(log_ratio, advantage, step_size, clip_range=clip_range)
    elif args.loss == "flow_cps":
        log_ratio = cps_log_ratio(new, old, transition.std, per_dim=dimensions)
        loss = flow_cps_loss(new, old, advantage, transition.std, per_dim=dimensions, clip_range=clip_range)
    else:
        log_ratio = (new - old) / dimensions
        loss = flow_grpo_loss(new, old, advantage, per_dim=dimensions, clip_range=clip_range)
    return loss, ratio_diagnostics(log_ratio, torch.zeros_like(log_ratio), clip_range)


def explain(run, args, dimensions, step_sizes):
    """What the clip and the penalty mean. A scaled ratio's clip leaves each step another share of the true ratio: no one number."""
    if args.loss == "flow_grpo":
        run.explain_once(describe_clip(args.clip_range_high, dimensions))
    if args.kl_beta > 0:
        run.explain_once(describe_kl(args.kl_beta, args.kl_form, step_sizes))


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "Flow-GRPO")
    num_batches, batches_a_step = run.batches(args.num_prompts_per_epoch * args.group_size)
    report = Report(run)
    policy = run.load_policy(sde_type=args.sde_type, noise_level=args.noise_level)
    run.load_optimizer(args.num_epochs * -(-num_batches // batches_a_step))
    run.resume()
    report.start()

    for epoch in run.epochs():
        # 1 roll out
        place_window(policy, args, epoch)
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, args.group_size, args.same_latent)
        steps = trained_steps(samples.batches[0], args, epoch)
        step_sizes = policy.scheduler.sigmas.diff().abs().tolist()[-samples.batches[0].num_steps :]
        explain(run, args, samples.batches[0].final[0].numel(), step_sizes)

        # 2 advantages
        advantages = advantages_of(samples, args, report.reward)
        if args.best_of_n:
            advantages = best_and_worst(advantages, samples.groups, args.best_of_n)
        advantages = advantages.to(run.accelerator.device)

        # 3 loss and update
        with run.accelerator.autocast():
            old = [policy.transitions(batch, steps) for batch in samples.batches] if args.loss == "grpo_guard" else None
        diagnostics, norms, kls = [], [], []
        for chunk in run.chunks(num_batches, batches_a_step):
            diagnostics.append([])
            weight = run.loss_weight(samples, chunk, len(steps))
            for b in chunk:
                trajectory, advantage, reference = samples.batches[b], advantages[samples.index[b]], {}
                if args.kl_beta > 0:
                    with policy.reference(), run.accelerator.autocast():
                        reference = policy.transitions(trajectory, steps)

                def on_step(k, transition):
                    action, old_mean = trajectory.actions[:, k], old[b][k].mean if old else None
                    loss, numbers = policy_loss(args, transition, action, trajectory.log_probs[:, k], old_mean, advantage, step_sizes[k])
                    if args.kl_beta > 0:
                        kl = kl_penalty(transition.mean, reference[k].mean, transition.std, step_sizes[k], form=args.kl_form)
                        loss = loss + args.kl_beta * kl
                        kls.append(kl.mean().item())
                    run.accelerator.backward(loss.sum() * weight)
                    diagnostics[-1].append(numbers)

                with run.accelerator.autocast():
                    policy.replay(trajectory, on_step, steps)
            norms.append(run.optimizer_step())
        run.log(run.epoch_metrics(samples, diagnostics, norms, {"kl": kls}))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
