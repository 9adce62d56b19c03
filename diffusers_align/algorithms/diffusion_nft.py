r"""DiffusionNFT: reinforcement on the forward process, with positive and negative samples (https://arxiv.org/abs/2509.16117).

Clean samples of an old policy are noised anew and the model is fine-tuned on them as in pretraining: no SDE, no log-probability,
any sampler. The same network stands for a policy that imitates good samples, v+, and one that imitates bad ones, v-, on either
side of the old one; a sample of optimality probability r trains the first with weight r and the second with 1 - r. The optimum
moves from the old policy in the direction of the good ones:

$$ L = \frac{c}{\beta}\Big[r\, \frac{\|\hat x_0^+ - x_0\|^2}{w^+} + (1 - r)\, \frac{\|\hat x_0^- - x_0\|^2}{w^-}\Big]
+ \beta_{KL} \|v_\theta - v_{ref}\|^2, \qquad r = \tfrac12 + \tfrac12 \mathrm{clip}(A / c, -1, 1) $$

$$ v^+ = \beta v_\theta + (1-\beta) v_{old}, \quad v^- = (1+\beta) v_{old} - \beta v_\theta, \quad w^\pm = \mathrm{mean}|\hat x_0^\pm - x_0| $$

with means over dimensions for the norms, c = 5 and w detached. Without w, the optimum for one sample is v_old + (2r - 1)(v* - v_old) / beta.

Against the official code (NVlabs/DiffusionNFT, 24af555): the loss is the same. It is written through $\hat x_0$, affine in the output
of any model, so that it holds for epsilon and v prediction as for velocities. The old policy is part of checkpoints: the official
resume replaces it by the current one. The paper integrates with a second-order solver; here the scheduler's ODE step is taken.

Logged: `reward`, mean of the epoch's samples, drawn by the old policy; `policy_loss`; `kl`, mean |v - v_ref|^2; `old_deviation`, mean
|v - v_old|^2, 0 where the two are equal; `decay`, of the old policy at the end of the epoch.
"""

from __future__ import annotations

from torch import Tensor

from ..rl.importance import refuse_spread

ADVANTAGE_MODES = ("all", "positive_only", "negative_only", "one_only", "binary")


def optimality(advantage: Tensor, *, adv_clip_max: float = 5.0, mode: str = "all") -> Tensor:
    """The probability r in [0, 1] that a sample is a good one, (B,): 1/2 where the advantage is 0.

    Args:
        adv_clip_max: 5 in the official configs.
        mode: `all`; `positive_only` and `negative_only` drop the other sign; `one_only` keeps of the positive ones, `binary` of
            all, the sign, so that r lies 1 / (2 adv_clip_max) beside 1/2.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ADVANTAGE_MODES:
        raise ValueError(f"Unknown mode {mode!r}; choose one of {', '.join(ADVANTAGE_MODES)}.")
    if mode in ("one_only", "binary"):
        advantage = advantage.sign()
    low = 0.0 if mode in ("positive_only", "one_only") else -adv_clip_max
    high = 0.0 if mode == "negative_only" else adv_clip_max
    return 0.5 + 0.5 * advantage.clamp(low, high) / adv_clip_max


def nft_loss(x0_hat: Tensor, old_x0_hat: Tensor, x0: Tensor, r: Tensor, *, beta: float = 1.0, adv_clip_max: float = 5.0, adaptive: bool = True) -> Tensor:
    """The policy loss at one timestep, (B,), without the KL term.

    Args:
        x0_hat, old_x0_hat: (B, *D), the clean samples that the two policies predict from the same x_t; the second without gradient.
        x0: (B, *D), the sample that was noised.
        r: (B,), `optimality`.
        beta: strength of the guidance, the smaller the stronger: 1, or 0.1 for the official OCR and multi-reward runs.
        adv_clip_max: scale of the loss, that of `optimality`.
        adaptive: divide by the mean absolute error (section 4.4 of the paper); the plain squared error otherwise.

    Raises:
        ValueError: `r` is of other samples.
    """
    positive = beta * x0_hat + (1 - beta) * old_x0_hat
    negative = (1 + beta) * old_x0_hat - beta * x0_hat
    toward, away = _error(positive, x0, adaptive), _error(negative, x0, adaptive)
    refuse_spread(toward, r=r)
    loss = r * toward + (1 - r) * away
    return adv_clip_max / beta * loss


def _error(x0_hat: Tensor, x0: Tensor, adaptive: bool) -> Tensor:
    error = (x0_hat - x0).flatten(1)
    squared = error.square().mean(1)
    if not adaptive:
        return squared
    weight = error.detach().double().abs().mean(1).clamp(min=1e-5)
    return squared / weight.to(squared.dtype)


def old_policy_decay(step: int, schedule: str = "type1") -> float:
    """How much the old policy keeps of itself when it is updated, after `step` optimizer steps.

    Args:
        schedule: `type0`, 0: the old policy is the last epoch's; `type1`, 0.001 a step up to 0.5, the official default;
            `type2`, 0 for 75 steps, then 0.0075 a step up to 0.999.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in ("type0", "type1", "type2"):
        raise ValueError(f"Unknown schedule {schedule!r}; choose type0, type1 or type2.")
    flat, rate, hold = {"type0": (0, 0.0, 0.0), "type1": (0, 0.001, 0.5), "type2": (75, 0.0075, 0.999)}[schedule]
    return min(hold, rate * max(0, step - flat))
