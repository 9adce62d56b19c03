r"""DSPO: direct score preference optimization. Source: H. Zhu, T. Xiao, V. Honavar, DSPO, ICLR 2025.

Fine-tune by score matching, as in pretraining, but on the scores of the distribution of preferred images: that of the data plus
the gradient of how likely a win is under DPO's implicit reward. With the scores of model and reference in the place of the
reward's gradient, the target of the model's output at the winner is shifted by $c\,(f_\theta - f_{ref})$:

$$ L = \tfrac1D \big\|(f_\theta - y) - c\,(f_\theta - f_{ref})\big\|^2, \qquad c = \beta_{dspo}\,(1 - \sigma(z)), \qquad
z = -\tfrac\beta2\big[(L_w - L_w^{ref}) - (L_l - L_l^{ref})\big] $$

f, y at the winner. The vector is $(1 - c)(f_\theta - y) + c (f_{ref} - y)$, so its square is $(1 - c) L_w + c L_w^{ref} - c (1 - c) K$ with
$K = \frac1D\|f_\theta - f_{ref}\|^2$: three errors are all it needs. Where c is 0 it is fine-tuning on winners, where c is 1 nothing is left to learn.

The official code (huaishengzhu/DSPO, 8b4e09b) for SD 1.5 is followed, gradient through c included. It has one number for both betas, 0.001, which makes sigma
1/2 and c 0.0005: fine-tuning on winners to that accuracy. Here they are two. Its code for SDXL is another objective, with no data
term: $(1 - \sigma(z))^2 K$ where K has reached 0.1, and $(1 - \sigma(z))^2$ before; `objective="distance"` is that one, decided for each pair
rather than for the batch, so that micro-batches do not matter.

Logged: as for Diffusion-DPO; `dspo_coefficient`, mean c; `ref_distance`, mean K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .diffusion_dpo import preference_logit


def dspo_loss(
    error_w: Tensor,
    error_l: Tensor,
    ref_error_w: Tensor,
    ref_error_l: Tensor,
    ref_distance_w: Tensor,
    *,
    beta: float | Tensor,
    dspo_beta: float = 0.001,
    objective: str = "score",
    threshold: float = 0.1,
) -> Tensor:
    """The loss of each pair, (B,).

    Args:
        error_w, error_l, ref_error_w, ref_error_l: (B,) as for `preference_logit`.
        ref_distance_w: (B,) mean squared difference of the outputs of model and reference at the winner (`matching_error`).
        beta: temperature of the implicit reward; 0.001 (SD 1.5) and 1000 to 5000 (SDXL) in the official code.
        dspo_beta: weight of the reward's score, 0.001 in the official code.
        objective: `score`, the page's; `distance`, the official code's for SDXL.
        threshold: of `distance`; 0.1 in the official code.

    Raises:
        TypeError: errors in half precision.
        ValueError: an unknown objective.
    """
    doubt = torch.sigmoid(-preference_logit(error_w, error_l, ref_error_w, ref_error_l, beta=beta))
    if objective == "distance":
        return doubt.square() * torch.where(ref_distance_w >= threshold, ref_distance_w, 1)
    if objective != "score":
        raise ValueError(f'objective is "score" or "distance", got {objective!r}.')
    c = dspo_beta * doubt
    return (1 - c) * error_w + c * ref_error_w - c * (1 - c) * ref_distance_w
