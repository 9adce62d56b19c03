r"""SRPO: direct alignment at any noise level and semantic relative preference (https://arxiv.org/abs/2509.06942).

A sample is noised with known noise to any level. One model step is taken from there and the known noise is taken out again:
the clean sample comes back exactly but for the model's error of that one step, so that even early steps can be scored without the
blur of a one-step prediction (direct align). The reward is relative: the image's agreement with the prompt under wanted words minus
that under unwanted ones, which removes what the reward model prefers regardless of the words (semantic relative preference):

$$ \hat x_0 = \frac{x_\sigma + (\sigma' - \sigma) v_\theta(x_\sigma) - \sigma' \epsilon}{1 - \sigma'}
= x_0 + \frac{\sigma' - \sigma}{1 - \sigma'} \big(v_\theta(x_\sigma) - (\epsilon - x_0)\big), \qquad x_\sigma = (1-\sigma) x_0 + \sigma\epsilon $$

$$ r = f(\hat x_0)^{\top}\big((1 + d)\, g(c^+) - g(c^-)\big), \qquad L = \max(0, m - r) $$

Two branches: denoising (sigma' < sigma) is rewarded; inversion (sigma' > sigma), whose reconstruction moves against the model's change,
is scored with the words exchanged, as a penalty. Both need the hinge: the gradient is that of one step's reconstruction, which does
not vanish where the finished samples are good.

Against the official code (Tencent-Hunyuan/SRPO, fastvideo/SRPO.py at 81e5898): recovered sample, relative reward, hinge and discounts are the
same; the velocity is `ForwardProcess.to_velocity` at `flow_time`, so they hold for any model, not for flow matching alone. Two things differ:

* The length of the step. There it is `groundtruth_ratio` 0.9 on a grid of 100 levels, that is 11 of them; here it leads to the neighbouring level
  of the sampling schedule.
* The levels. There sigma lies in 0.75 to 0.97 (entries 5 to 25 of a schedule of 50 steps with shift 3); here it is any level of the sampling
  schedule from which something can be recovered, and the discounts span them all.

Official: FLUX.1-dev, all parameters, 25 steps, shift 3, learning rate 5e-6, clip 0.1, margin 0.7.

Logged: `reward`, relative, of the denoising branch; `penalty`, of the inversion branch; `hinge_inactive`, the share beyond the margin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rl.reward_maps import RewardMap

OFFICIAL_MAP = RewardMap("hinge", target=0.7)


def recovered_sample(x0: Tensor, noise: Tensor, velocity: Tensor, *, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """The clean sample (B, *D) after one model step from `sigma` to `sigma_next`, the known noise taken out.

    Args:
        x0, noise: (B, *D), without gradient.
        velocity: (B, *D), the model's noise - x0 at (1 - sigma) x0 + sigma noise, with gradient.
        sigma, sigma_next: noise levels in [0, 1), broadcastable; falling to denoise, rising to invert.

    Raises:
        ValueError: a sigma_next of 1, where nothing of the sample is left.
    """
    if bool(torch.as_tensor(sigma_next >= 1).any()):
        raise ValueError("sigma_next must lie below 1: pure noise holds nothing to recover. Leave the first step out.")
    return x0 + (sigma_next - sigma) / (1 - sigma_next) * (velocity - (noise - x0))


def discounts(num_levels: int, *, inversion: bool = False) -> Tensor:
    """The control words' extra weight d at each noise level, the noisiest first, (num_levels,).

    Towards pure noise it rises from 0.1 to 0.25, and for the inversion falls from 0.3 to 0.01: the official code's lists run from the
    cleanest level to the noisiest.
    """
    first, last = (0.01, 0.3) if inversion else (0.25, 0.1)
    return torch.linspace(first, last, num_levels)


def semantic_relative_preference(wanted: Tensor, unwanted: Tensor, discount: float) -> Tensor:
    """(1 + discount) wanted - unwanted, (B,).

    Args:
        wanted, unwanted: (B,), the image's rewards under the prompt with the control words and under the one to move away from: for a
            cosine of embeddings f(x) . g(c), the paper's f(x) . ((1 + d) g(c+) - g(c-)).
    """
    return (1 + discount) * wanted - unwanted


def srpo_loss(reward: Tensor, penalty: Tensor, reward_map: RewardMap = OFFICIAL_MAP) -> Tensor:
    """max(0, m - reward) + max(0, m - penalty), (B,).

    Args:
        reward, penalty: (B,), relative, of the denoising branch, and with the words exchanged of the inversion branch.
    """
    return reward_map(reward) + reward_map(penalty)
