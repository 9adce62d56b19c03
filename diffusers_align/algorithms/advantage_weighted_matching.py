r"""AWM: advantage weighted matching (https://arxiv.org/abs/2509.25050).

The evidence lower bound turns the pretraining loss into a log-probability of clean samples, so policy-gradient RL needs no SDE:
samples are noised anew, and the (negative) matching loss stands for log p. Its gradient weighted by the advantage is the
pretraining gradient, towards good samples and away from bad ones, of much less variance than that of a denoising chain:

$$ \ell_\theta = -w(t)\, \tfrac1D \|f_\theta(x_t, t) - y\|^2, \qquad \rho = \exp(\ell_\theta - \ell_{old}) \text{ at the same } (t, \epsilon), $$

$$ L = \mathbb E\big[\max(-A\rho, -A\,\mathrm{clip}(\rho, 1 - c, 1 + c))\big] + \beta \|f_\theta - f_{ref}\|^2 + \beta_{ema} \|f_\theta - f_{ema}\|^2 $$

f is the model's output and y its target (for flow matching the velocity $\epsilon - x_0$), A the advantage clipped to 5 and divided by
it, c = 1, which hardly ever clips. The last term is a trust region around a policy that lags behind. On the first update
after a rollout, rho = 1 and the gradient is that of A l.

Against the official code (scxue/advantage_weighted_matching, be51372): the losses and weightings are the same. It trains flow models; for others f and y
are in the model's own parametrisation (noise for epsilon models, as in their pretraining), and the t of w(t) is
`ForwardProcess.flow_time`. The lagging policy is part of checkpoints.

Logged: `reward`; `log_prob`, mean of l; `kl`, mean |f - f_ref|^2; `ema_kl`, mean |f - f_ema|^2; `clip_fraction` and `approx_kl` of rho in
the last update; `ratio_error`, 0 by construction in the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rl.importance import clipped_surrogate, importance_ratio
from ..rl.matching import matching_error

WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")


def pseudo_log_prob(output: Tensor, target: Tensor, time: Tensor, *, weighting: str = "ghuber", ghuber_power: float = 0.25) -> Tensor:
    r"""-w(t) times the matching error e = mean((output - target)^2), (B,), in float64 as in the official code.

    Args:
        output, target: (B, *D).
        time: (B,) noise level in [0, 1].
        weighting: `uniform`, -e; `t`, -t e; `t2`, -t^2 e; `huber`, -t sqrt(e); `ghuber`, -t e^p / p, both smoothed at e = 0. The official
            configs have `ghuber` with p = 0.25.

    Raises:
        ValueError: an unknown weighting.
    """
    error = matching_error(output.double(), target.double())
    time = time.to(error)
    if weighting == "huber":
        return -time * ((error + 1e-10).sqrt() - 1e-5)
    if weighting == "ghuber":
        return -time * ((error + 1e-10).pow(ghuber_power) - 1e-10**ghuber_power) / ghuber_power
    if weighting not in WEIGHTINGS:
        raise ValueError(f"Unknown weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}.")
    return -error * {"uniform": torch.ones_like(time), "t": time, "t2": time.square()}[weighting]


def unit_advantages(advantage: Tensor, *, adv_clip_max: float = 5.0) -> Tensor:
    """Advantages clipped to +-adv_clip_max and divided by it, so that none is larger than 1, (N,) -> (N,)."""
    return advantage.clamp(-adv_clip_max, adv_clip_max) / adv_clip_max


def awm_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip_range: float = 1.0) -> Tensor:
    """The clipped loss at one timestep, (B,), without the penalties.

    Args:
        log_prob, old_log_prob: (B,) `pseudo_log_prob` at the same noised samples; the second without gradient.
        advantage: (B,), `unit_advantages`.
        clip_range: 1, the official default: only ratios above 2 are clipped.
    """
    return clipped_surrogate(importance_ratio(log_prob, old_log_prob), advantage.to(log_prob), clip_range)


def lagging_decay(step: int, *, maximum: float = 0.3, rate: float = 0.001) -> float:
    """How much the lagging policy keeps of itself when it is updated, after `step` optimizer steps: `rate` a step, up to `maximum`."""
    return min(maximum, rate * step)
