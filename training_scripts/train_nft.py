"""DiffusionNFT: align any diffusion or flow pipeline with any reward on the forward process, from good and bad samples.

    accelerate launch training_scripts/train_nft.py --config training_scripts/recipes/nft_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/diffusion_nft.py` (https://arxiv.org/abs/2509.16117).
"""

from typing import Literal

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import NoiselessGroupArguments, NoisingArguments
from diffusers_align.training.flags.options import NonNegative, Positive, option, parse


# Predictions are without guidance, so the rollouts must be: it would be distilled in.
class NFTArguments(NoiselessGroupArguments, NoisingArguments, SamplingArguments, defaults={"guidance_scale": 1.0}):
    """DiffusionNFT"""

    beta: Positive = option(1.0, "the smaller, the farther from the old policy the optimum (official: 1, or 0.1)")
    kl_weight: NonNegative = option(1e-4, "of the squared distance to the pretrained model; 0 saves its forward pass", was="kl_beta", resume="takes effect")
    adv_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = option("all", "what of the advantages counts")
    adaptive_weight: bool = option(True, "divide errors by their mean absolute value", advanced=True)
    decay: Literal["type0", "type1", "type2"] = option("type1", "how fast the old policy follows")


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(NFTArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from functools import partial

from diffusers_align.algorithms.diffusion_nft import nft_loss, old_policy_decay, optimality
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.training import Report, Run
from diffusers_align.training.online.forward_samples import Anchor, forward_epoch
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.sampling import sample_epoch
from diffusers_align.training.run.weight_copies import LaggingWeights


def loss(args, forward, optimal, noised):
    """The loss of a noised batch, (B,), without the distance to the pretrained model; and what to log."""
    x0_hat, old_x0_hat = (forward.to_x0(output, noised.x_t, noised.t) for output in (noised.output, noised.others["old_deviation"]))
    options = {"beta": args.beta, "adv_clip_max": args.adv_clip_max, "adaptive": args.adaptive_weight}
    value = nft_loss(x0_hat, old_x0_hat, noised.x0.float(), optimal[noised.index], **options)
    return value, {"policy_loss": value.mean().item()}, None


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DiffusionNFT")
    run.batches(args.num_prompts_per_epoch * args.group_size, steps=1)
    report = Report(run)
    policy = run.load_policy()
    forward, old = ForwardProcess(policy.scheduler), LaggingWeights(policy.trainable_parameters())
    run.register("old_policy", old)
    run.load_optimizer(args.num_epochs * run.division.num_steps)
    run.resume()
    report.start()
    anchors = [Anchor("old_deviation", old.applied, 0.0), *([Anchor("kl", policy.reference, args.kl_weight)] if args.kl_weight > 0 else [])]

    for epoch in run.epochs():
        # 1 roll out the old policy along the ODE
        with old.applied():
            groups = (args.num_prompts_per_epoch, args.group_size, args.same_latent)
            samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, *groups, deterministic=True)

        # 2 advantages, as probabilities of being a good sample
        advantages = advantages_of(samples, args, report.reward).to(run.accelerator.device)
        optimal = optimality(advantages, adv_clip_max=args.adv_clip_max, mode=args.adv_mode)

        # 3 loss on noised samples
        objective = partial(loss, args, forward, optimal)

        # 4 update; the old policy follows, where there was an optimizer step
        metrics = forward_epoch(run, policy, samples, forward, epoch, objective, anchors)
        decay = old_policy_decay(run.optimizer_steps, args.decay) if run.rates else 1.0
        old.update(decay)
        run.log({**metrics, "decay": decay})
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
