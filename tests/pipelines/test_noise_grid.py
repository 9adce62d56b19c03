"""The noise levels of stock solvers."""

import diffusers
import pytest
import torch

from diffusers_align.algorithms.guidance import clean_estimate
from diffusers_align.pipelines.noise_grid import check_scale, noise_grid


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


def test_grids_in_sigma_space_read_outputs_as_the_solver_does():
    """EDM's is v or -v of the data divided by sigma_data; a flow scheduler beyond 1 is handed the noise."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    flow.register_to_config(sigma_min=0.002, sigma_max=80.0)
    edm = [diffusers.EDMEulerScheduler(sigma_data=data, prediction_type=kind) for data, kind in ((1.0, "epsilon"), (0.5, "epsilon"), (0.5, "v_prediction"))]
    x, output = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0))
    for scheduler in (*edm, flow):
        scheduler.set_timesteps(6)
        grid = noise_grid(scheduler, scheduler.timesteps[0])
        for k in (0, 3):
            scheduler._step_index = k
            state = scheduler.sigmas[k] * x
            clean = state - scheduler.sigmas[k] * output if scheduler is flow else scheduler.precondition_outputs(state, output, scheduler.sigmas[k])
            check_scale(grid, k, scheduler, scheduler.timesteps[k])
            found = clean_estimate(grid.sign * output, state / grid.scales[k], grid.levels[k], grid.prediction)
            torch.testing.assert_close(grid.data * found, clean, rtol=1e-4, atol=1e-4)


def test_a_sampler_that_says_nothing_of_its_states_is_refused():
    scheduler = diffusers.LTXEulerAncestralRFScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="nothing says what its states"):
        noise_grid(scheduler, scheduler.timesteps[0])
