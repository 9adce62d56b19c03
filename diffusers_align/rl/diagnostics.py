"""What to look at while a policy trains."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def ratio_diagnostics(log_prob: Tensor, old_log_prob: Tensor, clip_range: float, per_dim: int = 1) -> dict[str, float]:
    """Of one minibatch (B,): `ratio_error` = max |ratio - 1|, which must be 0 (to rounding) before the first update of an epoch;
    `clip_fraction` outside 1 +- clip_range; `approx_kl` = mean of (ratio - 1) - log ratio, per `per_dim` dimensions
    (http://joschu.net/blog/kl-approx.html, k3)."""
    log_ratio = (log_prob - old_log_prob).double() / per_dim
    ratio = log_ratio.exp()
    return {
        "ratio_error": float((ratio - 1).abs().max()),
        "clip_fraction": float(((ratio - 1).abs() > clip_range).double().mean()),
        "approx_kl": float((ratio - 1 - log_ratio).mean()),
    }
