"""A denoiser asked at given times."""

import copy

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from policies import make
from tiny_pipelines import FAMILIES

from diffusers_align import Policy


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


class WithSound(StableDiffusion3Pipeline):
    """Denoises a sound beside the picture, with a copy of its scheduler; the denoiser reads it if `heard`."""

    heard = True

    def __call__(self, prompt=None, height=16, width=16, num_inference_steps=4, guidance_scale=3.0, generator=None, output_type="pil", max_sequence_length=32):
        scheduler, sound = copy.deepcopy(self.scheduler), torch.ones(len(prompt), 6)
        scheduler.set_timesteps(num_inference_steps)

        def step(pipeline, k, t, tensors):
            nonlocal sound
            sound = scheduler.step(torch.tanh(sound), scheduler.timesteps[k], sound, return_dict=False)[0]
            return tensors

        def hear(module, args, output):
            return (output[0] + sound.mean(),) if self.heard else None

        handle = self.transformer.register_forward_hook(hear)
        try:
            return super().__call__(
                prompt, height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, generator=generator,
                output_type=output_type, max_sequence_length=max_sequence_length, callback_on_step_end=step,
            )  # fmt: skip
        finally:
            handle.remove()


@pytest.mark.parametrize("guidance", [False, True])
def test_a_part_of_the_sample_that_predict_is_not_given_is_refused_where_the_denoiser_reads_it(guidance):
    policy = Policy(WithSound(**FAMILIES["sd3"].build().components))
    trajectory = policy.rollout(["a", "b"], seeds=[1, 2])
    times = trajectory.timesteps[[1, 2]]
    for _ in range(2):
        with pytest.raises(ValueError, match="WithSound denoises with several schedulers, each of them a part of the sample"), torch.no_grad():
            policy.predict(trajectory.final, times, trajectory.condition, guidance=guidance)
    policy = Policy(WithSound(**FAMILIES["sd3"].build().components))
    policy.pipeline.heard = False
    with torch.no_grad():
        assert policy.predict(trajectory.final, times, trajectory.condition, guidance=guidance).shape == trajectory.final.shape
