r"""D3PO: direct preference for denoising diffusion policy optimization (https://arxiv.org/abs/2311.13231).

Sampling is a decision process whose every step is a Gaussian with a known log-probability, so DPO needs no bound: of two
trajectories of a prompt the better image's steps are preferred, each pair of steps at its own states. What is compared is exact, but
needs trajectories of the model itself, with the states of its sampler.

$$ L_k = -\log\sigma\big(\beta\,[\Delta^w_k - \Delta^l_k]\big), \qquad
\Delta_k = \tfrac1D\log\frac{p_\theta(x_{k+1} | x_k, c)}{p_{ref}(x_{k+1} | x_k, c)} $$

The exact density ratio has the optimum of RLHF: one Gaussian step under the reward c x moves by c S / beta, where Diffusion-DPO's error
gap moves by another amount. beta = 0.1 with the mean over dimensions; `per_dim=1` is the true ratio.

Against the official code (yk7333/d3po, 40d3175): it clamps both ratios to [0.9, 1.1], so a step has no gradient outside even when it went the wrong
way, and |beta (Delta_w - Delta_l)| is at most 0.02, which is why its loss seems to stay at 0.693. `clip="official"` is that. By default
only what went far enough in the right direction is held, as in PPO: the winner's ratio above 1 + c, the loser's below 1 - c.
`clip="none"` has the loss's own fading alone. The log-sigmoid is computed without overflow; ties are in no pair.

Logged: `accuracy`, share of step pairs with $\Delta^w > \Delta^l$ (ties half); `margin`, mean $\beta[\Delta^w - \Delta^l]$;
`clip_fraction`, the steps without gradient.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rl.importance import refuse_spread
from ..rl.pair_losses import pair_loss

CLIPS = ("one_sided", "official", "none")


def step_logit(
    log_prob_w: Tensor,
    log_prob_l: Tensor,
    ref_log_prob_w: Tensor,
    ref_log_prob_l: Tensor,
    *,
    per_dim: int,
    beta: float = 0.1,
    clip: str = "one_sided",
    clip_range: float = 0.1,
) -> Tensor:
    r"""$\beta\,[\Delta^w - \Delta^l]$ of one solver step, (B,).

    Args:
        log_prob_w, log_prob_l: (B,) nats, summed over dimensions, of the recorded steps of winner and loser.
        ref_log_prob_w, ref_log_prob_l: (B,), the reference's of the same steps, without gradient.
        per_dim: number of dimensions of the action; 1 for the true ratio.
        beta: 0.1, the official default.
        clip: `one_sided`, `official` or `none`, as in the page.
        clip_range: c, 0.1 in the official code.

    Raises:
        ValueError: an unknown clip; log-probabilities of other samples.
    """
    refuse_spread(log_prob_w, log_prob_l=log_prob_l, ref_log_prob_w=ref_log_prob_w, ref_log_prob_l=ref_log_prob_l)
    if clip not in CLIPS:
        raise ValueError(f"Unknown clip {clip!r}; choose one of {', '.join(CLIPS)}.")
    gain_w, gain_l = (log_prob_w - ref_log_prob_w) / per_dim, (log_prob_l - ref_log_prob_l) / per_dim
    low, high = math.log1p(-clip_range), math.log1p(clip_range)
    if clip == "official":
        gain_w, gain_l = gain_w.clamp(low, high), gain_l.clamp(low, high)
    elif clip == "one_sided":
        gain_w, gain_l = gain_w.clamp(max=high), gain_l.clamp(min=low)
    return beta * (gain_w - gain_l)


def d3po_loss(log_prob_w: Tensor, log_prob_l: Tensor, ref_log_prob_w: Tensor, ref_log_prob_l: Tensor, *, per_dim: int, **options) -> Tensor:
    """The loss of one solver step of each pair, (B,). Arguments as for `step_logit`."""
    return pair_loss(step_logit(log_prob_w, log_prob_l, ref_log_prob_w, ref_log_prob_l, per_dim=per_dim, **options))


@torch.no_grad()
def d3po_metrics(
    log_prob_w: Tensor,
    log_prob_l: Tensor,
    ref_log_prob_w: Tensor,
    ref_log_prob_l: Tensor,
    *,
    per_dim: int,
    beta: float = 0.1,
    clip: str = "one_sided",
    clip_range: float = 0.1,
) -> dict[str, float]:
    """The logged numbers of the page above, over the pairs (B,) of one step; the margin is that before the clip."""
    log_probs = [value.double() for value in (log_prob_w, log_prob_l, ref_log_prob_w, ref_log_prob_l)]
    margin = step_logit(*log_probs, per_dim=per_dim, beta=beta, clip="none")
    gain_w, gain_l = (log_probs[0] - log_probs[2]) / per_dim, (log_probs[1] - log_probs[3]) / per_dim
    low, high = (-math.inf, math.inf) if clip == "none" else (math.log1p(-clip_range), math.log1p(clip_range))
    held_w, held_l = gain_w > high, gain_l < low
    if clip == "official":
        held_w, held_l = held_w | (gain_w < low), held_l | (gain_l > high)
    return {
        "accuracy": float((0.5 * (margin.sign() + 1)).mean()),
        "margin": float(margin.mean()),
        "clip_fraction": float(torch.cat([held_w, held_l]).double().mean()),
    }


def sampled_steps(steps: Sequence[int], number: int, *, seed: int) -> list[int]:
    """`number` of the solver `steps`, drawn without replacement, in order: each step of a trajectory is a sub-segment with a
    preference of its own, and a few of them stand for all. The same for every process, and after a resume, by the `seed`.

    Raises:
        ValueError: there are not so many steps.
    """
    if not len(steps):
        raise ValueError("No step has noise, so none has a log-probability to learn from: raise the noise, or widen the window of steps that have it.")
    if not 0 < number <= len(steps):
        raise ValueError(f"{number} steps cannot be drawn from {len(steps)} stochastic ones; choose 1 to {len(steps)}.")
    return sorted(random.Random(f"{seed}/steps").sample(list(steps), number))
