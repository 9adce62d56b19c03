"""Pipelines that step other schedulers than their own, or have none of that name."""

import copy

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class HalvesApart(StableDiffusionPipeline):
    """Each half of the picture walks a copy of the scheduler, as the frames of a video do in diffusion forcing; the scheduler itself takes no step."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        prompt = [prompt] if isinstance(prompt, str) else prompt
        text = self.encode_prompt(prompt, self.device, 1, False)[0]
        latents = randn_tensor((len(prompt), 4, 8, 8), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        copies = [copy.deepcopy(self.scheduler) for _ in range(2)]
        for scheduler in copies:
            scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t, encoder_hidden_states=text).sample
            halves = zip(copies, output.chunk(2, 2), latents.chunk(2, 2))
            latents = torch.cat([scheduler.step(out, t, half, return_dict=False)[0] for scheduler, out, half in halves], 2)
        return ImagePipelineOutput(latents if output_type == "latent" else self.vae.decode(latents, return_dict=False)[0].sigmoid())


class CountsItsSteps(StableDiffusionPipeline):
    """Looks the noise level up by the number of its step, as pipelines in EDM's coordinates do."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        prompt = [prompt] if isinstance(prompt, str) else prompt
        text = self.encode_prompt(prompt, self.device, 1, False)[0]
        latents = self.prepare_latents(len(prompt), 4, 16, 16, text.dtype, self.device, generator)
        self.scheduler.set_timesteps(num_inference_steps)
        levels = torch.linspace(1, 0, num_inference_steps + 1)
        for i, t in enumerate(self.scheduler.timesteps):
            output = self.unet(latents, t, encoder_hidden_states=text).sample + 0 * levels[i]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return ImagePipelineOutput(latents if output_type == "latent" else self.vae.decode(latents, return_dict=False)[0].sigmoid())


class NoScheduler(DiffusionPipeline):
    """Takes no steps, as an upsampler of latents."""

    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet)

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        raise AssertionError("The call must not begin.")


class SchedulersOfParts(NoScheduler):
    """A prior and a decoder, each with a scheduler."""

    def __init__(self, unet, prior_scheduler, decoder_scheduler):
        super().__init__(unet)
        self.register_modules(prior_scheduler=prior_scheduler, decoder_scheduler=decoder_scheduler)
