r"""Linear-DPO: Diffusion-DPO with a bounded linear utility and a moving reference (https://arxiv.org/abs/2605.21123).

The logistic weight of DPO, 1 - sigma(z), fades exponentially, so pairs that are learned leave no pull on the winner. A line in its
place, held between eta and 1 - eta, keeps a floor under it; and the reference follows the model as an exponential moving average,
so that the gap it is measured by does not saturate.

$$ L = \mathrm{sg}(w)\,(L_w - L_l), \qquad w = \mathrm{clip}\big(\tfrac12 - 0.4\, z,\ \eta,\ 1 - \eta\big), \qquad
z = -\tfrac\beta2\big[(L_w - L_w^{ref}) - (L_l - L_l^{ref})\big] $$

so the slope by the gap is 0.2 beta, steeper than the logistic's 0.125 beta. At the reference, w = 1/2: the gradient is Diffusion-DPO's times
2 / beta. The loss itself has no bound below.

As in the official code (at b273b95): beta 100, eta 1e-3 (SD 1.5); 500, 0 (SDXL); 1000 to 5000, 0.05 (SD3); decay of the reference 0.99
in its recipes. The moving reference is the training loop's.

Logged: as for Diffusion-DPO; `linear_weight`, mean w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .diffusion_dpo import preference_logit


@torch.no_grad()
def linear_weight(
    error_w: Tensor, error_l: Tensor, ref_error_w: Tensor, ref_error_l: Tensor, *, beta: float | Tensor, eta: float = 1e-3, slope: float = 0.2
) -> Tensor:
    """w, (B,) without gradient. `slope` by the error gap times beta, 0.2 in the official code; 0.125 is tangent to the logistic."""
    logit = preference_logit(error_w, error_l, ref_error_w, ref_error_l, beta=beta)
    return (0.5 - 2 * slope * logit).clamp(eta, 1 - eta)


def linear_dpo_loss(
    error_w: Tensor, error_l: Tensor, ref_error_w: Tensor, ref_error_l: Tensor, *, beta: float | Tensor, eta: float = 1e-3, slope: float = 0.2
) -> Tensor:
    """The loss of each pair, (B,).

    Args:
        error_w, error_l, ref_error_w, ref_error_l, beta: as for `preference_logit`.
        eta: the least weight of a pair, 1e-3 in the official recipe for SD 1.5.
        slope: as for `linear_weight`.

    Raises:
        TypeError: errors in half precision.
    """
    return linear_weight(error_w, error_l, ref_error_w, ref_error_l, beta=beta, eta=eta, slope=slope) * (error_w - error_l)
