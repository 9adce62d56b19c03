"""Adjoint Matching: align a pipeline with a differentiable reward by regression on pulled-back reward gradients.

    accelerate launch training_scripts/train_adjoint_matching.py --config training_scripts/recipes/adjoint_matching_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/adjoint_matching.py` (https://arxiv.org/abs/2409.08861).
"""

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import PretrainingArguments
from diffusers_align.training.flags.options import Count, NonNegative, Positive, PositiveShare, StepIndex, option, parse

# The paper's, section 6 and appendix: 40 steps, batches of 40, Adam with these.
DEFAULTS = {"num_inference_steps": 40, "num_epochs": 1000, "learning_rate": 2e-5, "adam_beta1": 0.95, "adam_weight_decay": 1e-2}
SMOOTHED = {"smoothing_copies": True}


class AdjointMatchingArguments(PretrainingArguments, SamplingArguments, defaults=DEFAULTS):
    """Adjoint Matching"""

    num_prompts_per_epoch: Count = option(40, "one sample each; together one optimizer step, unless accumulation says less")
    reward_scale: Positive = option(12500.0, "lambda, nats of KL for a unit of reward; the paper's for ImageReward (100 to 12500)")
    sde_type: Literal["memoryless", "memoryless_em"] = option("memoryless", "of flow matching: ancestral, or the paper's form")
    last_steps: StepIndex = option(10, "train the last stochastic steps of a trajectory")
    random_steps: StepIndex = option(10, "and that many of those before, drawn for each batch")
    min_std: NonNegative = option(0.01, "train no step with less noise: schedules that end just above 0 have one such step", advanced=True)
    loss_clip: Positive | None = option(None, "leave out steps of samples whose loss is above that many lambda^2 / K (1.6 in the paper)")
    cfg: Literal["none", "trajectories", "everywhere"] = option("none", "where --guidance_scale acts in training")
    smoothing_copies: Annotated[int, Interval(ge=0, le=10**4)] = option(0, "average the reward's gradient over noised copies (official code: 20)")
    smoothing_std: Positive = option(0.02, "of that noise, in units of the latents", needs=SMOOTHED, advanced=True)
    smoothing_quantile: PositiveShare = option(0.85, "of the copies' gradient norms, at which the longest are cut", needs=SMOOTHED, advanced=True)

    @model_validator(mode="after")
    def _check_trained_steps(self):
        if self.last_steps + self.random_steps < 1:
            raise ValueError("--last_steps and --random_steps leave no step to train")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(AdjointMatchingArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

import random
from collections import defaultdict
from dataclasses import replace

from diffusers_align.algorithms.adjoint_matching import adjoint_matching_loss, loss_threshold, matched_steps, matching_diagnostics, summary, within
from diffusers_align.training import Report, Run
from diffusers_align.training.gradient.adjoints import check_chain, describe_memory, make_memoryless, matching_targets, noisy_steps, reward_gradient, smoothed
from diffusers_align.training.gradient.bound_rewards import bound_reward
from diffusers_align.training.gradient.pretraining import Pretraining
from diffusers_align.training.gradient.reward_check import check_on_prompts
from diffusers_align.training.online.sampling import sample_epoch
from diffusers_align.training.run.inputs import condition_of


def targets(run, policy, trajectory, steps, reward, condition):
    """Base means and adjoints of `steps`, by the pretrained model."""
    args = run.args
    smoothing = {"copies": args.smoothing_copies, "noise_std": args.smoothing_std, "quantile": args.smoothing_quantile}

    def gradient_of(latents):
        if args.smoothing_copies:
            return smoothed(policy, latents, trajectory.condition, reward, **smoothing)
        return reward_gradient(policy, latents, trajectory.condition, reward)

    with run.accelerator.autocast():
        return matching_targets(policy, trajectory, steps, gradient_of, args.reward_scale, condition)


def regress(run, policy, trajectory, steps, target, condition, weight):
    """Add the gradient at `steps` of a batch's trajectories, `weight` for each step of a sample. Returns the diagnostics of each step."""
    args, diagnostics = run.args, []
    scored, threshold = ~target.reward.rewards.isnan(), loss_threshold(args.loss_clip, args.reward_scale, trajectory.num_steps)

    def on_step(k, transition):
        step = transition.mean, target.base_means[k], transition.std, target.adjoints[k]
        loss = adjoint_matching_loss(*step)
        counts = scored & within(loss, threshold)
        run.accelerator.backward((loss * counts).sum() * weight)
        diagnostics.append(matching_diagnostics(*step, counts))

    with run.accelerator.autocast():
        policy.replay(trajectory, on_step, steps, condition)
    return diagnostics


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "Adjoint Matching")
    run.health.compares_rewards = False  # it goes by their gradients
    num_batches, batches_a_step = run.batches(args.num_prompts_per_epoch, steps=1)
    report, beside = Report(run), Pretraining(run)
    policy = run.load_policy()
    make_memoryless(policy, args.sde_type)
    run.load_optimizer(args.num_epochs * run.division.num_steps)
    run.resume()
    check_on_prompts(run, policy, report, stochastic=True)
    report.start()
    unguided = {} if args.cfg == "everywhere" else policy.guidance_off(condition_of(policy, report.prompts[:1], seeds=[0]))
    sampling = unguided if args.cfg == "none" else {}

    for epoch in run.epochs():
        # 1 roll out
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, None, **sampling)
        check_chain(samples.batches[0])
        run.explain_once(describe_memory(policy.scheduler))

        diagnostics, norms, logged = [], [], defaultdict(list)
        for chunk in run.chunks(num_batches, batches_a_step):
            for b in chunk:
                # 2 the reward's gradient and lean adjoints
                trajectory, reward = samples.batches[b], bound_reward(report.reward, [samples.asked[i] for i in samples.index[b].tolist()], args, policy)
                condition = replace(trajectory.condition, kwargs=trajectory.condition.kwargs | unguided)
                noisy, draw = noisy_steps(policy.scheduler, trajectory, args.min_std), random.Random(f"{args.seed}/{epoch}/{run.division.block(b)}/steps")
                steps = matched_steps(noisy, args.last_steps, args.random_steps, draw)
                target = targets(run, policy, trajectory, steps, reward, condition)
                logged["gradient"].append(target.reward.gradient.flatten(1).norm(dim=1).mean().item())

                # 3 loss and update
                weight = run.loss_weight(samples, chunk, len(steps)) / trajectory.final[0].numel()
                diagnostics += regress(run, policy, trajectory, steps, target, condition, weight)
            beside.descend(policy, epoch, chunk, logged)
            norms.append(run.optimizer_step())
        matched = {name: [value] for name, value in summary(diagnostics, num_batches).items()}
        run.log(run.epoch_metrics(samples, [], norms, {**matched, **logged}))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
