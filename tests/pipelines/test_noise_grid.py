"""The noise levels of stock solvers."""

import diffusers
import pytest

from diffusers_align.pipelines.noise_grid import noise_grid


def test_grids_hold_each_solvers_levels():
    for scheduler in (
        diffusers.DDIMScheduler(),
        diffusers.EulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.HeunDiscreteScheduler(),
    ):
        scheduler.set_timesteps(10)
        grid = noise_grid(scheduler, scheduler.timesteps[0])
        assert len(grid) == len(scheduler.timesteps) and grid.levels[-1].sigma == pytest.approx(0, abs=1e-6)
        for t, (alpha, sigma), scale in zip(scheduler.timesteps, grid.levels, grid.scales):
            assert alpha**2 + sigma**2 == pytest.approx(1)
            if float(t) == int(t):
                assert alpha == pytest.approx(float(scheduler.alphas_cumprod[int(t)]) ** 0.5, rel=1e-3)
            assert scale == pytest.approx(1 / alpha if hasattr(scheduler, "is_scale_input_called") or "Heun" in type(scheduler).__name__ else 1)
