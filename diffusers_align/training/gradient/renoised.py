"""DRaFT's relatives (`train_draft.py` alone has them): finished samples noised anew, the images that one more call of the model makes of them,
and their rewards under two texts. DRaFT-LV's and SRPO's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ...algorithms.draft import renoised
from ...algorithms.srpo import recovered_sample, semantic_relative_preference
from ...forward_process import ForwardProcess
from ...gradients.decoding import decode_latents
from ...gradients.recompute import recomputed
from ...gradients.rollout import DifferentiableRollout
from ...policy import Policy, noise_seed


def drawn_noise(rollout: DifferentiableRollout, name: str) -> Tensor:
    """Standard normal (B, *D), of each sample's own seed."""
    shape, device = rollout.latents.shape[1:], rollout.latents.device
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(noise_seed(seed, name))) for seed in rollout.condition.seeds]).to(device)


def noising_times(policy: Policy, rollout: DifferentiableRollout) -> Tensor:
    """The roll-out's timesteps (S,) as levels that samples can be noised to: the nearest rows of a noise table, between which some solvers
    go, and each once, where a solver of second order comes by twice."""
    times = torch.tensor(rollout.timesteps)
    return (times.round() if ForwardProcess(policy.scheduler).whole_timesteps else times).unique_consecutive()


def renoised_images(
    policy: Policy, rollout: DifferentiableRollout, number: int, *, checkpoint: bool | None = None, decode_checkpoint: bool = True
) -> Iterator[Tensor]:
    """`number` times the images of the samples noised to the last solver step's level and denoised again (DRaFT-LV).

    Args:
        checkpoint, decode_checkpoint: compute the denoiser's (of None, too) and the autoencoder's activations again on the way back.
    """
    forward, t = ForwardProcess(policy.scheduler), noising_times(policy, rollout)[-1:].expand(len(rollout.latents)).to(rollout.latents.device)
    alpha, sigma = (level(t).reshape(-1, *[1] * (rollout.latents.ndim - 1)) for level in (forward.alpha, forward.sigma))
    for j in range(number):
        x = renoised(rollout.latents, drawn_noise(rollout, f"renoised {j}"), alpha=alpha, sigma=sigma).to(rollout.latents.dtype)
        clean = forward.to_x0(_predicted(policy, x, t, rollout, checkpoint), x, t)
        yield decode_latents(policy, clean.to(x.dtype), rollout.condition, checkpoint=decode_checkpoint).float()


def alignable_steps(policy: Policy, rollout: DifferentiableRollout) -> list[int]:
    """The positions among `noising_times` between whose noise level and each neighbour's a sample can be recovered.

    Raises:
        ValueError: there is none.
    """
    levels = ForwardProcess(policy.scheduler).flow_time(noising_times(policy, rollout)).tolist()
    if not (steps := [k for k in range(1, len(levels)) if levels[k - 1] < 1]):
        raise ValueError("SRPO needs a step that follows one below pure noise: raise --num_inference_steps to 3 or more.")
    return steps


def aligned_images(
    policy: Policy, rollout: DifferentiableRollout, k: int, *, checkpoint: bool | None = None, decode_checkpoint: bool = True
) -> tuple[Tensor, Tensor]:
    """The samples noised to the k-th of `noising_times`, and what one model call makes of them (SRPO): a step denoised, and a step inverted.

    Args:
        checkpoint, decode_checkpoint: compute the denoiser's (of None, too) and the autoencoder's activations again on the way back.
    """
    forward, x0, noise = ForwardProcess(policy.scheduler), rollout.latents.detach(), drawn_noise(rollout, "aligned")
    times = noising_times(policy, rollout)
    levels = [*forward.flow_time(times).tolist(), 0.0]
    t = times[k].expand(len(x0)).to(x0.device)
    x = forward.add_noise(x0, noise, t)
    velocity = forward.to_velocity(_predicted(policy, x, t, rollout, checkpoint), x, t)
    recovered = (recovered_sample(x0, noise, velocity, sigma=levels[k], sigma_next=levels[after]) for after in (k + 1, k - 1))
    denoised, inverted = (decode_latents(policy, clean.to(x0.dtype), rollout.condition, checkpoint=decode_checkpoint).float() for clean in recovered)
    return denoised, inverted


def relative_rewards(run, batch, images: Tensor, words: tuple[str, str], discount: float) -> Tensor:
    """SRPO's relative rewards (B,): the images' with the first of `words` before the prompts, against those with the second."""
    asked = ([replace(prompt, text=f"{word} {prompt.text}".strip()) for prompt in batch.asked] for word in words)
    wanted, unwanted = (replace(batch.reward, asked=prompts)(images) for prompts in asked)
    if torch.equal(wanted, unwanted):
        run.explain_once(
            f"SRPO: the reward is the same under {words[0]!r} and {words[1]!r}, so it reads no such words in a prompt, and all that is left of the relative "
            f"reward is {discount:.2g} times the reward. Take one that compares images with texts, such as clip_score, hps_v2 or pick_score."
        )
    return semantic_relative_preference(wanted, unwanted, discount)


def _predicted(policy: Policy, x: Tensor, t: Tensor, rollout: DifferentiableRollout, checkpoint: bool | None) -> Tensor:
    """The model's output at x (B, *D), guidance included."""
    with nullcontext() if checkpoint is False else policy.denoising(recomputed):
        return policy.predict(x, t, rollout.condition, guidance=True)
