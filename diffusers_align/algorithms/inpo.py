r"""InPO: preference optimization at inverted latents (https://arxiv.org/abs/2503.18454).

Diffusion-DPO noises an image at random, so it trains at states that the sampler would hardly take on the way to that image. InPO
inverts the sampler: DDIM steps upwards from the clean image end at a state whose trajectory leads back to it, and the noise that
would have made this state from the image is the model's target there. The rest is Diffusion-DPO:

$$ x_{s'} = \alpha_{s'} \hat x_0(x_s) + \sigma_{s'} \hat\epsilon(x_s), \quad 0 = s_0 < \dots < s_K = t, \qquad
\epsilon = \frac{x_t - \alpha_t x_0}{\sigma_t}, \qquad L = -\mathbb E[\log\sigma(z)] \text{ at } (x_t, \epsilon) $$

Winner and loser are inverted each by itself, with the model as it is and without gradient. beta is 2000 from a fine-tuned model, 5000
for SDXL, for 400 updates; each costs K more forward passes.

Against the official code (JaydenLyh/InPO, a9cfc4d): it inverts along a grid of ten timesteps and calls the first one above t t, for the whole
batch by its first sample's t. Here each sample has its own t, and its K steps end on it.

Logged: as for Diffusion-DPO.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def inverted_noise(x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise (B, *D) that makes `x_t` of `x0`, both (B, *D), at per-sample levels `alpha`, `sigma` (B,)."""
    alpha, sigma = (_column(level, x_t) for level in (alpha, sigma))
    return (x_t - alpha * x0) / sigma


def inversion_times(t: Tensor, *, num_steps: int = 10, clean: float = 0) -> Tensor:
    """(K + 1, B): times in equal steps from `clean`, the noiseless end, to each sample's `t` (B,); whole numbers where `t` is.

    `num_steps`: K, 10 in the official code (of the whole range).
    """
    share = torch.arange(num_steps + 1, dtype=torch.float64, device=t.device)[:, None] / num_steps
    times = clean + share * (t.double() - clean)
    return (times if t.is_floating_point() else times.round()).to(t.dtype)


@torch.no_grad()
def invert(
    x0: Tensor,
    times: Tensor,
    denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    levels: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    eta: float = 0.1,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    r"""x_t (B, *D) at the last of the `times`, by DDIM steps upwards from `x0` (B, *D).

    Args:
        times: (K + 1, B), `inversion_times`.
        denoise: (x, t) to the clean sample and the noise that the model's output implies, (B, *D) each.
        levels: t to (alpha, sigma), (B,) each.
        eta: noise added after each step, as a share of the std by which an ancestral step back would draw,
            $\sigma_s \sqrt{1 - (\alpha_{s'} \sigma_s / \alpha_s \sigma_{s'})^2}$; 0.1 in the official code, 0 is the inverse of DDIM.
        generator: of that noise; a list with one a sample makes it depend on neither the batch nor the number of processes.
    """
    x = x0
    for before, after in zip(times, times[1:]):
        (alpha, sigma), (next_alpha, next_sigma) = ([_column(level, x0) for level in levels(time)] for time in (before, after))
        clean, noise = denoise(x, before)
        x = next_alpha * clean + next_sigma * noise
        if eta > 0:
            std = sigma * (1 - (next_alpha * sigma / (alpha * next_sigma)).square()).clamp(min=0).sqrt()
            # A step of no length (t near 0, whole timesteps) draws nothing: 0/0 where both levels are noiseless.
            x = x + eta * std.nan_to_num(0.0) * _noise(x, generator)
    return x


def _noise(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    if isinstance(generator, list):
        return torch.cat([_noise(row[None], own) for row, own in zip(x, generator, strict=True)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def _column(level: Tensor, like: Tensor) -> Tensor:
    """(B,) to (B, 1, ..., 1)."""
    return level.to(like).reshape(-1, *[1] * (like.ndim - 1))
