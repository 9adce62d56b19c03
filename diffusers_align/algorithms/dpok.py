r"""DPOK: policy optimisation with KL regularisation (https://arxiv.org/abs/2305.16381).

The denoising chain is a policy that is paid for its last image. A learned value of the half-drawn sample is subtracted from the
reward at each step, which leaves the gradient unbiased and less noisy (`diffusers_align.rl.values`). The KL divergence from the pretrained
chain is bounded by the sum of its steps' and enters the loss, so that it is differentiated rather than added to the reward:

$$ L = \mathbb E\Big[\alpha \max\big(-A_t\rho_t, -A_t\,\mathrm{clip}(\rho_t, 1-c, 1+c)\big) + \beta\, D_{KL}(\pi_\theta \| \pi_{pre})\Big], \qquad
A_t = r(x_0, c) - V(x_t, c, t) $$

Against the official code (google-research/google-research, dpok/train_online_pg.py, 1d49f2c):

* It clamps the ratio without PPO's minimum (`clip_mode="clamp"`), so that a sample whose ratio has left the range on either side
  has no gradient, even where the policy has moved the wrong way. Ours is PPO's, which lets such a sample return.
* Its log-probabilities are fp16, whose numbers lie 1e-3 apart where the clip range is 1e-4: rounding alone clips. Ours are float32.
* Its KL is the mean squared difference of the model's guided outputs: `output_mse`, the script's "official" form. The paper's bound is
  $\|\mu_\theta - \mu_{pre}\|^2 / (2\,\mathrm{std}^2)$, the "paper" form: `GaussianTransition.kl`, here over D, like the log-probability.
* It fits the value before it takes the advantages. Then a sample's baseline knows the sample's own reward, which biases the
  gradient; ours takes the advantages first.
* It updates five times on random transitions of the replay buffer, up to 1000 old; ours on this epoch's, in batches, so that the ratio
  starts at 1. The buffer serves the value alone.
* Without a value network it uses the bare reward; ours is the reward normalised over the batch (`--advantage batch`).

Generalised advantages (`--advantage gae`, not of the paper): the value of later states stands in for a part of the reward, of the advantage and of the value's
own targets, which are TD($\lambda$)'s (`rl.values`): less variance, and the values' errors as a bias. $\lambda = 1$ is the paper's.

Logged: `reward`, mean of the epoch's samples, unfiltered; `explained_variance` of their rewards by the value network before it sees
them, 0 where it is no better than a constant; `value_error`, its mean squared error on the buffer; `kl` in the chosen form;
`ratio_error`, |ratio - 1| before the epoch's first update, 0 if the replay is the rollout; `clip_fraction` and `approx_kl` of the
last update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..rl.importance import clamped_surrogate, clipped_surrogate, importance_ratio, refuse_spread

SURROGATES = {"ppo": clipped_surrogate, "clamp": clamped_surrogate}


def dpok_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    kl: Tensor | float = 0.0,
    *,
    per_dim: int,
    clip_range: float = 1e-4,
    clip_mode: str = "ppo",
    reward_weight: float = 10.0,
    kl_weight: float = 0.01,
) -> Tensor:
    """The regularised loss of one denoising step, (B,).

    Args:
        log_prob, old_log_prob: (B,) nats, summed over dimensions; the second without gradient.
        advantage: (B,), without gradient.
        kl: (B,), the divergence from the pretrained step, with gradient.
        per_dim: number of dimensions of the action; 1 for the true ratio.
        clip_range: 1e-4, the official default.
        clip_mode: "ppo", or "clamp" as in the official code.
        reward_weight, kl_weight: the paper's alpha and beta, at the official values for a single prompt (1000 and 0.1 for many).

    Raises:
        ValueError: they are of other samples.
    """
    ratio = importance_ratio(log_prob, old_log_prob, per_dim)
    refuse_spread(ratio, kl=kl)
    return reward_weight * SURROGATES[clip_mode](ratio, advantage, clip_range) + kl_weight * kl


def output_weight(mean: Callable[[Tensor], Tensor], ndim: int) -> float:
    r"""How far a step's mean moves with the model's output, $J = \partial\mu / \partial\epsilon_\theta$: the same for each dimension.

    Args:
        mean: the kernel's mean (1, ..., 1) at the state 0 for the model output (1, ..., 1).
        ndim: number of dimensions of a batch of latents.

    Raises:
        ValueError: the mean is not affine in the output.
    """
    # A kernel that clips the clean sample is caught at the noisy steps, where it follows from the output by a large factor.
    at_zero, at_one, at_eight = (float(mean(torch.full([1] * ndim, value))) for value in (0.0, 1.0, 8.0))
    weight = at_one - at_zero
    if abs((at_eight - at_zero) - 8 * weight) > 1e-3 * abs(8 * weight):
        raise ValueError(
            "This scheduler's step is not affine in the model's output (it clips), so the difference of two outputs cannot be "
            "told from that of the means. Use the paper's KL (--kl_form paper), or set clip_sample=False in the scheduler's config."
        )
    return weight


def output_mse(mean: Tensor, ref_mean: Tensor, weight: float) -> Tensor:
    r"""The official code's KL, (B,): $\mathrm{mean}((\epsilon_\theta - \epsilon_{pre})^2)$ of what the scheduler got, guidance included,
    from the means (B, *D) and their `output_weight`."""
    return ((mean - ref_mean) / weight).square().flatten(1).mean(1)


def describe_kl(kl_weight: float, scales: list[float]) -> str:
    r"""What the weight of the official KL is in the paper's form. `scales` are the steps' $J^2 / (2\,\mathrm{std}^2)$, paper's over official form."""
    scale = sum(scales) / len(scales)
    return f"kl_weight {kl_weight:g} on the official KL weighs like {kl_weight / scale:.3g} on the paper's at the mean step's ratio of {scale:.3g}"
