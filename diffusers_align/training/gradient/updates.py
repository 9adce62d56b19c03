"""What scripts that differentiate the reward share: the batches of an update, the loss, the distance to the pretrained model.

Whatever is random about an update follows from (seed, epoch, position): a sample's noise from its own position, the choice of steps
from the update's. So all processes make the same denoiser calls, and the result depends on neither their number nor what came before.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...algorithms.continuous_adjoint import adjoint_gradient
from ...algorithms.draft import deviation, draft_loss
from ...algorithms.srpo import semantic_relative_preference
from ...condition import Condition
from ...data.prompts import Prompt, prompts_of_epoch
from ...gradients.check import UnscoredError, check_gradient
from ...gradients.decoding import decode_latents
from ...gradients.rollout import DifferentiableRollout, count_steps, differentiable_rollout, outputs_along, solver_step
from ...policy import Policy, noise_seed
from ...rewards import InvalidReward
from ...rewards.base import listed
from ...rewards.registry import reward_name
from ...rl.reward_maps import RewardMap
from ..flags.methods import RewardGradientArguments
from ..offline.examples import epoch_batches
from ..run.division import division_of
from ..run.inputs import condition_of
from .bound_rewards import BoundReward, bound_reward

# So many gradient norms make a quantile, so many are remembered.
MIN_NORMS, MAX_NORMS = 10, 100
# So many prompts are tried for one that the reward can score.
MAX_CHECKED = 8


def rollout_options(args: RewardGradientArguments) -> dict[str, Any]:
    """Arguments of every `differentiable_rollout`."""
    return {"stochastic": args.stochastic, **checkpoint_options(args)}


def checkpoint_options(args: RewardGradientArguments) -> dict[str, bool]:
    """What is computed again on the way back."""
    return {"checkpoint": args.checkpoint_steps, "decode_checkpoint": args.checkpoint_decoder}


# --- before training -----------------------------------------------------------------------------------------------------


def load_policy(run) -> Policy:
    """The pipeline with a fresh LoRA, and the noise of `--eta`."""
    return run.load_policy(**({} if run.args.eta is None else {"eta": run.args.eta}))


def check_reward(run, policy: Policy, report, **options: Any) -> int:
    """Whether a reward's gradient comes through the last step. Returns the number of solver steps.

    Raises:
        GradientError: it does not; the message names the component that cuts it.
        InvalidReward: none of the first prompts could be scored.
    """
    return check_on_prompts(run, policy, report, **rollout_options(run.args), **options)


def check_on_prompts(run, policy: Policy, report, *, stochastic: bool, **options: Any) -> int:
    """`check_gradient` on the first of a few prompts that the reward can score."""
    first, failures = report.prompts[:MAX_CHECKED], []
    for prompt in first:
        condition = condition_of(policy, [prompt], seeds=[noise_seed(run.args.seed, "check")])
        steps = count_steps(policy, condition, stochastic=stochastic)
        reward = bound_reward(report.reward, [prompt], run.args)
        with contextlib.suppress(UnscoredError), run.accelerator.autocast():
            check_gradient(policy, condition, reward, grad_steps=[steps - 1], stochastic=stochastic, **options)
            return steps
        failures += reward.failures
    raise InvalidReward(
        f"The reward could score none of the first {len(first)} prompts: {listed([prompt.text for prompt in first], MAX_CHECKED)}. "
        f"{' '.join([*failures[:1], 'Nothing is left to train on: repair the reward or change the prompts.'])}"
    )


@torch.no_grad()
def count_frames(policy: Policy, prompt: Prompt) -> int | None:
    """The frames of a video; None for pipelines that make images. Costs one denoiser call and the autoencoder's."""
    rollout = differentiable_rollout(policy, condition_of(policy, [prompt], seeds=[0]), grad_steps=[], stop_step=0)
    return rollout.images.shape[1] if rollout.images.ndim == 5 else None


# --- an epoch's updates --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """B samples to be rolled out.

    Attributes:
        condition: the call, with its seeds.
        asked: prompts with the data set's other fields.
        reward: images (B, 3, H, W) or (B, F, 3, H, W) in [0, 1] to (B,), NaN where it is masked.
    """

    condition: Condition
    asked: list[Prompt]
    reward: BoundReward


@dataclass(frozen=True)
class Update:
    """One optimizer step.

    Attributes:
        batches: this process's, each to be rolled out with the current weights.
        numbers: theirs in the epoch.
        generator: what the method draws for the step, the same on all processes and for all its batches.
        weight: makes the sum over its samples, on all processes, their mean.
    """

    batches: list[Batch]
    numbers: range
    generator: torch.Generator
    weight: float


def updates_of_epoch(run, policy: Policy, report, epoch: int, num_batches: int, batches_a_step: int) -> Iterator[Update]:
    """The optimizer steps of an epoch; `num_batches` and `batches_a_step` as `Run.batches` has them."""
    args = run.args
    chosen = prompts_of_epoch(report.prompts, args.num_samples_per_epoch, args.seed, epoch)
    parts = division_of(run, args.num_samples_per_epoch).batches
    run.meter.count_images(sum(map(len, parts)))

    def batch(b: int) -> Batch:
        places = parts[b]
        asked = [report.prompts[chosen[i]] for i in places]
        condition = condition_of(policy, asked, seeds=[noise_seed(args.seed, epoch, i, chosen[i]) for i in places])
        return Batch(condition, asked, bound_reward(report.reward, asked, args))

    for number, (chunk, weight) in enumerate(epoch_batches(run, num_batches, batches_a_step)):
        generator = torch.Generator().manual_seed(noise_seed(args.seed, epoch, "update", number))
        yield Update([batch(b) for b in chunk], chunk, generator, weight)


# --- loss ----------------------------------------------------------------------------------------------------------------


def reward_map(args: RewardGradientArguments) -> RewardMap:
    """The map of `--reward_map`, `--reward_target` and `--reward_scale`, for the loss of the algorithm's page."""
    return RewardMap(args.reward_map, args.reward_target, args.reward_scale)


def distance_to_reference(policy: Policy, rollout: DifferentiableRollout) -> Tensor:
    """Mean over the gradient steps of `draft.deviation`, (B,): nats per dimension where a step is stochastic, the mean squared
    difference of the models' outputs where it is not. Its gradient is the whole one, through the states to the steps before."""
    reference = outputs_along(policy, rollout, reference=True)
    found = [
        deviation(step.model_output.float(), reference[k].model_output.float(), step.transition, reference[k].transition, per_dim=rollout.latents[0].numel())
        for k, step in rollout.steps.items()
    ]
    return torch.stack(found).mean(0)


def total_loss(policy: Policy, rollout: DifferentiableRollout, loss: Tensor, args: RewardGradientArguments, logged: dict[str, list[float]]) -> Tensor:
    """The loss (B,) with `--kl_weight` times the distance to the pretrained model, which is logged."""
    if args.kl_weight == 0:
        return loss
    kl = distance_to_reference(policy, rollout)
    logged["kl"].append(kl.mean().item())
    return loss + args.kl_weight * kl


def scored_sum(loss: Tensor) -> Tensor:
    """The sum over the samples that the reward could score; 0 with a graph if there are none."""
    return torch.where(loss.isnan(), 0.0, loss).sum()


def finite(values: Tensor) -> list[float]:
    """The numbers among `values`, for the log."""
    return [value for value in values.tolist() if value == value]


class EpochLog(defaultdict):
    """What this process saw in an epoch: lists of numbers by name, of which the mean is logged.

    Attributes:
        norms: of the gradient, one an optimizer step.
        asked, unscored: texts of all samples, and of those that the reward could not score.
        failures: of the reward, in words.
    """

    def __init__(self):
        super().__init__(list)
        self.norms: list[float] = []
        self.asked: list[str] = []
        self.unscored: list[str] = []
        self.failures: list[str] = []

    def add_rewards(self, batch: Batch, rewards: Tensor) -> None:
        """The rewards (B,) of a batch, NaN where there is none."""
        texts = [prompt.text for prompt in batch.asked]
        self["reward"] += finite(rewards)
        self.asked += texts
        self.unscored += [text for text, value in zip(texts, rewards.tolist()) if value != value]
        self.failures += batch.reward.failures

    def metrics(self, run, report) -> dict[str, float]:
        """Of all processes; says which samples were left out.

        Raises:
            InvalidReward: not one sample has a reward, so there was nothing to learn from.
        """
        asked, unscored, failures = (gather_object(list(own)) for own in (self.asked, self.unscored, self.failures))
        say = f"Reward {reward_name(report.reward)!r} has no score for {len(unscored)} of {len(asked)} samples. Prompts: {listed(unscored)}."
        say = " ".join([say, *failures[:1]])
        if len(unscored) == len(asked):
            raise InvalidReward(f"{say} Nothing is left to train on: repair the reward or change the prompts.")
        metrics = run.epoch_metrics(None, [], self.norms, self)
        if not unscored:
            return metrics
        run.print(f"Left out: {say}")
        return {**metrics, "invalid_rewards": float(len(unscored))}


class GradientClip:
    """Clips an update's gradient at `--max_grad_norm` and, with `--grad_clip_quantile`, at that quantile of the norms before: one
    outlier does not move the weights further than others do. Resumes with the run."""

    def __init__(self, run):
        self.run, self.norms = run, []
        run.register("gradient_clip", self)

    @property
    def limit(self) -> float:
        quantile, most = self.run.args.grad_clip_quantile, self.run.args.max_grad_norm or math.inf
        if quantile is None or len(self.norms) < MIN_NORMS:
            return most
        return min(most, float(torch.tensor(self.norms, dtype=torch.float64).quantile(quantile)))

    def step(self) -> float:
        """The optimizer step. Returns the gradient's norm before clipping."""
        norm = self.run.optimizer_step(self.limit)
        if norm < float("inf"):
            self.norms = [*self.norms, norm][-MAX_NORMS:]
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = list(state["norms"])


def relative_rewards(run, batch: Batch, images: Tensor, words: tuple[str, str], discount: float) -> Tensor:
    """SRPO's relative rewards (B,): the images' with the first of `words` before the prompts, against those with the second."""
    asked = ([replace(prompt, text=f"{word} {prompt.text}".strip()) for prompt in batch.asked] for word in words)
    wanted, unwanted = (replace(batch.reward, asked=prompts)(images) for prompts in asked)
    if torch.equal(wanted, unwanted):
        run.explain_once(
            f"SRPO: the reward is the same under {words[0]!r} and {words[1]!r}, so it reads no such words in a prompt, and all that is left of the relative "
            f"reward is {discount:.2g} times the reward. Take one that compares images with texts, such as clip_score, hps_v2 or pick_score."
        )
    return semantic_relative_preference(wanted, unwanted, discount)


# --- the continuous adjoint ----------------------------------------------------------------------------------------------


def adjoint_backward(run, policy: Policy, batch: Batch, truncation: int, weight: float) -> tuple[Tensor, float]:
    """Add the gradient of `weight` * sum(loss) through the last `truncation` steps to the parameters', step by step from stored states.

    Returns:
        The rewards (B,) and the adjoint's `mismatch`.

    Raises:
        ValueError: the solver remembers earlier steps.
    """
    parameters = run.parameters
    with run.accelerator.autocast():
        rollout = differentiable_rollout(policy, batch.condition, grad_steps=[], decode=False)
        latents = rollout.latents.detach().requires_grad_()
        images = decode_latents(policy, latents, batch.condition, checkpoint=run.args.checkpoint_decoder)
        rewards = batch.reward(images.float())
        (final,) = torch.autograd.grad(scored_sum(draft_loss(rewards, reward_map(run.args))) * weight, latents)
        states = [*rollout.states, latents.detach()]
        first = len(rollout.states) - truncation
        found = adjoint_gradient(lambda k, x: solver_step(policy, batch.condition, first + k, x), states[first:], final, parameters)
    for parameter, gradient in zip(parameters, found.gradients):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return rewards.detach(), found.mismatch
