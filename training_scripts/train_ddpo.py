"""DDPO: align a diffusion pipeline with any reward by policy gradients (score function or importance sampling).

    accelerate launch training_scripts/train_ddpo.py --config training_scripts/recipes/ddpo_mini_sd.yaml

The algorithm's pages are `diffusers_align/algorithms/ddpo.py` and `reinforce.py` (https://arxiv.org/abs/2305.13301). With
`--update trpo` an epoch is one trust-region step instead of clipped gradient steps (`diffusers_align/rl/trust_region.py`).
"""

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import Eta, ReplayArguments, WindowArguments
from diffusers_align.training.flags.options import Count, Positive, PositiveShare, option, parse

BY_GRADIENT, TRPO, TRACKED = {"update": "adamw"}, {"update": "trpo"}, {"per_prompt_stat_tracking": True}
# A trust-region step has neither learning rate nor clip, and one step is an epoch's.
OPTIMIZER = ("learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm")


class DDPOArguments(
    WindowArguments,
    ReplayArguments,
    SamplingArguments,
    defaults={"rank": 4, "lora_alpha": 4, "num_inference_steps": 50, "guidance_scale": 5.0},
    needs={
        **{name: BY_GRADIENT for name in OPTIMIZER},
        "gradient_accumulation_steps": {**BY_GRADIENT, "estimator": "is"},
        "replay_steps_per_forward": BY_GRADIENT,
    },
):
    """DDPO"""

    estimator: Literal["is", "sf"] = option("is", "importance sampling, or the score function (one step per epoch)", needs=BY_GRADIENT)
    num_samples_per_epoch: Annotated[int, Interval(ge=2, le=10**9)] = option(256, "samples per epoch, each of a prompt; one alone has no advantage")
    eta: Eta | None = option(None, "noise of the DDIM kernel, 1 if absent; of a sampler with noise of its own, its own if absent")
    random_timestep_fraction: PositiveShare = option(
        1.0, "train a random share of the steps, drawn anew for each batch", needs=BY_GRADIENT, was="timestep_fraction"
    )
    clip_range: Positive = option(1e-4, "of the ratio per dimension", needs={**BY_GRADIENT, "estimator": "is"})
    adv_clip_max: Positive = option(5.0, "largest advantage, and smallest but for its sign", advanced=True)
    per_prompt_stat_tracking: bool = option(True, "compare a reward with the latest of its prompt; otherwise with its batch")
    per_prompt_stat_buffer_size: Count = option(32, "so many latest rewards of each prompt", needs=TRACKED, advanced=True)
    per_prompt_stat_min_count: Count = option(16, "with fewer of them, compare with the batch", needs=TRACKED, advanced=True)
    update: Literal["adamw", "trpo"] = option("adamw", "trpo: one trust-region step per epoch, without learning rate and clip")
    max_kl: Positive | None = option(
        None, "KL of a step in nats per trajectory, summed over steps; 0.02 for each dimension of the latents if absent", needs=TRPO
    )
    cg_iterations: Annotated[int, Interval(ge=1, le=1000)] = option(10, "products with the Fisher matrix; each costs three replays", needs=TRPO, advanced=True)
    cg_damping: Positive = option(0.1, "added to the Fisher matrix's diagonal", needs=TRPO, advanced=True)

    @model_validator(mode="after")
    def _check_statistics(self):
        if self.per_prompt_stat_tracking and self.per_prompt_stat_buffer_size < self.per_prompt_stat_min_count:
            raise ValueError(
                f"--per_prompt_stat_buffer_size {self.per_prompt_stat_buffer_size} never holds the {self.per_prompt_stat_min_count} rewards of "
                "--per_prompt_stat_min_count, from which on a prompt has statistics of its own: raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _check_trust_region(self):
        if self.update == "trpo" and self.mixed_precision == "fp16":
            raise ValueError("--update trpo does not scale its gradients, which underflow in fp16: use --mixed_precision bf16")
        if self.update == "trpo" and self.compile:
            raise ValueError("--update trpo takes second derivatives, which compiled graphs do not have: leave out --compile")
        if self.update == "trpo" and self.random_timestep_fraction < 1:
            raise ValueError("--update trpo bounds the KL of whole trajectories: leave --random_timestep_fraction at 1")
        if self.update == "trpo" and not self.unconditional_gradient:
            raise ValueError("--update trpo goes by the gradient's own geometry, which a biased one does not have: leave out --no-unconditional_gradient")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(DDPOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

import math
from functools import partial

from diffusers_align.algorithms.ddpo import ddpo_loss
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.rl import PromptStatistics, batch_advantages
from diffusers_align.training import Report, Run
from diffusers_align.training.online.policy_gradient import policy_gradient_epoch
from diffusers_align.training.online.sampling import noise_fields, sample_epoch
from diffusers_align.training.online.trained_steps import trained_steps
from diffusers_align.training.online.trust_region import trust_region_update


def steps_of(run, samples, fraction, epoch):
    """The solver steps that are trained of each batch."""
    blocks = [run.division.block(b) for b in range(len(samples.batches))]
    return [trained_steps(t, random_timestep_fraction=fraction, key=f"{run.args.seed}/{epoch}/{block}/steps") for t, block in zip(samples.batches, blocks)]


def loss(args, advantages, step):
    """The loss of a step, (B,)."""
    if args.estimator == "sf":
        return reinforce_loss(step.log_prob, advantages[step.index], per_dim=step.per_dim)
    return ddpo_loss(step.log_prob, step.old_log_prob, advantages[step.index], per_dim=step.per_dim, clip_range=args.clip_range)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DDPO")
    run.batches(args.num_samples_per_epoch, steps=1 if args.estimator == "sf" or args.update == "trpo" else 2)
    report = Report(run)
    policy = run.load_policy(**noise_fields(args))
    run.load_optimizer(args.num_epochs * run.division.num_steps)
    statistics = PromptStatistics(args.per_prompt_stat_buffer_size, args.per_prompt_stat_min_count)
    run.register("prompt_statistics", statistics)
    run.resume()
    report.start()

    for epoch in run.epochs():
        # 1 roll out
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_samples_per_epoch, None)

        # 2 advantages
        if args.per_prompt_stat_tracking:
            advantages = statistics.update([prompt.key for prompt in samples.asked], samples.rewards)
        else:
            advantages = batch_advantages(samples.rewards)
        advantages = advantages.clamp(-args.adv_clip_max, args.adv_clip_max).to(run.accelerator.device)

        # 3 loss
        objective = partial(loss, args, advantages)

        # 4 update
        if args.update == "trpo":
            limits = {"max_kl": args.max_kl, "cg_iterations": args.cg_iterations, "cg_damping": args.cg_damping}
            metrics = samples.metrics() | trust_region_update(run, policy, samples, advantages, **limits)
        else:
            steps = steps_of(run, samples, args.random_timestep_fraction, epoch)
            clip_range = args.clip_range if args.estimator == "is" else math.inf
            metrics = policy_gradient_epoch(run, policy, samples, steps, objective, clip_range=clip_range)
        run.log(metrics)
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
