r"""Flow-GRPO: online RL for flow matching (https://arxiv.org/abs/2505.05470).

The probability-flow ODE becomes an SDE with the same marginals, so that sampling explores and has log-probabilities. Each
prompt is sampled G times; a sample's advantage is how far its reward lies above its group's mean. The loss is PPO's, with a
penalty that holds the policy near the pretrained model:

$$ L = \mathbb E\Big[\max(-A\rho_t, -A\,\mathrm{clip}(\rho_t, 1-c, 1+c)) + \beta\, D_{KL}(\pi_\theta \| \pi_{ref})\Big] $$

Against the official code (yifan123/flow_grpo, ac4c86e): the loss is the same. Its KL divides by the squared diffusion
coefficient without the step's length, so it is the Gaussian KL times -dt; the maintainers call that deliberate, and the
paper's betas go with it. `official_kl` is that one and the script's default, `gaussian_kl` the exact one. Samples whose
advantage is 0 stay in the batch, so the loss's denominator is constant.

Fast (SDE window): the same loss on the few steps of the scheduler's `sde_window`; the others are ODE steps.

Logged: `reward`, `reward_std` within groups, `zero_std` the fraction of groups without any signal; `ratio_error`, |ratio - 1|
before the epoch's first update; `kl`, in the chosen form; `clip_fraction`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..rl.importance import ClipRange, clipped_surrogate, importance_ratio

KL_FORMS = ("official", "gaussian", "mean_squared")


def flow_grpo_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, per_dim: int, clip_range: ClipRange = 1e-4) -> Tensor:
    """The clipped loss of one solver step, (B,).

    Args:
        log_prob, old_log_prob: (B,) nats, summed over dimensions; the second without gradient.
        advantage: (B,), without gradient.
        per_dim: number of dimensions of the action; 1 for the true ratio.
        clip_range: 1e-4 in the official configs (1e-5 for Fast, which trains few steps); a pair is one below and one above 1
            (DAPO's higher clip, https://arxiv.org/abs/2503.14476, section 3.1).
    """
    return clipped_surrogate(importance_ratio(log_prob, old_log_prob, per_dim), advantage, clip_range)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor) -> Tensor:
    """Exact KL of two kernels of equal std, in nats per dimension, (B,): mean((mu - mu_ref)^2) / (2 std^2). Where std is 0 nothing is drawn: 0."""
    return ((mean - ref_mean).square() / (2 * std.where(std > 0, math.inf).square())).flatten(1).mean(1)


def official_kl(mean: Tensor, ref_mean: Tensor, std: Tensor, step_size: float) -> Tensor:
    """The official code's KL, (B,): `gaussian_kl` times the step's length |sigma_next - sigma|."""
    if math.isnan(step_size):
        raise ValueError("The official penalty goes by the lengths of flow matching's steps, and this sampler has none: take --kl_form gaussian.")
    return step_size * gaussian_kl(mean, ref_mean, std)


def mean_squared_difference(mean: Tensor, ref_mean: Tensor) -> Tensor:
    """mean((mu - mu_ref)^2), (B,): Flow-CPS's penalty, `gaussian_kl` times 2 std^2."""
    return (mean - ref_mean).square().flatten(1).mean(1)


def kl_penalty(mean: Tensor, ref_mean: Tensor, std: Tensor, step_size: float, *, form: str = "official") -> Tensor:
    """The penalty of one solver step in one of `KL_FORMS`, (B,).

    Raises:
        ValueError: an unknown form.
    """
    if form not in KL_FORMS:
        raise ValueError(f"Unknown form {form!r} of the KL; choose one of {', '.join(KL_FORMS)}.")
    return {
        "official": lambda: official_kl(mean, ref_mean, std, step_size),
        "gaussian": lambda: gaussian_kl(mean, ref_mean, std),
        "mean_squared": lambda: mean_squared_difference(mean, ref_mean),
    }[form]()


def describe_kl(beta: float, form: str, step_sizes: list[float]) -> str:
    """The same penalty in the other form's beta, for the mean of the steps' lengths; what it is for `mean_squared` and for
    diffusion, whose steps have lengths of NaN."""
    if form == "mean_squared":
        return f"kl_weight {beta:g} weighs the squared difference of the steps' means, 2 std^2 of the Gaussian KL: steps of little noise count little"
    length = sum(step_sizes) / len(step_sizes)
    if length != length:  # diffusion, whose steps have no length
        return f"kl_weight {beta:g} weighs the exact Gaussian KL of each step, in nats per dimension"
    other, equivalent = ("gaussian", beta * length) if form == "official" else ("official", beta / length)
    return f"kl_weight {beta:g} on the {form} KL weighs like {equivalent:.3g} on the {other} one at the mean step of {length:.3g}"
