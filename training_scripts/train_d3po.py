"""D3PO: align a pipeline by direct preference over trajectories of its own, whose steps have exact log-probabilities.

    accelerate launch training_scripts/train_d3po.py --config training_scripts/recipes/d3po_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/d3po.py` (https://arxiv.org/abs/2311.13231). The reward ranks the images of a prompt, which
makes the pairs. With `--trajectories` those come from a folder that `make_preferences.py --save_trajectories` wrote.
"""

from typing import ClassVar, Literal

from pydantic import model_validator

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import ClipRange, GroupSize, NoiseArguments
from diffusers_align.training.flags.options import Count, NonNegative, Positive, Steps, option, parse

DEFAULTS = {"rank": 4, "lora_alpha": 4, "learning_rate": 3e-5, "num_inference_steps": 20, "num_epochs": 400}
OF_SAMPLING = ("sde_type", "noise_level", "sde_window", "eta", "same_latent", "reward_in_background")


class D3POArguments(NoiseArguments, SamplingArguments, defaults=DEFAULTS):
    """D3PO"""

    gradient_accumulation_steps: ClassVar[None] = None  # each step is on all of an epoch's pairs, which join samples of different batches
    prompts: str | None = None
    reward: str | None = None
    num_prompts_per_epoch: Count = option(16, "groups per epoch")
    group_size: GroupSize = option(7, "samples per prompt; 7 in the official code")
    same_latent: bool = option(True, "one initial noise per group, as in the official code")
    pairs: Literal["all", "extremes"] = option("all", "all pairs of a group (official), or its best and worst image")
    min_margin: NonNegative = option(0.0, "pairs whose rewards differ by no more are left out", advanced=True)
    trajectories: str | None = option(None, "learn from those of this folder of make_preferences.py, with its rewards, and sample none", resume="content")
    beta: Positive = option(0.1, "preference temperature, with log-probabilities per dimension (official)")
    clip: Literal["one_sided", "official", "none"] = option("one_sided", "what holds steps that went far: see the algorithm's page", advanced=True)
    clip_range: ClipRange = option(0.1, "of the ratio per dimension (official)", needs={"clip": ("one_sided", "official")})
    num_updates_per_epoch: Count = option(2, "optimizer steps on an epoch's pairs, each on steps of its own")
    num_train_timesteps: Steps | None = option(None, "solver steps of an update, drawn anew for each; all with noise if absent", advanced=True)

    @model_validator(mode="after")
    def _check_trajectories(self):
        if not self.trajectories and not (self.prompts and self.reward):
            raise ValueError("--prompts and --reward are required, or --trajectories of make_preferences.py")
        if self.trajectories and (of_sampling := [name for name in OF_SAMPLING if name in self.model_fields_set]):
            raise ValueError(f"--trajectories come with the noise that they were drawn with: leave out --{', --'.join(of_sampling)}")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(D3POArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from collections import defaultdict

from diffusers_align.algorithms.d3po import d3po_loss, d3po_metrics, sampled_steps
from diffusers_align.rl.matching import error_coefficients
from diffusers_align.rl.pair_losses import ranked_pairs
from diffusers_align.training import Report, Run
from diffusers_align.training.online.ruling_steps import describe_ruling_steps
from diffusers_align.training.online.sampling import noise_fields, sample_epoch
from diffusers_align.training.online.stored_trajectories import StoredTrajectories, descend, log_probs


def update(run, policy, samples, pairs, steps, logged):
    """An optimizer step on `pairs` of samples at `steps`. Returns the gradient's norm."""
    args, (winners, losers) = run.args, pairs
    options = {"per_dim": samples.batches[0].final[0].numel(), "beta": args.beta, "clip": args.clip, "clip_range": args.clip_range}
    own = log_probs(run, policy, samples, steps)
    with policy.reference():
        reference = log_probs(run, policy, samples, steps)

    def loss(own):
        return d3po_loss(own[winners], own[losers], reference[winners], reference[losers], **options)

    value, (coefficients,) = error_coefficients(loss, own)
    descend(run, policy, samples, steps, coefficients)
    logged["loss"].append(value.mean().item())
    for name, number in d3po_metrics(own[winners], own[losers], reference[winners], reference[losers], **options).items():
        logged[name].append(number)
    return run.optimizer_step()


def main(argv=None):
    args = parse_args(argv)
    model = {"model": args.pretrained_model_name_or_path, "revision": args.revision, "variant": args.variant}
    stored = StoredTrajectories(args.trajectories, group_size=args.group_size, **model) if args.trajectories else None
    taken_over = stored.hand_over(args) if stored else []
    run = Run(args, "D3PO")
    run.explain_once(*taken_over)
    run.batches(args.num_prompts_per_epoch * args.group_size, steps=1)
    report = Report(run, [{"prompt": prompt.text} for prompt in stored.prompts] if stored else None)
    policy = run.load_policy(**(stored.noise if stored else noise_fields(args)))
    run.load_optimizer(args.num_epochs * args.num_updates_per_epoch)
    run.resume()
    report.start()

    for epoch in run.epochs():
        # 1 roll out, or take stored trajectories with their rewards
        if stored:
            samples = stored.epoch(run, epoch, args.num_prompts_per_epoch)
        else:
            samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, args.group_size, args.same_latent)

        # 2 pairs
        pairs = ranked_pairs(samples.rewards, samples.groups, kind=args.pairs, min_gap=args.min_margin)
        stochastic = samples.batches[0].noisy_steps
        if not stored:
            run.explain_once(*describe_ruling_steps(policy.scheduler, samples.batches[-1], stochastic))

        # 3 loss and 4 update, each on steps of its own
        norms, logged = [], defaultdict(list)
        logged["pairs"].append(len(pairs[0]))
        for number in range(args.num_updates_per_epoch if len(pairs[0]) else 0):
            steps = sampled_steps(stochastic, args.num_train_timesteps or len(stochastic), seed=f"{args.seed}/{epoch}/{number}")
            norms.append(update(run, policy, samples, pairs, steps, logged))
        run.log(run.epoch_metrics(samples, [], norms, logged))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
