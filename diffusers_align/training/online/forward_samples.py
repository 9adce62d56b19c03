"""The updates of an epoch by a loss on the forward process: its samples are noised anew, and the model's outputs there are what a loss sees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...forward_process import ForwardProcess
from ...policy import Policy, noise_seed
from ...rl.matching import matching_error
from ...trajectory import Trajectory
from .sampling import Samples
from .trained_steps import first_share


@dataclass(frozen=True)
class NoisedBatch:
    """A batch of B samples, noised, and what the trained weights make of it.

    Attributes:
        place: (number of the batch, number of the draw).
        index: (B,), the samples' positions among the N of the epoch.
        x0, x_t, noise: (B, *D).
        t: (B,), in the scheduler's units.
        output: (B, *D), the model's, with its graph.
        others: the outputs (B, *D) of the anchors, by name, without a graph.
    """

    place: tuple[int, int]
    index: Tensor
    x0: Tensor
    x_t: Tensor
    t: Tensor
    noise: Tensor
    output: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Anchor:
    """Other weights, which the trained ones are compared with or held near.

    Attributes:
        name: of the mean squared distance of the two outputs, in the log.
        applied: a context in which the other weights are in place.
        weight: of that distance in the loss; 0 measures it alone.
    """

    name: str
    applied: Callable[[], AbstractContextManager]
    weight: float


# Of a noised batch: the loss (B,), numbers to log by name, and the diagnostics of its ratio, if it has one.
Loss = Callable[[NoisedBatch], tuple[Tensor, dict[str, float], dict[str, float] | None]]


def forward_epoch(run, policy: Policy, samples: Samples, forward: ForwardProcess, epoch: int, loss: Loss, anchors: list[Anchor]) -> dict[str, float]:
    """Minimise the mean of `loss` and of the anchors' weighted distances over samples and draws, one optimizer step after the other. Returns what
    to log of the epoch."""
    diagnostics, norms, logged = [], [], defaultdict(list)
    for chunk in run.chunks(len(samples.batches), run.division.batches_a_step):
        found = []
        weight = run.loss_weight(samples, chunk, num_timesteps(run.args))
        for noised_batch in noised_batches(run, policy, samples, forward, epoch, chunk, anchors):
            value, numbers, ratio = loss(noised_batch)
            for anchor in anchors:
                distance = matching_error(noised_batch.output, noised_batch.others[anchor.name])
                value = value + anchor.weight * distance if anchor.weight > 0 else value
                logged[anchor.name].append(distance.mean().item())
            run.accelerator.backward(value.sum() * weight)
            for name, number in numbers.items():
                logged[name].append(number)
            found += [ratio] if ratio else []
        diagnostics += [found] if found else []
        norms.append(run.optimizer_step())
    return run.epoch_metrics(samples, diagnostics, norms, logged)


def noised_batches(
    run, policy: Policy, samples: Samples, forward: ForwardProcess, epoch: int, chunk: range, anchors: list[Anchor] | None = None
) -> Iterator[NoisedBatch]:
    """The batches `chunk`, each as often as it is noised, with the outputs there of the current weights and of the anchors."""

    def predict(x_t: Tensor, t: Tensor, trajectory: Trajectory) -> Tensor:
        with run.accelerator.autocast():
            return policy.predict(x_t, t, trajectory.condition)

    for b in chunk:
        trajectory = samples.batches[b]
        for j, (x_t, t, noise) in enumerate(noised(forward, trajectory, run.args, epoch)):
            output, others = predict(x_t, t, trajectory), {}
            for anchor in anchors or []:
                with torch.no_grad(), anchor.applied():
                    others[anchor.name] = predict(x_t, t, trajectory)
            yield NoisedBatch((b, j), samples.index[b], trajectory.final, x_t, t, noise, output, others)


def num_timesteps(args) -> int:
    """How often `noised` noises each sample."""
    return args.num_train_timesteps or first_share(args.num_inference_steps, args.timestep_fraction)


def noised(forward: ForwardProcess, trajectory: Trajectory, args, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`num_timesteps(args)` times (x_t, t, noise) of the trajectory's final latents, (B, *D), (B,) and (B, *D).

    Draws are keyed by the samples' own seeds: neither the batch nor the number of processes changes them, and a second call
    repeats them.
    """
    seeds = [noise_seed(seed, "forward process") for seed in trajectory.condition.step_seeds or trajectory.condition.seeds]
    time_seed = noise_seed(args.seed, epoch, "timesteps") if args.shared_timesteps else None
    scheme = {"scheme": args.timestep_scheme}
    if args.timestep_scheme == "grid":
        scheme["grid"] = trajectory.timesteps[: first_share(trajectory.num_steps, args.timestep_fraction)]
    return forward.noised(trajectory.final, seeds, num_timesteps(args), time_seed=time_seed, **scheme)
