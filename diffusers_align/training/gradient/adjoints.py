"""A reward's gradient on its way back through the pipeline step by step, from stored states: Adjoint Matching's lean adjoints along the
pretrained model's chain, and the continuous adjoint of the model that is trained (`train_draft.py --adjoint`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...algorithms.adjoint_matching import lean_adjoints, smoothed_gradient, terminal_adjoint
from ...algorithms.continuous_adjoint import adjoint_gradient
from ...algorithms.draft import draft_loss
from ...condition import Condition
from ...forward_process import ForwardProcess
from ...gradients.check import scaled_gradients
from ...gradients.decoding import decode_latents
from ...gradients.rollout import differentiable_rollout, solver_step
from ...policy import Policy, noise_seed
from ...schedulers.scheduling_ancestral_sde import LEARNED
from ...trajectory import Trajectory
from ...transition import GaussianTransition
from .losses import reward_map, scored_sum


def make_memoryless(policy: Policy, sde_type: str = "memoryless") -> None:
    """Set the scheduler's noise to the one that forgets the initial state: `sde_type` for flow matching, eta = 1 for diffusion.

    Raises:
        ValueError: the scheduler clips the clean sample, where no gradient passes, or the model learns the variance of its steps.
    """
    config = policy.scheduler.config
    if config.get("variance_type") in LEARNED:
        raise ValueError(
            "This model learns the variance of its steps, and Adjoint Matching moves means under noise that is given: train it with train_draft.py."
        )
    if config.get("clip_sample") or config.get("thresholding"):
        raise ValueError("The scheduler clips the clean sample, where no gradient passes: set clip_sample=False and thresholding=False in its config.")
    noise = {"sde_type": sde_type, "noise_level": 1.0} if "sde_type" in config else {"eta": 1.0}
    policy.scheduler.register_to_config(**noise, **({"sde_window": None} if "sde_window" in config else {}))


@torch.no_grad()
def schedule_memory(scheduler) -> float:
    """Correlation of initial noise and sample along the scheduler's current timesteps, for standard normal data and their exact model.

    0 for a memoryless schedule. A chain that remembers changes the optimum: the tilt comes out short by its square.

    Raises:
        ValueError: the scheduler's timesteps do not tell the noise level.
    """
    process, variance, covariance = ForwardProcess(scheduler), 1.0, 1.0
    for t in scheduler.timesteps:
        times, x = t.reshape(1).cpu(), torch.ones(1, 1, dtype=torch.float64)
        alpha, sigma = process.alpha(times).double(), process.sigma(times).double()
        total = alpha.square() + sigma.square()
        step = scheduler.transition(process.target(x * alpha / total, x * sigma / total, times), t, x)
        slope, std = float(step.mean), float(step.std)
        variance, covariance = slope**2 * variance + std**2, slope * covariance
    return covariance / variance**0.5


def describe_memory(scheduler) -> str:
    """What is left of the initial noise in the sample, in words."""
    try:
        memory = schedule_memory(scheduler)
    except ValueError as error:
        return f"schedule memory unknown: {error}"
    return f"schedule memory: noise and sample correlate by {memory:.2g}, so the tilt comes out short by {memory**2:.1%} or less"


def check_chain(trajectory: Trajectory) -> None:
    """Whether the pretrained chain has a Gaussian kernel at every step but the last.

    Raises:
        ValueError: deterministic steps on the way, or a second modality with a chain of its own.
    """
    if trajectory.children:
        raise ValueError("This pipeline denoises several modalities in chains of their own; the adjoint of one does not pass through the others.")
    if silent := [k for k in range(trajectory.num_steps - 1) if not trajectory.stochastic[k]]:
        raise ValueError(f"Adjoint Matching needs noise at every step but the last; steps {silent} of {trajectory.num_steps} have none.")


def noisy_steps(scheduler, trajectory: Trajectory, min_std: float) -> list[int]:
    """The solver steps whose noise is at least `min_std`, by the scheduler that has just made the trajectory.

    Raises:
        ValueError: there is none.
    """
    origin = torch.zeros(1, *[1] * (trajectory.final.ndim - 1))
    found = [k for k, t in enumerate(trajectory.timesteps) if trajectory.stochastic[k] and float(scheduler.transition(origin, t, origin).std) >= min_std]
    if not found:
        raise ValueError(f"No step's noise has a standard deviation of {min_std:g} or more, so there is nothing to train: lower --min_std.")
    return found


def kernel_at(policy: Policy, trajectory: Trajectory, k: int, state: Tensor, condition: Condition | None = None) -> GaussianTransition:
    """The kernel of solver step k > 0 as a function of `state` (B, *D), what step k - 1 returned: with the graph between the two."""
    actions = trajectory.actions
    given = torch.cat([actions[:, : k - 1], state[:, None].to(actions), actions[:, k:]], 1)
    return policy.transition(replace(trajectory, actions=given), k, condition)


@dataclass(frozen=True)
class RewardGradient:
    """Of B final latents.

    Attributes:
        rewards: (B,) float32, NaN where the reward could not score.
        gradient: (B, *D) float32, of each sample's own reward; 0 where there is none.
    """

    rewards: Tensor
    gradient: Tensor


def reward_gradient(policy: Policy, latents: Tensor, condition: Condition, reward: Callable[[Tensor], Tensor]) -> RewardGradient:
    """`reward` takes images in [0, 1] and returns (B,), the prompts bound.

    Raises:
        ValueError: the reward has no graph.
    """
    x = latents.detach().float().requires_grad_()
    with torch.enable_grad():
        rewards = reward(decode_latents(policy, x.to(latents.dtype), condition, checkpoint=False).float())
    if not rewards.requires_grad:
        raise ValueError("The reward has no gradient: it leaves torch (for NumPy or PIL), detaches, or runs under no_grad. Adjoint Matching needs one that is.")
    scored = ~rewards.isnan()
    (gradient,) = scaled_gradients(rewards[scored].sum(), [x], half=latents.dtype == torch.float16)
    return RewardGradient(rewards.detach(), torch.where(scored.reshape(-1, *[1] * (x.ndim - 1)), gradient, 0.0))


def smoothed(policy: Policy, latents: Tensor, condition: Condition, reward, *, copies: int, noise_std: float, quantile: float) -> RewardGradient:
    """`reward_gradient`, averaged over noised copies of the latents; its rewards are the means. Noise is keyed by the samples' seeds."""
    generators = [torch.Generator().manual_seed(noise_seed(seed, "smoothing")) for seed in condition.seeds]
    found = []
    for _ in range(copies):
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators]).to(latents.device)
        found.append(reward_gradient(policy, (latents.float() + noise_std * noise).to(latents.dtype), condition, reward))
    return RewardGradient(torch.stack([f.rewards for f in found]).mean(0), smoothed_gradient(torch.stack([f.gradient for f in found]), quantile))


@dataclass(frozen=True)
class Matching:
    """What the steps of B trajectories are regressed on.

    Attributes:
        base_means: (B, *D) by trained step k, the pretrained model's mean at x_k.
        adjoints: (B, *D) by trained step k, a_{k+1}.
        reward: of the chain whose last step, if it has no noise, is the pretrained model's.
    """

    base_means: dict[int, Tensor]
    adjoints: dict[int, Tensor]
    reward: RewardGradient


def matching_targets(
    policy: Policy,
    trajectory: Trajectory,
    steps: list[int],
    gradient_of: Callable[[Tensor], RewardGradient],
    reward_scale: float,
    condition: Condition | None = None,
) -> Matching:
    """Walk back along `trajectory` under the pretrained model.

    Args:
        steps: stochastic solver steps to train.
        gradient_of: final latents (B, *D) to their `RewardGradient`.
        condition: in the place of the trajectory's own, for a model without guidance on guided trajectories.
    """
    last, means = trajectory.num_steps - 1, {}

    def base_mean(k: int, state: Tensor) -> Tensor:
        mean = kernel_at(policy, trajectory, k, state, condition).mean
        means[k] = mean.detach()
        return mean

    with policy.reference():
        final = trajectory.final if trajectory.stochastic[last] else policy.transitions(trajectory, [last], condition)[last].mean
        reward = gradient_of(final.to(trajectory.final.dtype))
        states = [trajectory.states[:, 0], *trajectory.actions.unbind(1)]
        adjoints = lean_adjoints(states, base_mean, terminal_adjoint(reward.gradient, reward_scale), first=min(steps))
        missing = [k for k in steps if k not in means]
        means |= {k: kernel.mean for k, kernel in policy.transitions(trajectory, missing, condition).items()}
    return Matching({k: means[k] for k in steps}, {k: adjoints[k] for k in steps}, reward)


# --- the continuous adjoint ----------------------------------------------------------------------------------------------


def adjoint_backward(run, policy: Policy, batch, truncation: int, weight: float) -> tuple[Tensor, float]:
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
