"""DPOK: align a pipeline with any reward by policy gradients with a learned value baseline, held near the pretrained model.

    accelerate launch training_scripts/train_dpok.py --config training_scripts/recipes/dpok_mini_sd.yaml

The algorithm's pages are `diffusers_align/algorithms/dpok.py` and `diffusers_align/rl/values.py`
(https://arxiv.org/abs/2305.16381). Flow-matching pipelines work too: their noise is `--sde_type` and `--noise_level`.
"""

from typing import Literal

from pydantic import model_validator

from diffusers_align.training.flags.common import LearningRate, SamplingArguments
from diffusers_align.training.flags.methods import StrengthArguments
from diffusers_align.training.flags.options import Count, NonNegative, Positive, Probability, option, parse

KL_WEIGHT = {"official": 0.01, "paper": 0.05}
DEFAULTS = {
    "train_batch_size": 2, "rank": 4, "lora_alpha": 4, "learning_rate": 1e-5, "max_grad_norm": 0.1, "adam_weight_decay": 0.0,
    "num_inference_steps": 50, "guidance_scale": 7.5,
}  # fmt: skip
LEARNED = {"value_baseline": True}


class DPOKArguments(StrengthArguments, SamplingArguments, defaults=DEFAULTS):
    """DPOK"""

    num_samples_per_epoch: Count = option(10, "samples an epoch, each of a prompt")
    clip_range: Positive = option(1e-4, "of the ratio per dimension")
    clip_mode: Literal["ppo", "clamp"] = option("ppo", "clamp is the official code's: no gradient beyond the clip on either side")
    reward_weight: Positive = option(10.0, "of the policy gradient; 10 for a single prompt, 1000 for many")
    reward_filter: bool = option(False, "train on max(reward, 0)")
    kl_form: Literal["official", "paper"] = option("official", "error of the model's outputs, or Gaussian KL per dimension", needs={"kl_weight": True})
    kl_weight: NonNegative | None = option(None, "of the KL to the pretrained model (official: 0.01, paper: 0.05); 0 saves its forward pass")
    value_baseline: bool = option(True, "a learned baseline; without it, rewards normalised over the batch")
    gae_lambda: Probability = option(1.0, "1: reward minus value, as in DPOK; below 1 later values stand in for part of the reward (GAE)", needs=LEARNED)
    value_learning_rate: LearningRate = option(1e-4, "of the baseline", needs=LEARNED)
    value_batch_size: Count = option(256, "transitions of a minibatch", needs=LEARNED)
    value_accumulation_steps: Count = option(5, "minibatches of an optimizer step", needs=LEARNED)
    value_steps: Count = option(1, "optimizer steps an epoch", needs=LEARNED)
    value_buffer_size: Count = option(1000, "latest transitions kept; at most half are of one epoch", needs=LEARNED)

    @model_validator(mode="after")
    def _fill_kl_weight(self):
        self.kl_weight = KL_WEIGHT[self.kl_form] if self.kl_weight is None else self.kl_weight
        if not self.value_baseline and self.num_samples_per_epoch < 2:
            raise ValueError("--no-value_baseline compares the samples of an epoch: --num_samples_per_epoch must be 2 or more")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(DPOKArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

import random

import torch
from accelerate.utils import gather_object

from diffusers_align.algorithms.dpok import describe_kl, dpok_loss, output_mse, output_weight
from diffusers_align.rl import batch_advantages, describe_clip, ratio_diagnostics
from diffusers_align.rl.values import ValueBaseline, explained_variance, value_advantages
from diffusers_align.training import Report, Run
from diffusers_align.training.online.sampling import sample_epoch

# The official weight goes with the official form; on Stable Diffusion's 50 steps 0.05 of the paper's form weighs as much.


def make_values(args, device):
    options = {n: getattr(args, f"value_{n}") for n in ("learning_rate", "batch_size", "accumulation_steps", "buffer_size")}
    return ValueBaseline(args.num_inference_steps, **options, seed=args.seed, device=device)


def transitions_for_the_buffer(samples, features, rewards, args, epoch):
    """Random transitions of all processes' samples, the same on each process: states, prompt features, steps, rewards."""
    steps = samples.batches[0].noisy_steps
    pairs = [(i, k) for i in range(len(rewards)) for k in steps]
    number = min(len(pairs), max(1, args.value_buffer_size // 2))
    drawn = set(random.Random(f"{args.seed}/{epoch}/values").sample(pairs, number))
    mine = []
    for trajectory, prompts, index in zip(samples.batches, features, samples.index):
        for row, i in enumerate(index.tolist()):
            mine += [(i, k, trajectory.states[row, k].cpu(), prompts[row].cpu()) for k in steps if (i, k) in drawn]
    chosen, at_steps, states, prompts = zip(*sorted(gather_object(mine), key=lambda found: found[:2]))
    return torch.stack(states), torch.stack(prompts), torch.tensor(at_steps), rewards[list(chosen)]


def values_of(values, trajectory, prompts):
    """V of each state on a trajectory, (B, K)."""
    steps = [torch.full((len(trajectory),), k) for k in range(trajectory.num_steps)]
    return torch.stack([values(trajectory.states[:, k], prompts, step).cpu() for k, step in enumerate(steps)], 1)


def learned_advantages(values, policy, samples, rewards, args, epoch):
    """r - V of each batch's samples and steps, (B, K), before the value network is fitted to them; and what to log."""
    features = [policy.prompt_features(trajectory.condition) for trajectory in samples.batches]
    values.remember(*transitions_for_the_buffer(samples, features, rewards, args, epoch))
    predicted = [values_of(values, trajectory, prompts) for trajectory, prompts in zip(samples.batches, features)]
    advantages = [value_advantages(rewards[index], value, lam=args.gae_lambda) for index, value in zip(samples.index, predicted)]
    explained = explained_variance(rewards[torch.cat(samples.index)], torch.cat(predicted))
    return advantages, {"explained_variance": [explained], "value_error": [values.fit(args.value_steps)]}


def output_weights(policy, trajectory, steps):
    """How far a unit of model output moves each step's mean, and the ratio of the paper's to the official KL there."""
    weights, scales = {}, []
    zero = torch.zeros([1] * trajectory.final.ndim)
    for k in steps:
        at = trajectory.timesteps[k]
        weights[k] = output_weight(lambda output: policy.scheduler.transition(output, at, zero).mean, zero.ndim)
        scales.append(weights[k] ** 2 / (2 * float(policy.scheduler.transition(zero, at, zero).std) ** 2))
    return weights, scales


def divergence(transition, reference, weight, form):
    """The KL of a step from the pretrained one's, (B,), in the chosen form."""
    if form == "official":
        return output_mse(transition.mean, reference.mean, weight)
    return transition.kl(reference) / transition.mean[0].numel()


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DPOK")
    num_batches, batches_a_step = run.batches(args.num_samples_per_epoch)
    report = Report(run)
    policy = run.load_policy(**{n: getattr(args, n) for n in ("eta", "sde_type", "noise_level") if getattr(args, n) is not None})
    run.load_optimizer(args.num_epochs * -(-num_batches // batches_a_step))
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
        steps, dimensions = trajectory.noisy_steps, trajectory.final[0].numel()
        weights, scales = output_weights(policy, trajectory, steps)
        run.explain_once(describe_clip(args.clip_range, dimensions), describe_kl(args.kl_weight, args.kl_form, scales))

        # 2 value baseline and advantages
        rewards, learned = samples.rewards.clamp(min=0) if args.reward_filter else samples.rewards, {}
        if args.value_baseline:
            advantages, learned = learned_advantages(values, policy, samples, rewards, args, epoch)
        else:
            advantages = [batch_advantages(rewards)[index, None].expand(-1, trajectory.num_steps) for index in samples.index]

        # 3 loss and update
        diagnostics, norms, kls = [], [], []
        for chunk in run.chunks(num_batches, batches_a_step):
            diagnostics.append([])
            weight = run.loss_weight(samples, chunk, len(steps))
            for b in chunk:
                trajectory, advantage, reference = samples.batches[b], advantages[b].to(run.accelerator.device), {}
                if args.kl_weight > 0:
                    with policy.reference(), run.accelerator.autocast():
                        reference = policy.transitions(trajectory)

                def on_step(k, transition):
                    old, new = trajectory.log_probs[:, k], transition.log_prob(trajectory.actions[:, k])
                    kl = divergence(transition, reference[k], weights[k], args.kl_form) if reference else torch.zeros(())
                    loss = dpok_loss(
                        new, old, advantage[:, k], kl, per_dim=dimensions, clip_range=args.clip_range, clip_mode=args.clip_mode,
                        reward_weight=args.reward_weight, kl_weight=args.kl_weight,
                    )  # fmt: skip
                    run.accelerator.backward(loss.sum() * weight)
                    diagnostics[-1].append(ratio_diagnostics(new, old, args.clip_range, dimensions))
                    kls.append(kl.mean().item())

                with run.accelerator.autocast():
                    policy.replay(trajectory, on_step)
            norms.append(run.optimizer_step())
        run.log(run.epoch_metrics(samples, diagnostics, norms, {"kl": kls, **learned}))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
