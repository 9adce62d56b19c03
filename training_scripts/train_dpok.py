"""DPOK: align a pipeline with any reward by policy gradients with a learned value baseline, held near the pretrained model.

    accelerate launch training_scripts/train_dpok.py --config training_scripts/recipes/dpok_mini_sd.yaml

The algorithm's pages are `diffusers_align/algorithms/dpok.py` and `diffusers_align/rl/values.py`
(https://arxiv.org/abs/2305.16381). Flow-matching pipelines work too: their noise is `--sde_type` and `--noise_level`.
"""

from typing import Any, Literal

from pydantic import model_validator

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import KLShareArguments, NoiseArguments, ReplayArguments, ValueArguments
from diffusers_align.training.flags.options import Count, NonNegative, Positive, option, parse

KL_WEIGHT = {"official": 0.01, "paper": 0.05}
DEFAULTS = {
    "train_batch_size": 2, "rank": 4, "lora_alpha": 4, "learning_rate": 1e-5, "max_grad_norm": 0.1, "adam_weight_decay": 0.0,
    "num_inference_steps": 50, "guidance_scale": 7.5,
}  # fmt: skip


class DPOKArguments(ValueArguments, NoiseArguments, ReplayArguments, KLShareArguments, SamplingArguments, defaults=DEFAULTS, gone={"value_baseline": bool}):
    """DPOK"""

    num_samples_per_epoch: Count = option(10, "samples per epoch, each of a prompt")
    clip_range: Positive = option(1e-4, "of the ratio per dimension")
    clip_mode: Literal["ppo", "clamp"] = option("ppo", "clamp is the official code's: no gradient beyond the clip on either side", advanced=True)
    reward_weight: Positive = option(10.0, "of the policy gradient; 10 for a single prompt, 1000 for many")
    reward_filter: bool = option(False, "train on max(reward, 0)", advanced=True)
    kl_form: Literal["official", "paper"] = option("official", "error of the model's outputs, or Gaussian KL per dimension", needs={"kl_weight": True})
    kl_weight: NonNegative | None = option(
        None, "of the KL to the pretrained model (official: 0.01, paper: 0.05); 0 saves its forward pass", resume="takes effect"
    )
    advantage: Literal["value", "gae", "batch"] = option(
        "value", "reward minus a learned value; generalised advantages of that value; or the reward, normalised over the batch"
    )

    @classmethod
    def from_old(cls, given: dict[str, Any]) -> dict[str, Any]:
        learned, lam = given.pop("value_baseline", True), given.get("gae_lambda")
        if not learned and ({"advantage", "gae_lambda"} & given.keys()):
            raise ValueError("--no-value_baseline is --advantage batch now, which has no learned value: leave out the others, or give --advantage alone")
        given.setdefault("advantage", "batch" if not learned else "gae" if lam is not None and float(lam) < 1 else "value")
        if given["advantage"] != "gae":
            given.pop("gae_lambda", None)
        return given

    @model_validator(mode="after")
    def _fill_kl_weight(self):
        self.kl_weight = KL_WEIGHT[self.kl_form] if self.kl_weight is None else self.kl_weight
        if self.advantage == "batch" and self.num_samples_per_epoch < 2:
            raise ValueError("--advantage batch compares the samples of an epoch: --num_samples_per_epoch must be 2 or more")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(DPOKArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from functools import partial

import torch

from diffusers_align.algorithms.dpok import describe_kl, dpok_loss, output_mse, output_weight
from diffusers_align.rl import batch_advantages
from diffusers_align.schedulers.scheduling_ancestral_sde import LEARNED
from diffusers_align.training import Report, Run
from diffusers_align.training.online.policy_gradient import policy_gradient_epoch
from diffusers_align.training.online.sampling import noise_fields, sample_epoch
from diffusers_align.training.online.value_baseline import learned_advantages, make_values


def output_weights(policy, trajectory):
    """How far a unit of model output moves the mean of each step with noise, and the ratio of the paper's to the official KL there.

    Raises:
        ValueError: outputs cannot be told from means: a step clips, or the output holds its variance too.
    """
    if policy.scheduler.config.get("variance_type") in LEARNED:
        raise ValueError("--kl_form official compares the model's outputs, and those of this model hold the variance of a step too: use --kl_form paper.")
    weights, scales = {}, []
    zero = torch.zeros([1] * trajectory.final.ndim)
    for k in trajectory.noisy_steps:
        at = trajectory.timesteps[k]
        weights[k] = output_weight(lambda output, at=at: policy.scheduler.transition(output, at, zero).mean, zero.ndim)
        scales.append(weights[k] ** 2 / (2 * float(policy.scheduler.transition(zero, at, zero).std) ** 2))
    return weights, scales


def loss(args, advantages, step):
    """The loss of a step, (B,), without the KL."""
    options = {"clip_range": args.clip_range, "clip_mode": args.clip_mode, "reward_weight": args.reward_weight}
    return dpok_loss(step.log_prob, step.old_log_prob, advantages[step.index, step.k], per_dim=step.per_dim, **options)


def kl(args, weights, step, reference):
    """The divergence of a step from the pretrained one's, (B,), in the chosen form."""
    if args.kl_form == "official":
        return output_mse(step.transition.mean, reference.mean, weights[step.k])
    return step.transition.kl(reference) / step.per_dim


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DPOK")
    run.batches(args.num_samples_per_epoch)
    report = Report(run)
    policy = run.load_policy(**noise_fields(args))
    run.load_optimizer(args.num_epochs * run.division.num_steps)
    values = make_values(args, run.accelerator.device)
    run.register("value_baseline", values)
    run.resume()
    report.start()

    for epoch in run.epochs():
        # 1 roll out
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_samples_per_epoch, None)
        trajectory = samples.batches[0]
        if trajectory.num_steps != args.num_inference_steps:
            raise ValueError(f"The pipeline takes {trajectory.num_steps} steps: say so with --num_inference_steps {trajectory.num_steps}.")
        weights = {}
        if args.kl_weight and args.kl_form == "official":
            weights, scales = output_weights(policy, trajectory)
            run.explain_once(describe_kl(args.kl_weight, scales))

        # 2 value baseline and advantages of each step
        rewards, learned = samples.rewards.clamp(min=0) if args.reward_filter else samples.rewards, {}
        if args.advantage == "batch":
            advantages = batch_advantages(rewards)[:, None].expand(-1, trajectory.num_steps)
        else:
            lam = args.gae_lambda if args.advantage == "gae" else 1.0
            advantages, learned = learned_advantages(values, policy, samples, rewards, args, epoch, lam=lam)

        # 3 loss
        objective, divergence = partial(loss, args, advantages.to(run.accelerator.device)), partial(kl, args, weights)

        # 4 update
        options = {"clip_range": args.clip_range, "kl": divergence, "kl_weight": args.kl_weight, "kl_share": args.kl_share, "logged": learned}
        run.log(policy_gradient_epoch(run, policy, samples, trajectory.noisy_steps, objective, **options))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
