"""A denoiser asked at given times."""

import pytest
import torch
from policies import make

from diffusers_align import Policy
from tests.families.cases import CASES
from tests.families.parts import quiet


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
def test_an_inpainting_that_puts_back_what_it_keeps_is_asked_at_the_latents_as_given():
    torch.set_num_threads(1)
    case = next(case for case in CASES["StableDiffusionInpaintPipeline"] if case.variant == "blending")
    policy = Policy(quiet(case.build()), **case.call)
    condition = policy.condition(list(case.prompts), seeds=[11, 12], per_sample=case.per_sample)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = policy.pipeline.encode_prompt(list(case.prompts), "cpu", 1, do_classifier_free_guidance=False)[0]
    times = torch.tensor([400.0, 700.0])
    expected = policy.pipeline.unet(latents, times, encoder_hidden_states=embeds).sample
    torch.testing.assert_close(policy.predict(latents, times, condition), expected, rtol=1e-5, atol=1e-5)
    kept = latents.clone()
    kept[0, ..., 4:] += 1  # where the first sample's picture is kept
    assert not torch.allclose(policy.predict(kept, times, condition)[0], expected[0], atol=1e-3)


def test_a_pipeline_that_edits_its_latents_and_takes_none_to_start_from_is_refused():
    case = CASES["StableDiffusionInpaintPipelineLegacy"][0]
    policy = Policy(quiet(case.build()), **case.call)
    condition = policy.condition(list(case.prompts), seeds=[11, 12], per_sample=case.per_sample)
    with pytest.raises(ValueError, match="edits its latents between steps and takes none to start from"):
        policy.predict(torch.randn(2, 4, 8, 8), torch.tensor([400.0, 700.0]), condition)


def test_a_pipeline_that_edits_its_latents_and_fails_with_given_ones_is_refused_in_words():
    case = CASES["QwenImageInpaintPipeline"][0]
    policy = Policy(quiet(case.build()), **case.call)
    condition = policy.condition(list(case.prompts), seeds=[11, 12], per_sample=case.per_sample)
    latents = policy.rollout(condition).final
    with pytest.raises(ValueError, match="QwenImageInpaintPipeline edits its latents between steps, and fails with those that it is given"):
        policy.predict(latents, torch.tensor([400.0, 400.0]), condition)
