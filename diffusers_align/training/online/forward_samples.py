"""An epoch's samples noised anew, for methods that train on the forward process."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ...forward_process import ForwardProcess
from ...policy import noise_seed
from ...trajectory import Trajectory


def num_timesteps(args) -> int:
    """How often `noised` noises each sample."""
    return args.num_train_timesteps or _grid_size(args, args.num_inference_steps)


def noised(forward: ForwardProcess, trajectory: Trajectory, args, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`num_timesteps(args)` times (x_t, t, noise) of the trajectory's final latents, (B, *D), (B,) and (B, *D).

    Draws are keyed by the samples' own seeds: neither the batch nor the number of processes changes them, and a second call
    repeats them.
    """
    seeds = [noise_seed(seed, "forward process") for seed in trajectory.condition.step_seeds or trajectory.condition.seeds]
    time_seed = noise_seed(args.seed, epoch, "timesteps") if args.shared_timesteps else None
    scheme = {"scheme": args.timestep_scheme}
    if args.timestep_scheme == "grid":
        scheme["grid"] = trajectory.timesteps[: _grid_size(args, trajectory.num_steps)]
    return forward.noised(trajectory.final, seeds, num_timesteps(args), time_seed=time_seed, **scheme)


def _grid_size(args, steps: int) -> int:
    return max(1, int(steps * args.timestep_fraction))
