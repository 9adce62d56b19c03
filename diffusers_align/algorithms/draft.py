r"""DRaFT: direct reward fine-tuning, the reward's gradient through the sampling chain (https://arxiv.org/abs/2309.17400).

A differentiable reward needs no policy gradient: it is differentiated through the solver. The whole chain (DRaFT) is costly and its
gradient grows with depth; the last K steps (DRaFT-K) suffice, K = 1 is the practical choice. At K = 1 one sample serves several times
(DRaFT-LV): its clean latents are noised anew to the last step's level and denoised again, which averages over noise:

$$ \nabla_\theta J = \mathbb E \sum_{k=T-K}^{T-1} \Big(\frac{\partial x_{k+1}}{\partial v_k}\frac{\partial v_k}{\partial\theta}\Big)^{\!\top} a_{k+1},
\qquad a_T = \nabla_{x_T} r, \quad a_k = \Big(\frac{\partial x_{k+1}}{\partial x_k}\Big)^{\!\top} a_{k+1} $$

$$ \text{LV:}\quad \frac{1}{n+1} \sum_{j=0}^{n} \nabla_\theta\, r(x_0^{(j)}),
\qquad x_0^{(j)} = \hat x_0(\alpha_1\,\mathrm{sg}(x_0) + \sigma_1 \epsilon_j; \theta) $$

DRaFT+ adds a penalty for leaving the pretrained model (`deviation`): the exact KL of Gaussian steps, and the squared difference of the
models' outputs where a step is deterministic. NeMo trains one step, whose state is constant; over several, a state
depends on the steps before, and so does the difference there, by both models.

There is no official code. The paper maximises the reward as it is, without hinge or penalty, with DDIM of 50 steps, eta 0, guidance
7.5 inside the graph, LoRA and checkpointing; it also scales the LoRA at inference, between the two models. It prints no table of
learning rate and batch: the script's defaults are AlignProp's. DRaFT+ (NVIDIA/NeMo-Aligner): K = 1, its output penalty with weight 0.1
to 1.

Logged: `reward` of the finished samples; with `--kl_weight` `kl`, the deviation in nats per dimension or squared units of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rl.matching import matching_error
from ..rl.reward_maps import RewardMap
from ..transition import GaussianTransition

OFFICIAL_MAP = RewardMap("none")


def grad_steps(num_steps: int, truncation: int | None = None) -> list[int]:
    """The last `truncation` solver steps, or all.

    Raises:
        ValueError: a truncation that is no number of steps.
    """
    if truncation is not None and not 1 <= truncation <= num_steps:
        raise ValueError(f"truncation must lie in [1, {num_steps}], got {truncation}.")
    return list(range(num_steps - (truncation or num_steps), num_steps))


def draft_loss(reward: Tensor, reward_map: RewardMap = OFFICIAL_MAP) -> Tensor:
    """The mapped reward, (B,); -reward in the paper."""
    return reward_map(reward)


def renoised(x0: Tensor, noise: Tensor, *, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """DRaFT-LV's start, (B, *D): the sample, without gradient, at the noise level of the last solver step."""
    return alpha * x0.detach() + sigma * noise


def low_variance_loss(rewards: Sequence[Tensor], reward_map: RewardMap = OFFICIAL_MAP) -> Tensor:
    """DRaFT-LV's: the mean of the mapped rewards of a sample's own image and its n renoised ones, each (B,), -> (B,). The paper's n is 2."""
    return torch.stack([draft_loss(reward, reward_map) for reward in rewards]).mean(0)


def deviation(
    output: Tensor, ref_output: Tensor, transition: GaussianTransition | None = None, ref_transition: GaussianTransition | None = None, *, per_dim: int
) -> Tensor:
    """How far one step left the pretrained model's, (B,).

    Args:
        output, ref_output: (B, *D), the models' outputs at the same state: their mean squared difference.
        transition, ref_transition: the step's kernels, where it is stochastic: then their KL divided by `per_dim`.
        per_dim: number of dimensions; 1 for the KL in nats.
    """
    if transition is None or ref_transition is None:
        return matching_error(output, ref_output)
    return transition.kl(ref_transition) / per_dim
