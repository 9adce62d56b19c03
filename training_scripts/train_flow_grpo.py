"""Flow-GRPO and its variants: align a flow-matching pipeline with any reward by group-relative policy optimisation.

    accelerate launch training_scripts/train_flow_grpo.py --config training_scripts/recipes/flow_grpo_mini_sd3.yaml

The algorithms' pages are `diffusers_align/algorithms/{flow_grpo,flow_cps,dance_grpo,mix_grpo,grpo_guard}.py`; a variant is a
recipe, `flow_grpo_{dance,mix,guard,cps}_*`: which noise, which window, which samples and steps, which ratio.
"""

from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import KLShareArguments, NoiseArguments, NoisyGroupArguments, ReplayArguments, StepArguments
from diffusers_align.training.flags.options import Count, NonNegative, Positive, Steps, option, parse
from diffusers_align.training.online.trained_steps import first_share


def listed(values):
    """A table of defaults in words."""
    return ", ".join(f"{value:g} for {name}" for name, value in values.items())


KL_WEIGHT = {"official": 0.04, "gaussian": 0.004, "mean_squared": 0.01}
CLIP_RANGE = {"flow_grpo": 1e-4, "flow_cps": 1e-5, "grpo_guard": 2e-6}
MOVING = {"sde_window_size": True}


class FlowGRPOArguments(
    NoisyGroupArguments,
    NoiseArguments,
    StepArguments,
    ReplayArguments,
    KLShareArguments,
    SamplingArguments,
    defaults={"sde_type": "flow_grpo"},
    advanced={"eta"},
    was={"sde_window": "sde_window_range"},
    gone={"random_timesteps": bool},
):
    """Flow-GRPO"""

    sde_window_size: Steps | None = option(
        None, "a window that moves: that many steps of --sde_window (the first half if absent) have noise in an epoch (Fast, MixGRPO)"
    )
    sde_window_strategy: Literal["random", "progressive", "exp_decay"] = option("random", "Fast draws it, MixGRPO slides it", needs=MOVING, advanced=True)
    sde_window_interval: Count = option(
        25, "epochs that a sliding window stays at a place (MixGRPO)", needs={**MOVING, "sde_window_strategy": ("progressive", "exp_decay")}, advanced=True
    )
    best_of_n: Annotated[int, Interval(ge=2, le=10**6)] | None = option(
        None, "train on that many samples of a group, half the best and half the worst (DanceGRPO); all if absent", advanced=True
    )
    loss: Literal["flow_grpo", "flow_cps", "grpo_guard"] | None = option(
        None, "the ratio: true, on the CPS code's scale (the default with cps), or GRPO-Guard's"
    )
    clip_range: Positive | None = option(None, f"of the ratio per dimension; by the loss if absent: {listed(CLIP_RANGE)}")
    clip_range_high: Positive | None = option(None, "of ratios above 1, where it differs: wider keeps unlikely steps growing (DAPO)", advanced=True)
    kl_weight: NonNegative | None = option(
        None,
        f"of the KL to the reference; by its form if absent: {listed(KL_WEIGHT)}; with a window or GRPO-Guard 0, which saves a pass",
        was="kl_beta",
        resume="takes effect",
    )
    kl_form: Literal["official", "gaussian", "mean_squared"] | None = option(
        None, "official: the exact Gaussian KL times the step's length; mean_squared: FlowCPS's, the default with cps", needs={"kl_weight": True}
    )

    @classmethod
    def from_old(cls, given: dict[str, Any]) -> dict[str, Any]:
        if given.pop("random_timesteps", False):
            if "random_timestep_fraction" in given:
                raise ValueError("--random_timesteps is --random_timestep_fraction now: give the new one alone")
            given.setdefault("random_timestep_fraction", given.pop("timestep_fraction", 0.99))
        return given

    @model_validator(mode="after")
    def _fill_loss(self):
        self.loss = self.loss or ("flow_cps" if self.sde_type == "cps" else "flow_grpo")
        self.kl_form = self.kl_form or {"cps": "mean_squared", None: "gaussian"}.get(self.sde_type, "official")
        fast = bool(self.sde_window) or bool(self.sde_window_size) or self.loss == "grpo_guard"  # the official recipes of both have no KL
        self.kl_weight = (0.0 if fast else KL_WEIGHT[self.kl_form]) if self.kl_weight is None else self.kl_weight
        self.clip_range = CLIP_RANGE[self.loss] if self.clip_range is None else self.clip_range
        self.clip_range_high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        if self.eta is not None and (self.loss == "grpo_guard" or (self.kl_form == "official" and self.kl_weight)):
            raise ValueError("--loss grpo_guard and --kl_form official go by the lengths of flow matching's steps, and --eta is of diffusion")
        if self.loss == "flow_cps" and self.sde_type != "cps":
            raise ValueError(f"--loss flow_cps scales the ratio of --sde_type cps, got --sde_type {self.sde_type}")
        if self.best_of_n is not None and (self.best_of_n % 2 or self.best_of_n > self.group_size):
            raise ValueError(f"--best_of_n must be even, at least 2 and at most --group_size {self.group_size}, got {self.best_of_n}")
        return self

    @model_validator(mode="after")
    def _check_moving_window(self):
        """Wherever the window lies, all its steps must be trained: never the last one, whose noise some kernels do not have."""
        size, number = self.sde_window_size, self.num_inference_steps
        if size is not None:
            self.sde_window = self.sde_window or (0, max(size, number // 2))
        if self.sde_window is None:
            return self
        (first, end), end_of_trained = self.sde_window, min(first_share(number, self.timestep_fraction), max(1, number - 1))
        if size is not None and end - first < size:
            raise ValueError(f"--sde_window {first} {end} has no room for a window of --sde_window_size {size}")
        if end > end_of_trained:
            moving = f" (--sde_window_size {size})" if size is not None else ""
            raise ValueError(
                f"--sde_window {first} {end}{moving} goes beyond the steps that are trained, 0 to {end_of_trained - 1}: end it at {end_of_trained}"
            )
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(FlowGRPOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from functools import partial

from diffusers_align.algorithms.dance_grpo import best_and_worst
from diffusers_align.algorithms.flow_cps import cps_log_ratio, flow_cps_loss
from diffusers_align.algorithms.flow_grpo import describe_kl, flow_grpo_loss, kl_penalty
from diffusers_align.algorithms.grpo_guard import grpo_guard_loss, guard_log_ratio
from diffusers_align.algorithms.mix_grpo import window_at
from diffusers_align.training import Report, Run
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.policy_gradient import policy_gradient_epoch
from diffusers_align.training.online.sampling import noise_fields, sample_epoch
from diffusers_align.training.online.trained_steps import trained_steps


def place_window(policy, args, epoch):
    """The window of an epoch is the same for every group and process: groups that mix windows compare unlike samples."""
    if args.sde_window_size is not None:
        (first, end), strategy = args.sde_window, args.sde_window_strategy
        window = window_at(epoch, size=args.sde_window_size, first=first, end=end, strategy=strategy, interval=args.sde_window_interval, seed=args.seed)
        policy.scheduler.register_to_config(sde_window=list(window))


def log_ratio(args, step):
    """What the loss clips, (B,): the log-ratio per dimension, in CPS on its code's scale, in GRPO-Guard without bias."""
    if args.loss == "grpo_guard":
        return guard_log_ratio(step.log_prob, step.old_log_prob, step.transition.mean, step.old.mean, step.transition.std, per_dim=step.per_dim)
    if args.loss == "flow_cps":
        return cps_log_ratio(step.log_prob, step.old_log_prob, step.transition.std, per_dim=step.per_dim)
    return step.log_ratio


def loss(args, advantages, step):
    """The loss of a step, (B,)."""
    advantage, clip_range = advantages[step.index], (args.clip_range, args.clip_range_high)
    if args.loss == "grpo_guard":
        return grpo_guard_loss(log_ratio(args, step), advantage, step.length, clip_range=clip_range)
    if args.loss == "flow_cps":
        return flow_cps_loss(step.log_prob, step.old_log_prob, advantage, step.transition.std, per_dim=step.per_dim, clip_range=clip_range)
    return flow_grpo_loss(step.log_prob, step.old_log_prob, advantage, per_dim=step.per_dim, clip_range=clip_range)


def kl(args, step, reference):
    """The penalty of a step, (B,)."""
    return kl_penalty(step.transition.mean, reference.mean, step.transition.std, step.length, form=args.kl_form)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "Flow-GRPO")
    run.batches(args.num_prompts_per_epoch * args.group_size)
    report = Report(run)
    policy = run.load_policy(**noise_fields(args))
    run.load_optimizer(args.num_epochs * run.division.num_steps)
    run.resume()
    report.start()
    options = {"clip_range": (args.clip_range, args.clip_range_high), "kl": partial(kl, args), "kl_weight": args.kl_weight, "kl_share": args.kl_share}
    if args.loss != "flow_grpo":
        options |= {"log_ratio": partial(log_ratio, args)}

    for epoch in run.epochs():
        # 1 roll out
        place_window(policy, args, epoch)
        noise = {"same_latent": args.same_latent, "keep_kernels": args.loss == "grpo_guard"}
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, args.group_size, **noise)
        steps = trained_steps(samples.batches[0], args.timestep_fraction, args.random_timestep_fraction, f"{args.seed}/{epoch}/steps")
        if args.kl_weight > 0:
            run.explain_once(describe_kl(args.kl_weight, args.kl_form, samples.batches[0].step_sizes))

        # 2 advantages
        advantages = advantages_of(samples, args, report.reward)
        if args.best_of_n:
            advantages = best_and_worst(advantages, samples.groups, args.best_of_n)

        # 3 loss
        objective = partial(loss, args, advantages.to(run.accelerator.device))

        # 4 update
        run.log(policy_gradient_epoch(run, policy, samples, steps, objective, **options))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
