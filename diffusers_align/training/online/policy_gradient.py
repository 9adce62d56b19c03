"""The updates of an epoch by a loss on log-probabilities: each optimizer step's batches are replayed, solver step by solver step.

A script says what a replayed step costs. Everything else is here: the pass under the pretrained model and the KL to it, the backward
pass of each solver step by itself, so that memory is that of one (or of `--replay_steps_per_forward`), the numbers to log, and the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...driving.forwards import Forwards
from ...policy import Policy
from ...rl import describe_clip, ratio_diagnostics
from ...rl.importance import ClipRange
from ...trajectory import Trajectory
from ...transition import GaussianTransition
from .ruling_steps import describe_ruling_steps
from .sampling import Samples
from .trained_steps import some_of


@dataclass(frozen=True)
class ReplayedStep:
    """Solver step `k` of a batch of B samples under the current weights: what a loss is a function of.

    Attributes:
        transition: the step's Gaussian, with its graph.
        action: (B, *D), the state that was drawn there.
        log_prob: (B,) nats of the action, with its graph.
        old_log_prob: (B,) nats, by the policy that sampled.
        index: (B,), the samples' positions among the N of the epoch: `advantages[step.index]`.
        view: which of a batch's views this is, 0 where there is one.
        length: |sigma_next - sigma| of the step; NaN for diffusion.
        old: the Gaussian of the policy that sampled, where the samples kept it.
    """

    k: int
    transition: GaussianTransition
    action: Tensor
    log_prob: Tensor
    old_log_prob: Tensor
    index: Tensor
    view: int
    length: float
    old: GaussianTransition | None = None

    @property
    def per_dim(self) -> int:
        """The number of dimensions of an action."""
        return self.action[0].numel()

    @property
    def log_ratio(self) -> Tensor:
        """log p - log p_old per dimension, (B,)."""
        return (self.log_prob - self.old_log_prob) / self.per_dim


Loss = Callable[[ReplayedStep], Tensor]
Divergence = Callable[[ReplayedStep, GaussianTransition], Tensor]


def policy_gradient_epoch(
    run,
    policy: Policy,
    samples: Samples,
    steps: list[int] | list[list[int]],
    loss: Loss,
    *,
    clip_range: ClipRange,
    kl: Divergence | None = None,
    kl_weight: float = 0.0,
    kl_share: float = 1.0,
    log_ratio: Callable[[ReplayedStep], Tensor] | None = None,
    views: list[list[Trajectory]] | None = None,
    logged: dict[str, list[float]] | None = None,
) -> dict[str, float]:
    """Minimise the mean of `loss` over samples and steps, one optimizer step after the other. Returns what to log of the epoch.

    Args:
        steps: the solver steps that are trained, of all batches, or a list for each batch.
        loss: of a replayed step, (B,).
        clip_range: of the ratio, for `clip_fraction`; infinite where the loss has none.
        kl: of a replayed step and the pretrained model's Gaussian there, (B,); it joins the loss times `kl_weight`, and is logged as `kl`.
            Without a weight there is no pass under the pretrained model.
        kl_share: the share of a batch's steps, drawn anew for each, at which the KL is computed; it counts for the others too, so that its mean and
            that of its gradient are those of all steps.
        log_ratio: (B,), of losses whose ratio is another than the plain one per dimension.
        views: for each batch its trajectory under each of several captions, in the place of the batch; a view's `loss` is its part of their mean.
        logged: what else to log, as `metrics.epoch_metrics` takes it.

    Raises:
        ValueError: no step is left to train; `--replay_steps_per_forward` or `--no-unconditional_gradient` can have no effect, or the pipeline cannot have it.
    """
    objective = _Objective(samples, loss, clip_range, kl, kl_weight, log_ratio)
    widest = clip_range[1] if isinstance(clip_range, tuple) else clip_range
    if log_ratio is None and widest < math.inf:
        run.explain_once(describe_clip(widest, samples.batches[0].final[0].numel()))
    views = views or [[trajectory] for trajectory in samples.batches]
    steps = [list(steps if not steps or isinstance(steps[0], int) else steps[b]) for b in range(len(views))]
    if log_ratio is None and views:  # a ratio of its own is scaled step by step
        run.explain_once(*describe_ruling_steps(policy.scheduler, samples.batches[-1], steps[-1]))
    forwards, norms = forwards_of(run.args, max(map(len, steps))), []
    for chunk in run.chunks(len(views), run.division.batches_a_step):
        objective.diagnostics.append([])
        for b in chunk:
            weight = run.loss_weight(samples, chunk, len(steps[b]))
            for view, trajectory in enumerate(views[b]):
                held = some_of(steps[b], kl_share, f"{run.args.seed}/{run.epoch}/{run.division.block(b)}/{view}/kl") if kl_weight > 0 else []
                part = len(held) / len(steps[b]) * len(views[b])
                add_gradient(run, policy, trajectory, steps[b], objective.of(b, view, trajectory, weight, part), held, forwards)
        norms.append(run.optimizer_step())
    return run.epoch_metrics(samples, objective.diagnostics, norms, {"kl": objective.kls, **(logged or {})})


def add_gradient(
    run,
    policy: Policy,
    trajectory: Trajectory,
    steps: list[int],
    loss: Callable[[int, GaussianTransition, GaussianTransition | None], Tensor],
    held_at: Collection[int] = (),
    forwards: Forwards | None = None,
) -> None:
    """Add to the parameters' gradient that of the sum of `loss` over the recorded `steps`, in memory for one denoiser step.

    Args:
        loss: of a step's number, its Gaussian, and the pretrained model's there (None at other steps than `held_at`): a number.
        forwards: how the denoiser is evaluated; step by step if absent.
    """
    held: dict[int, GaussianTransition] = {}
    if held_at:
        with policy.reference(), run.accelerator.autocast(), torch.no_grad():
            policy.replay(trajectory, held.__setitem__, list(held_at), forwards=forwards)
    with run.accelerator.autocast():
        policy.replay(trajectory, lambda k, transition: run.accelerator.backward(loss(k, transition, held.get(k))), steps, forwards=forwards)


def forwards_of(args, most_steps: int) -> Forwards | None:
    """What the flags say; None where each step is evaluated by itself, as by default.

    Args:
        most_steps: solver steps of a trajectory that are trained.

    Raises:
        ValueError: `--replay_steps_per_forward` has no effect.
    """
    number, unconditional = getattr(args, "replay_steps_per_forward", 1), getattr(args, "unconditional_gradient", True)
    if number > 1 and most_steps < 2:
        raise ValueError(f"--replay_steps_per_forward {number} has no effect: one solver step of a trajectory is trained at a time. Leave it out")
    return Forwards(number, unconditional) if number > 1 or not unconditional else None


@dataclass
class _Objective:
    """A loss with its KL, and what was seen of the two."""

    samples: Samples
    loss: Loss
    clip_range: ClipRange
    kl: Divergence | None
    kl_weight: float
    log_ratio: Callable[[ReplayedStep], Tensor] | None
    diagnostics: list[list[dict[str, float]]] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)

    def of(self, b: int, view: int, trajectory: Trajectory, weight: float, kl_parts: float):
        """The objective of the steps of a view of batch `b`, as `add_gradient` takes it; each step's KL stands for 1 / `kl_parts` of one."""
        lengths = trajectory.step_sizes

        def objective(k: int, transition: GaussianTransition, reference: GaussianTransition | None) -> Tensor:
            action, old = trajectory.actions[:, k], self.samples.kernels[b][k] if self.samples.kernels else None
            log_prob, old_log_prob = transition.log_prob(action), trajectory.log_probs[:, k]
            step = ReplayedStep(k, transition, action, log_prob, old_log_prob, self.samples.index[b], view, lengths[k], old)
            loss = self.loss(step)
            if reference is not None:
                kl = self.kl(step, reference)
                loss = loss + self.kl_weight * kl / kl_parts
                self.kls.append(kl.mean().item())
            with torch.no_grad():
                log_ratio = self.log_ratio(step) if self.log_ratio else step.log_ratio
            self.diagnostics[-1].append(ratio_diagnostics(log_ratio, torch.zeros_like(log_ratio), self.clip_range))
            return loss.sum() * weight

        return objective
