r"""Diffusion-DPO: learning from pairs without a reward model (https://arxiv.org/abs/2311.12908).

Of two images of a prompt one is preferred. Both are noised with the same noise and timestep; the loss asks that the model, more
than the pretrained one, denoise the winner better than the loser. It is DPO's logistic loss with the denoising error in the place
of the log-probability, by a bound:

$$ L = -\mathbb E\big[\log\sigma(z)\big], \qquad z = -\tfrac\beta2\big[(L_w - L_w^{ref}) - (L_l - L_l^{ref})\big], \qquad
L = \tfrac1D\|f_\theta(x_t, t) - y\|^2 $$

with f the model's output and y its target. At the reference the loss is log 2 and its gradient (beta/4) grad(L_w - L_l): beta is then a scale
that Adam takes out again. What beta decides is where the weight 1 - sigma(z) fades, at error gaps of about 4 / beta, so how far
the model goes.

Against the official code (SalesforceAIResearch/DiffusionDPO, 5233e75): the loss is the same; beta 5000 there, 2000 (SD 1.5) and 5000 (SDXL) in
the paper, 100 to 2000 for flow matching. Errors are in the model's own parametrisation, with a constant beta. The bound's
beta(t) = beta (1 - t)^2 for flows does worse (https://arxiv.org/abs/2501.13918): `beta` may be (B,) to have it. Not even in one
dimension is the optimum of a constant beta the tilted p_ref exp(r / beta): it moves steps of little noise further.

Logged: `accuracy`, the share of pairs with z > 0 (ties half), 0.5 at first; `margin`, mean z; `error_w`, `error_l`; `error_w_change`,
`error_l_change` against the reference, of which both rise when the loser is pushed away at the winner's cost (`diffusion_sdpo`, or
`sft_weight`, help); `gradient_weight`, mean 1 - sigma(z), 0.5 at first; `logistic`, mean -log sigma(z) whatever else the loss adds, log 2 at
first: what stays above that is noise of too large a beta or too large steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rl.matching import check_errors
from ..rl.pair_losses import pair_loss


def preference_logit(error_w: Tensor, error_l: Tensor, ref_error_w: Tensor, ref_error_l: Tensor, *, beta: float | Tensor) -> Tensor:
    """z, (B,): how much more than the reference the model prefers the winner.

    Args:
        error_w, error_l: (B,) mean squared errors of winner and loser at the same noise and timestep.
        ref_error_w, ref_error_l: (B,), the reference's, without gradient.
        beta: a number or (B,); on the mean over dimensions, with the factor 1/2.

    Raises:
        TypeError: errors in half precision.
        ValueError: errors that are not one a sample, of the same samples.
    """
    check_errors(error_w, error_l, ref_error_w, ref_error_l)
    return -0.5 * beta * ((error_w - ref_error_w) - (error_l - ref_error_l))


def diffusion_dpo_loss(
    error_w: Tensor,
    error_l: Tensor,
    ref_error_w: Tensor,
    ref_error_l: Tensor,
    *,
    beta: float | Tensor,
    label: Tensor | float | None = None,
    sft_weight: float = 0.0,
    **options: Any,
) -> Tensor:
    """The loss of each pair, (B,).

    Args:
        error_w, error_l, ref_error_w, ref_error_l, beta: as for `preference_logit`.
        label: as for `pair_loss`.
        sft_weight: adds this times the winner's error, fine-tuning on winners; 0 as in the paper. With a label p, p L_w + (1 - p) L_l.
        options: `kind`, `label_smoothing`, `ipo_tau`, `dmpo_alpha` of `pair_loss`. The official code's is `sigmoid` with certain labels.

    Raises:
        TypeError: errors in half precision.
        ValueError: an unknown kind, or a label that is no probability.
    """
    logit = preference_logit(error_w, error_l, ref_error_w, ref_error_l, beta=beta)
    loss = pair_loss(logit, label=label, **options)
    if sft_weight == 0:
        return loss
    p = 1.0 if label is None else label
    return loss + sft_weight * (p * error_w + (1 - p) * error_l)


@torch.no_grad()
def preference_metrics(
    error_w: Tensor, error_l: Tensor, ref_error_w: Tensor, ref_error_l: Tensor, *, beta: float | Tensor, label: Tensor | None = None
) -> dict[str, float]:
    """The logged numbers of the page above, over the pairs (B,).

    Args:
        label: (B,), as for the loss. A pair at 1/2 has no winner, so accuracy and margin leave it out; without other pairs there are none.
    """
    logit = preference_logit(error_w, error_l, ref_error_w, ref_error_l, beta=beta).double()
    decided = logit if label is None else logit[label != 0.5]
    judged = {}
    if len(decided):
        judged = {"accuracy": (0.5 * (decided.sign() + 1)).mean(), "margin": decided.mean(), "logistic": F.softplus(-decided).mean()}
    return {name: float(value) for name, value in judged.items()} | {
        "gradient_weight": float(torch.sigmoid(-logit).mean()),
        "error_w": float(error_w.mean()),
        "error_l": float(error_l.mean()),
        "error_w_change": float((error_w - ref_error_w).mean()),
        "error_l_change": float((error_l - ref_error_l).mean()),
    }


def describe_beta(beta: float, dimensions: int) -> str:
    """The same temperature in the conventions of other implementations, for latents of `dimensions` numbers."""
    return (
        f"beta {beta:g} on the mean over {dimensions} dimensions, with the factor 1/2 (Diffusion-DPO, DSPO, InPO, Diffusion-SDPO, Flow-GRPO's DPO); "
        f"the same is {beta / 2:g} without the factor (diffusers' SD 1.5 script), {beta / dimensions:.4g} on the sum (SimpleTuner), "
        f"{beta / (2 * dimensions):.4g} as T omega beta of the paper's eq. 14; Diffusion-KTO's beta {beta / 2:g} has this logit scale, "
        f"{2 * beta:g} this gradient at the reference. The weight of a pair fades at error gaps of about {4 / beta:.2g}"
    )
