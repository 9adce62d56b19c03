"""SPO: align a pipeline by step-aware preferences: at each step, the better of several candidates from the same state.

    accelerate launch training_scripts/train_spo.py --config training_scripts/recipes/spo_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/spo.py` (https://arxiv.org/abs/2406.04314). A candidate is judged, as in the official code, by
the clean image that the model predicts from it at the next timestep; any reward will do, and one
that takes the column `noise_level` (`train_reward.py --step_aware`) learns how much of the noise is still in it.
"""

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import ClipRange, NoiseArguments
from diffusers_align.training.flags.options import Count, Decay, Positive, StepIndex, option, parse

DEFAULTS = {"rank": 4, "lora_alpha": 4, "learning_rate": 6e-5, "num_inference_steps": 20, "train_batch_size": 10}


class SPOArguments(NoiseArguments, SamplingArguments, defaults=DEFAULTS):
    """SPO"""

    num_samples_per_epoch: Count = option(40, "paths per epoch, each of a prompt")
    num_candidates: Annotated[int, Interval(ge=2, le=10**4)] = option(4, "k, from each state: 4 for SD 1.5, 2 for SDXL (official)")
    divert_start_step: StepIndex = option(4, "no pairs before this solver step (official: 4 of 20)")
    threshold: Decay = option(0.3, "least difference of the pair's softmax probabilities: 0.3 for SD 1.5, 0.4 for SDXL")
    score_scale: Positive = option(1.0, "of the reward, to the scale of logits: a difference of 1 is a preference of 73 %")
    beta: Positive = option(10.0, "preference temperature, with log-probabilities per dimension (official)")
    clip: Literal["one_sided", "official", "none"] = option("one_sided", "what holds steps that went far: see D3PO's page")
    clip_range: ClipRange = option(0.1, "of the ratio per dimension (official)", needs={"clip": ("one_sided", "official")})

    @model_validator(mode="after")
    def _check_divert_start_step(self):
        if self.divert_start_step >= self.num_inference_steps:
            raise ValueError(f"--divert_start_step must lie in the {self.num_inference_steps} steps of --num_inference_steps, got {self.divert_start_step}")
        if self.sde_window and self.sde_window[1] <= self.divert_start_step:
            first, end = self.sde_window
            raise ValueError(
                f"--sde_window {first} {end} ends before --divert_start_step {self.divert_start_step}, the first step with pairs, so that there would be none: "
                "lower --divert_start_step or move the window"
            )
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(SPOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from collections import defaultdict

from diffusers_align.algorithms.d3po import d3po_metrics
from diffusers_align.algorithms.spo import spo_loss
from diffusers_align.training import Report, Run
from diffusers_align.training.online.policy_gradient import add_gradient
from diffusers_align.training.online.ruling_steps import describe_ruling_steps
from diffusers_align.training.online.sampling import noise_fields
from diffusers_align.training.online.step_candidates import sample_pairs


def accumulate(run, policy, samples, b, weight, logged):
    """Add the gradient of batch `b`: winner and loser of a state are scored by one and the same transition."""
    args, trajectory = run.args, samples.batches[b]
    keep = samples.keep[samples.index[b]].to(policy.device)
    used = [k for place, k in enumerate(samples.steps) if policy.lockstep or keep[:, place].any()]
    options = {"per_dim": trajectory.final[0].numel(), "beta": args.beta, "clip": args.clip, "clip_range": args.clip_range}

    def loss(k, transition, reference):
        place = samples.steps.index(k)
        pair, kept = [side[b][:, place] for side in (samples.winners, samples.losers)], keep[:, place]
        log_probs = [kernel.log_prob(action) for kernel in (transition, reference) for action in pair]
        values = spo_loss(*log_probs, **options)
        if kept.any():
            logged["loss"].append(values[kept].mean().item())
            for name, number in d3po_metrics(*(value[kept] for value in log_probs), **options).items():
                logged[name].append(number)
        return (values * kept).sum() * weight

    add_gradient(run, policy, trajectory, used, loss, held_at=used)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "SPO")
    run.health.compares_rewards = False  # those of candidates, not of images
    num_batches, batches_a_step = run.batches(args.num_samples_per_epoch)
    report = Report(run)
    policy = run.load_policy(**noise_fields(args))
    run.load_optimizer(args.num_epochs * run.division.num_steps)
    run.resume()
    report.start()

    for epoch in run.epochs():
        # 1 roll out with candidates at each step, judged by what the model sees in them, 2 and the pairs that they make
        samples = sample_pairs(run, policy, report.reward, report.prompts, epoch, args.num_samples_per_epoch)

        run.explain_once(*describe_ruling_steps(policy.scheduler, samples.batches[-1], samples.steps))

        # 3 loss and 4 update: the mean over the pairs that are kept
        norms, logged = [], defaultdict(list)
        logged["kept"], logged["score_gap"] = [samples.keep.float().mean().item()], [samples.gap.mean().item()]
        for number, chunk in enumerate(run.chunks(num_batches, batches_a_step)):
            kept = samples.keep[list(run.division.step(number))].sum().item()
            if kept == 0:
                continue
            for b in chunk:
                accumulate(run, policy, samples, b, 1 / kept, logged)
            norms.append(run.optimizer_step())
        run.log(run.epoch_metrics(samples, [], norms, logged))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
