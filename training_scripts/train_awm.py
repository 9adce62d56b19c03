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
    ghuber_power: Annotated[float, Interval(gt=0, le=10)] = option(0.25, "of the error", needs={"weighting": "ghuber"})
    clip_range: Positive = option(1.0, "of the ratio; 1 hardly ever clips")
    kl_beta: NonNegative = option(3e-3, "weight of the squared distance to the pretrained model (official: 1e-3 to 3e-3)")
    ema_beta: NonNegative = option(1.0, "weight of the squared distance to the policy that lags behind")
    lag_decay: Decay = option(0.3, "how much that one keeps of itself each epoch, reached at 0.001 an optimizer step")


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(AWMArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from collections import defaultdict

import torch

from diffusers_align.algorithms.advantage_weighted_matching import awm_loss, lagging_decay, pseudo_log_prob, unit_advantages
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.rl import ratio_diagnostics
from diffusers_align.rl.matching import matching_error
from diffusers_align.training import Report, Run
from diffusers_align.training.online.forward_samples import noised, num_timesteps
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.sampling import sample_epoch
from diffusers_align.training.run.weight_copies import LaggingWeights


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "AWM")
    num_batches, batches_a_step = run.batches(args.num_prompts_per_epoch * args.group_size, steps=1)
    report = Report(run)
    policy = run.load_policy()
    forward, lagging = ForwardProcess(policy.scheduler), LaggingWeights(policy.trainable_parameters())
    run.register("lagging_policy", lagging)
    run.load_optimizer(args.num_epochs * -(-num_batches // batches_a_step))
    run.resume()
    report.start()

    def predict(trajectory, x_t, t, noise):
        """The output at noised samples, and what it says of their log-probability."""
        with run.accelerator.autocast():
            output = policy.predict(x_t, t, trajectory.condition)
        target = forward.target(trajectory.final, noise, t)
        return output, pseudo_log_prob(output, target, forward.flow_time(t), weighting=args.weighting, ghuber_power=args.ghuber_power)

    for epoch in run.epochs():
        # 1 roll out along the ODE
        groups = (args.num_prompts_per_epoch, args.group_size, args.same_latent)
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, *groups, deterministic=True)

        # 2 advantages
        advantages = unit_advantages(advantages_of(samples, args, report.reward).to(run.accelerator.device), adv_clip_max=args.adv_clip_max)

        # 3 noised samples, loss and update
        chunks, diagnostics, norms, logged = run.chunks(num_batches, batches_a_step), [], [], defaultdict(list)
        with torch.no_grad():  # the first update's are its own
            later = {b: samples.batches[b] for chunk in chunks[1:] for b in chunk}
            old = {b: [predict(trajectory, *draw)[1] for draw in noised(forward, trajectory, args, epoch)] for b, trajectory in later.items()}
        for chunk in chunks:
            diagnostics.append([])
            weight = run.loss_weight(samples, chunk, num_timesteps(args))
            for b in chunk:
                trajectory, advantage = samples.batches[b], advantages[samples.index[b]]
                for j, draw in enumerate(noised(forward, trajectory, args, epoch)):
                    output, log_prob = predict(trajectory, *draw)
                    before = old[b][j] if b in old else log_prob.detach()
                    loss = awm_loss(log_prob, before, advantage, clip_range=args.clip_range)
                    for name, beta, other in (("kl", args.kl_beta, policy.reference), ("ema_kl", args.ema_beta, lagging.applied)):
                        if beta > 0:
                            with torch.no_grad(), other():
                                anchor = predict(trajectory, *draw)[0]
                            distance = matching_error(output, anchor)
                            loss = loss + beta * distance
                            logged[name].append(distance.mean().item())
                    run.accelerator.backward(loss.sum() * weight)
                    logged["log_prob"].append(log_prob.mean().item())
                    diagnostics[-1].append(ratio_diagnostics(log_prob, before, args.clip_range))
            norms.append(run.optimizer_step())
        lagging.update(lagging_decay(run.optimizer_steps, maximum=args.lag_decay) if run.rates else 1.0)  # without an optimizer step it stays
        run.log(run.epoch_metrics(samples, diagnostics, norms, logged))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
