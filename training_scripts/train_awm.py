"""AWM: align any diffusion or flow pipeline with any reward by advantage-weighted (score or flow) matching.

    accelerate launch training_scripts/train_awm.py --config training_scripts/recipes/awm_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/advantage_weighted_matching.py` (https://arxiv.org/abs/2509.25050).
"""

from typing import Annotated, Literal

from annotated_types import Interval

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import NoiselessGroupArguments, NoisingArguments
from diffusers_align.training.flags.options import Decay, NonNegative, Positive, option, parse

DEFAULTS = {"guidance_scale": 1.0, "num_inference_steps": 14, "num_train_timesteps": 6, "timestep_fraction": 0.9, "shared_timesteps": True}


class AWMArguments(NoiselessGroupArguments, NoisingArguments, SamplingArguments, defaults=DEFAULTS):
    """AWM"""

    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = option("ghuber", "of the matching error, by its time and size")
    ghuber_power: Annotated[float, Interval(gt=0, le=10)] = option(0.25, "of the error", needs={"weighting": "ghuber"}, advanced=True)
    clip_range: Positive = option(1.0, "of the ratio; 1 hardly ever clips")
    kl_weight: NonNegative = option(3e-3, "of the squared distance to the pretrained model (official: 1e-3 to 3e-3)", was="kl_beta", resume="takes effect")
    ema_beta: NonNegative = option(1.0, "weight of the squared distance to the policy that lags behind")
    lag_decay: Decay = option(0.3, "how much that one keeps of itself each epoch, reached at 0.001 per optimizer step")


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(AWMArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from functools import partial

import torch

from diffusers_align.algorithms.advantage_weighted_matching import awm_loss, lagging_decay, pseudo_log_prob, unit_advantages
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.rl import ratio_diagnostics
from diffusers_align.training import Report, Run
from diffusers_align.training.online.forward_samples import Anchor, forward_epoch, noised_batches
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.sampling import sample_epoch
from diffusers_align.training.run.weight_copies import LaggingWeights


def log_prob(args, forward, noised):
    """What the output at noised samples says of their log-probability, (B,)."""
    target = forward.target(noised.x0, noised.noise, noised.t)
    return pseudo_log_prob(noised.output, target, forward.flow_time(noised.t), weighting=args.weighting, ghuber_power=args.ghuber_power)


@torch.no_grad()
def old_log_probs(run, policy, samples, forward, epoch):
    """Those under the weights that an epoch begins with, by batch and draw. The first optimizer step's are its own."""
    later = range(run.division.batches_a_step, len(samples.batches))
    return {noised.place: log_prob(run.args, forward, noised) for noised in noised_batches(run, policy, samples, forward, epoch, later)}


def loss(args, forward, old, advantages, noised):
    """The loss of a noised batch, (B,), without the distances; what to log, and the ratio's diagnostics."""
    new = log_prob(args, forward, noised)
    before = old.get(noised.place, new.detach())
    value = awm_loss(new, before, advantages[noised.index], clip_range=args.clip_range)
    return value, {"log_prob": new.mean().item()}, ratio_diagnostics(new, before, args.clip_range)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "AWM")
    run.batches(args.num_prompts_per_epoch * args.group_size, steps=1)
    report = Report(run)
    policy = run.load_policy()
    forward, lagging = ForwardProcess(policy.scheduler), LaggingWeights(policy.trainable_parameters())
    run.register("lagging_policy", lagging)
    run.load_optimizer(args.num_epochs * run.division.num_steps)
    run.resume()
    report.start()
    anchors = [Anchor("kl", policy.reference, args.kl_weight), Anchor("ema_kl", lagging.applied, args.ema_beta)]
    anchors = [anchor for anchor in anchors if anchor.weight > 0]

    for epoch in run.epochs():
        # 1 roll out along the ODE
        groups = (args.num_prompts_per_epoch, args.group_size, args.same_latent)
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, *groups, deterministic=True)

        # 2 advantages
        advantages = unit_advantages(advantages_of(samples, args, report.reward).to(run.accelerator.device), adv_clip_max=args.adv_clip_max)

        # 3 loss on noised samples
        objective = partial(loss, args, forward, old_log_probs(run, policy, samples, forward, epoch), advantages)

        # 4 update; the policy that lags behind follows, where there was an optimizer step
        run.log(forward_epoch(run, policy, samples, forward, epoch, objective, anchors))
        lagging.update(lagging_decay(run.optimizer_steps, maximum=args.lag_decay) if run.rates else 1.0)
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
