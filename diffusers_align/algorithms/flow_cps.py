r"""Flow-CPS: coefficients-preserving sampling with Flow-GRPO's loss (https://arxiv.org/abs/2509.05952).

Euler-Maruyama leaves more noise in a state than its noise level says, so that rollouts look noisy to the reward. CPS takes the
noise that it adds out of the predicted noise (the scheduler's `sde_type="cps"`), so rollouts are clean, at the price of
marginals that shrink as steps grow many: train with few, evaluate along the ODE. The objective is Flow-GRPO's,

$$ L = \mathbb E\big[\max(-A\rho_t, -A\,\mathrm{clip}(\rho_t, 1-c, 1+c))\big], \qquad
\rho_t = \exp\Big(2 s_t^2 \cdot \tfrac1D\log\frac{p_\theta(x_{t-1}|x_t,c)}{p_{old}(x_{t-1}|x_t,c)}\Big) $$

with the ratio of the official code (IamCreateAI/FlowCPS, b402c7a), whose "log-probability" is
$-\mathrm{mean}(x_{t-1} - \mu)^2$: the density's without its constants and without $1/(2 s_t^2)$, hence the factor. Its gradient
grows with the std, so early steps dominate. With the true density the last steps, whose std goes to 0, would: a velocity's
weight there is some thirty times an early step's on ten steps. Our transitions keep the true density; the factor belongs to the loss.

The penalty that holds the policy near the pretrained model is, there, the mean squared difference of the means, undivided
(`kl_form="mean_squared"` of `flow_grpo.kl_penalty`, the script's default with CPS). It is $2 s_t^2$ times the Gaussian KL, small where
$s_t$ is. Flow-GRPO's form would, on ten steps of shift 3 and noise level 0.8, weigh the first step 0.024 times as much and the last noisy
one 1870 times. Its configurations differ: `pickscore_sd3` has noise level 0.7, clip 1e-4, a penalty of 0.01 and trains every step;
`pickscore_sd3_fast` has 0.8, 1e-5, none, and two steps.

Logged: as for Flow-GRPO; `clip_fraction` and `approx_kl` are of the scaled ratio.
"""

from __future__ import annotations

from torch import Tensor

from ..rl.importance import ClipRange, clipped_surrogate


def cps_log_ratio(log_prob: Tensor, old_log_prob: Tensor, std: Tensor, *, per_dim: int) -> Tensor:
    """The official log-ratio, (B,): 2 std^2 times the density's per dimension.

    Args:
        log_prob, old_log_prob: (B,) nats, summed over dimensions; the second without gradient.
        std: (1, ..., 1) or (B, 1, ..., 1), the kernel's.
        per_dim: number of dimensions of the action.
    """
    return 2 * std.flatten().square() * (log_prob - old_log_prob) / per_dim


def flow_cps_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, std: Tensor, *, per_dim: int, clip_range: ClipRange = 1e-5) -> Tensor:
    """The clipped loss of one solver step on the official scale, (B,). `clip_range`: 1e-5 in the official `pickscore_sd3_fast`,
    1e-4 in `pickscore_sd3`."""
    return clipped_surrogate(cps_log_ratio(log_prob, old_log_prob, std, per_dim=per_dim).exp(), advantage, clip_range)
