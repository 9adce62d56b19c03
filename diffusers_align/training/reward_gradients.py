"""What scripts that differentiate the reward share: the batches of an update, the loss, the distance to the pretrained model.

Whatever is random about an update follows from (seed, epoch, position): a sample's noise from its own position, the choice of steps
from the update's. So all processes make the same denoiser calls, and the result depends on neither their number nor what came before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..algorithms.continuous_adjoint import adjoint_gradient
from ..algorithms.draft import deviation
from ..condition import Condition
from ..data.prompts import Prompt, prompts_of_epoch
from ..decoding import decode_latents
from ..differentiable import DifferentiableRollout, count_steps, differentiable_rollout, outputs_along, solver_step
from ..gradient_check import check_gradient
from ..policy import Policy, noise_seed
from ..rl.reward_maps import distance, hinge, shortfall
from .adjoints import bound_reward
from .division import division_of
from .inputs import condition_of
from .method_arguments import RewardGradientArguments
from .offline import epoch_batches

# So many gradient norms make a quantile, so many are remembered.
MIN_NORMS, MAX_NORMS = 10, 100


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
    """
    asked = report.prompts[:1]
    condition = condition_of(policy, asked, seeds=[noise_seed(run.args.seed, "check")])
    steps = count_steps(policy, condition, stochastic=run.args.stochastic)
    with run.accelerator.autocast():
        check_gradient(
            policy, condition, bound_reward(report.reward, asked, run.args.invalid_rewards), grad_steps=[steps - 1], **rollout_options(run.args), **options
        )
    return steps


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
    reward: Callable[[Tensor], Tensor]


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
        return Batch(condition, asked, bound_reward(report.reward, asked, args.invalid_rewards))

    for number, (chunk, weight) in enumerate(epoch_batches(run, num_batches, batches_a_step)):
        generator = torch.Generator().manual_seed(noise_seed(args.seed, epoch, "update", number))
        yield Update([batch(b) for b in chunk], chunk, generator, weight)


# --- loss ----------------------------------------------------------------------------------------------------------------


def reward_loss(rewards: Tensor, args: RewardGradientArguments) -> Tensor:
    """`--reward_scale` times the `--reward_map` of the rewards, (B,); NaN stays NaN."""
    target = args.reward_target
    loss = {
        "none": lambda: -rewards,
        "hinge": lambda: hinge(rewards, margin=target),
        "distance": lambda: distance(rewards, target=target),
        "shortfall": lambda: shortfall(rewards, best=target),
    }[args.reward_map]()
    return args.reward_scale * loss


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


def relative_rewards(report, batch: Batch, images: Tensor, words: tuple[str, str], discount: float, args: RewardGradientArguments) -> Tensor:
    """(1 + discount) reward under the first of `words` before the prompts, minus that under the second, (B,): for a reward that is a
    cosine with the prompt, SRPO's semantic relative preference."""
    wanted, unwanted = (
        bound_reward(report.reward, [replace(prompt, text=f"{word} {prompt.text}".strip()) for prompt in batch.asked], args.invalid_rewards)(images)
        for word in words
    )
    return (1 + discount) * wanted - unwanted


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
        (final,) = torch.autograd.grad(scored_sum(reward_loss(rewards, run.args)) * weight, latents)
        states = [*rollout.states, latents.detach()]
        first = len(rollout.states) - truncation
        found = adjoint_gradient(lambda k, x: solver_step(policy, batch.condition, first + k, x), states[first:], final, parameters)
    for parameter, gradient in zip(parameters, found.gradients):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return rewards.detach(), found.mismatch
