"""A denoiser asked at given times."""

import pytest
import torch
from policies import make

from diffusers_align import Policy
from tests.families.cases import CASES


def test_a_pipeline_that_takes_one_time_a_batch_is_said_once_and_a_broken_device_is_not_taken_for_one(caplog, monkeypatch):
    policy, trajectory, _ = make("sd15_img2img")
    times = trajectory.timesteps[[1, 1, -1, -1]]
    for _ in range(2):
        policy.predict(trajectory.final, times, trajectory.condition)
    assert len(caplog.messages) == 1
    assert "StableDiffusionImg2ImgPipeline takes one time per batch" in caplog.text and "cost one denoiser call a time" in caplog.text
    policy, trajectory, _ = make("sd3")
    with torch.no_grad():
        policy.guidance_off(trajectory.condition)
    together = policy._prediction._together

    def broken(latents, timesteps, condition, overrides):
        if timesteps.ndim:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return together(latents, timesteps, condition, overrides)

    monkeypatch.setattr(policy._prediction, "_together", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        policy.predict(trajectory.final, times, trajectory.condition)


def test_a_batch_that_is_evaluated_at_one_time_is_found_also_where_the_asked_times_are_near_each_other(caplog, monkeypatch):
    """The denoiser here looks at the first sample's time alone, as one with a scalar embedding would."""
    policy, trajectory, _ = make("sd3")
    forward = policy.pipeline.transformer.forward

    def first_time_only(*args, timestep, **kwargs):
        return forward(*args, timestep=timestep[:1].expand(len(timestep)), **kwargs)

    monkeypatch.setattr(policy.pipeline.transformer, "forward", first_time_only)
    times = torch.tensor([500.0, 500.001, 500.002, 500.003])
    with torch.no_grad():
        policy.predict(trajectory.final, times, trajectory.condition)
        apart = torch.tensor([100.0, 400.0, 700.0, 900.0])
        together = policy.predict(trajectory.final, apart, trajectory.condition)
        alone = torch.cat([policy.predict(trajectory.final[[i]], apart[[i]], trajectory.condition.select([i])) for i in range(4)])
    assert "its batch is evaluated at one of them" in caplog.text
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_pipeline_that_tells_its_denoiser_the_schedulers_noise_level_is_evaluated_at_the_time_that_is_given():
    case = CASES["Cosmos2_5_PredictBasePipeline"][0]
    policy, told = Policy(case.build(), **case.call), []
    trajectory = policy.rollout(list(case.prompts), seeds=[1, 2])
    with policy.denoising(lambda forward, *args, **kwargs: told.append(kwargs["timestep"].flatten()) or forward(*args, **kwargs)):
        policy.predict(trajectory.states[:1, 1], trajectory.timesteps[-1:], trajectory.condition.select([0]))
    asked = next(levels for levels in reversed(told) if len(levels))
    torch.testing.assert_close(asked[0], trajectory.sigmas[-1].to(asked), rtol=0, atol=1e-6)
    assert abs(float(trajectory.sigmas[1] - trajectory.sigmas[-1])) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["FluxInpaintPipeline", "ChromaInpaintPipeline"])
def test_packed_latents_are_evaluated_as_given_where_the_pipeline_edits_them_between_steps(name):
    case, seen = CASES[name][0], []
    policy = Policy(case.build(), **case.call)
    condition = policy.condition(list(case.prompts), seeds=[1, 2], per_sample=case.per_sample)
    with policy.noise(condition, False):
        policy.drive(condition, lambda step: seen.append((step.sample.clone(), step.time, step.model_output.clone())))
    state, time, expected = seen[2]
    torch.testing.assert_close(policy.predict(state, torch.full((2,), time), condition, guidance=True), expected, rtol=1e-4, atol=1e-5)
