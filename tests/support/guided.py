"""What tests of guidance share: solvers, a reward with a gradient, noise."""

import diffusers
import torch

SOLVERS = {
    "ddim": ("mini-sd", lambda c: diffusers.DDIMScheduler.from_config(c)),
    "euler": ("mini-sd", lambda c: diffusers.EulerDiscreteScheduler.from_config(c)),
    "heun": ("mini-sd", lambda c: diffusers.HeunDiscreteScheduler.from_config(c)),
    "dpmpp": ("mini-sd", lambda c: diffusers.DPMSolverMultistepScheduler.from_config(c)),
    "flow": ("mini-sd3", lambda c: diffusers.FlowMatchEulerDiscreteScheduler.from_config(c)),
}


def redness(images, prompts, **columns):
    return images[..., 0, :, :].flatten(1).mean(1) - images[..., 1:, :, :].flatten(1).mean(1)


def seeds(*numbers):
    return [torch.Generator().manual_seed(i) for i in numbers]


def without_gradient(images, prompts, **columns):
    return torch.from_numpy(images.detach().numpy()).flatten(1).mean(1)


def rounding(images, prompts, **columns):
    return (images.flatten(1).mean(1) * 255).round()
