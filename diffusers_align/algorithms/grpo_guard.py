r"""GRPO-Guard: Flow-GRPO with ratios and gradients that are alike at every step (https://arxiv.org/abs/2510.22319).

The mean of a step's log-ratio is not 0 but $-\|\Delta\mu\|^2/(2 s_t^2)$, and its spread goes like $1/s_t$: most ratios lie below 1,
so the clip hardly ever binds on the side that should stop positive advantages, and each step has a trust region of its own.
RatioNorm takes the bias out and the spread away; the gradient, which then goes like the step's length, is divided by it.

$$ L = \frac{1}{-dt}\,\mathbb E\big[\max(-A\rho_t, -A\,\mathrm{clip}(\rho_t, 1-c, 1+c))\big], \qquad
\log\rho_t = s_t\Big(\tfrac1D\log\frac{p_\theta(x_{t-1}|x_t,c)}{p_{old}(x_{t-1}|x_t,c)} + \frac{\|\mu_\theta - \mu_{old}\|^2}{2 D s_t^2}\Big) $$

with $s_t = g\sqrt{-dt}$ the transition's whole std. For $x_{t-1} = \mu_{old} + s_t\epsilon$ this is $\epsilon\cdot\Delta\mu / D$: its mean over the
noise is 0 at every step. The official code is said to be part of yifan123/flow_grpo, but is not in its snapshots at hand (the newest is
ac4c86e); compared was its port in verl-omni, which is equal.

Logged: as for Flow-GRPO; `clip_fraction` and `approx_kl` are of the normalised ratio.
"""

from __future__ import annotations

from torch import Tensor

from ..rl.importance import ClipRange, clipped_surrogate
from .flow_grpo import gaussian_kl


def guard_log_ratio(log_prob: Tensor, old_log_prob: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor, *, per_dim: int) -> Tensor:
    """RatioNorm's log-ratio, (B,).

    Args:
        log_prob, old_log_prob: (B,) nats, summed over dimensions; the second without gradient.
        mean, old_mean: (B, *D), the transitions'; the second without gradient.
        std: (1, ..., 1) or (B, 1, ..., 1): flattened before it meets the (B,) ratios, or each would be scaled by all.
        per_dim: number of dimensions of the action.
    """
    return ((log_prob - old_log_prob) / per_dim + gaussian_kl(mean, old_mean, std)) * std.flatten()


def grpo_guard_loss(log_ratio: Tensor, advantage: Tensor, step_size: float, *, clip_range: ClipRange = 2e-6) -> Tensor:
    """The clipped loss of one solver step of length `step_size` = |sigma_next - sigma|, (B,).

    `clip_range`: 2e-6 for OCR and GenEval, 4e-6 for PickScore.
    """
    return clipped_surrogate(log_ratio.exp(), advantage, clip_range) / step_size
