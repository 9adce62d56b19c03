"""DenseGRPO: Flow-GRPO with a reward for every step, and noise that is calibrated to each.

    accelerate launch training_scripts/train_dense_grpo.py --config training_scripts/recipes/dense_grpo_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/dense_grpo.py` (https://arxiv.org/abs/2601.20218).
"""

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import (
    KLShareArguments,
    NoiseLevel,
    NoisyGroupArguments,
    ReplayArguments,
    StepArguments,
    ValueArguments,
    WindowArguments,
)
from diffusers_align.training.flags.options import NonNegative, Positive, option, parse

CALIBRATED, GROUPED = {"calibration_rounds": True}, {"advantage": "group"}
OF_GROUPS = {"baseline": GROUPED, "global_std": GROUPED, "std_ddof": GROUPED}


class DenseGRPOArguments(
    NoisyGroupArguments, ValueArguments, WindowArguments, StepArguments, ReplayArguments, KLShareArguments, SamplingArguments,
    defaults={"global_std": False}, needs=OF_GROUPS, advanced={"value_learning_rate"},
):  # fmt: skip
    """DenseGRPO"""

    advantage: Literal["group", "gae"] = option(
        "group", "a step's gain beside those of its group; or all gains from there on beside a learned value, as generalised advantages"
    )

    psi_init: NoiseLevel = option(0.3, "noise of every step before calibration: psi sqrt(-dt); 0.3 is DanceGRPO's")
    calibration_rounds: Annotated[int, Interval(ge=0, le=10**4)] = option(20, "rounds of sampling that set psi before training; 0 keeps --psi_init")
    calibration_tolerance: NonNegative | None = option(
        None, "psi rises where gains and losses differ by fewer samples (paper: 2); sqrt(samples) if absent", needs=CALIBRATED, advanced=True
    )
    calibration_increment: Annotated[float, Interval(gt=0, le=1)] = option(
        0.01, "by which psi moves in a round: the paper's epsilon_2", needs=CALIBRATED, advanced=True
    )
    clip_range: Positive = option(1e-4, "of the ratio per dimension")
    kl_weight: NonNegative = option(0.04, "of the KL to the pretrained model; 0 saves its forward pass", was="kl_beta", resume="takes effect")
    kl_form: Literal["official", "gaussian"] = option("official", "official is the exact Gaussian KL times the step's length", needs={"kl_weight": True})

    @model_validator(mode="after")
    def _check_dense_rewards(self):
        if self.multi_reward != "sum":
            raise ValueError(f"--multi_reward {self.multi_reward}: for each step there is only the sum of the rewards; leave it out")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(DenseGRPOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from functools import partial

from diffusers_align.algorithms.dense_grpo import gain_metrics, step_gains
from diffusers_align.algorithms.flow_grpo import describe_kl, flow_grpo_loss, kl_penalty
from diffusers_align.training import Report, Run
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.policy_gradient import policy_gradient_epoch
from diffusers_align.training.online.sampling import sample_epoch
from diffusers_align.training.online.step_rewards import NoiseLevels, calibrate_noise, completion_rewards
from diffusers_align.training.online.trained_steps import trained_steps
from diffusers_align.training.online.value_baseline import learned_advantages, make_values, normalised


def loss(args, advantages, step):
    """Flow-GRPO's loss with the step's own advantage, (B,)."""
    return flow_grpo_loss(step.log_prob, step.old_log_prob, advantages[step.index, step.k], per_dim=step.per_dim, clip_range=args.clip_range)


def kl(args, step, reference):
    """The penalty of a step, (B,)."""
    return kl_penalty(step.transition.mean, reference.mean, step.transition.std, step.length, form=args.kl_form)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DenseGRPO")
    run.batches(args.num_prompts_per_epoch * args.group_size)
    report = Report(run)
    policy = run.load_policy(sde_type="dance_grpo", sde_window=args.sde_window)
    run.load_optimizer(args.num_epochs * run.division.num_steps)
    levels = NoiseLevels(args.psi_init, args.num_inference_steps)
    run.register("noise_levels", levels)
    values = make_values(args, run.accelerator.device) if args.advantage == "gae" else None
    if values:
        run.register("value_baseline", values)
    run.resume()
    report.start()
    calibrate_noise(run, policy, report.reward, report.prompts, levels)
    options = {"clip_range": args.clip_range, "kl": partial(kl, args), "kl_weight": args.kl_weight, "kl_share": args.kl_share}

    for epoch in run.epochs():
        # 1 roll out, and complete from the states on the way
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, args.group_size, args.same_latent)
        steps = trained_steps(samples.batches[0], args.timestep_fraction, args.random_timestep_fraction, f"{args.seed}/{epoch}/steps")
        if args.kl_weight > 0:
            run.explain_once(describe_kl(args.kl_weight, args.kl_form, samples.batches[0].step_sizes))
        scored_steps = samples.batches[0].noisy_steps if args.advantage == "gae" else steps  # what follows a step is all of them
        gains = step_gains(completion_rewards(run, policy, report.reward, samples, scored_steps))

        # 2 advantages of each step
        if args.advantage == "gae":
            advantages, learned = learned_advantages(values, policy, samples, gains, args, epoch, lam=args.gae_lambda)
            advantages = normalised(advantages, scored_steps, args.adv_clip_max)
        else:
            advantages, learned = advantages_of(samples, args, report.reward, gains), {}

        # 3 loss
        objective = partial(loss, args, advantages.to(run.accelerator.device))

        # 4 update
        metrics = policy_gradient_epoch(run, policy, samples, steps, objective, **options, logged=learned)
        run.log({**metrics, **gain_metrics(gains)})
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
