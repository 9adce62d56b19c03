r"""MV-GRPO: Flow-GRPO with several captions of the same images (https://arxiv.org/abs/2603.12648). Experimental.

Comparing the G samples of a prompt under that prompt alone is one look at them. MV-GRPO writes K neighbouring captions $c_k$ of the
prompt $c_0$ (a *prior* rewriter sees the prompt, a *posterior* captioner the images), scores the same images under each, and
takes the policy-gradient step under each: many views of one rollout, and no new samples.

$$ A_{j,k} = \frac{r(x_j, c_k) - \mathrm{mean}_G\, r(\cdot, c_k)}{\mathrm{std}_G\, r(\cdot, c_k)}, \qquad
\rho_{j,t,k} = \frac{p_\theta(x_{t-1} \mid x_t, c_k)}{p_{old}(x_{t-1} \mid x_t, c_k)} $$

$$ L = \mathbb E\, \frac{1}{1+K} \sum_{k=0}^{K} \max(-A_{j,k}\,\rho_{j,t,k}, -A_{j,k}\,\mathrm{clip}(\rho_{j,t,k}, 1-c, 1+c)) $$

The actions were drawn under $c_0$. For k > 0 the ratio is no importance weight then: its denominator is not the density that they were drawn
from, so the expectation is biased and only the clip keeps the step local. With $c_k = c_0$ the gradient is Flow-GRPO's.

There is no official code. Decided here, where the paper leaves a choice or its text was not at hand: the old log-probabilities
under a view come from a pass of their own before the first update; each view is held near the pretrained model under that same
view; each group draws its K captions from those that there are, anew every epoch; the data set's other fields go to the reward
under every view. Cost: under each extra view a forward pass for the old log-probability and a forward and backward pass for
training, and a scoring; no sampling.

Logged: `reward` under the prompt itself; `reward/view`, the mean under the other captions; `ratio_error`, the largest over all views
before the epoch's first update; `kl` and `clip_fraction` as for Flow-GRPO.
"""

from __future__ import annotations

from torch import Tensor

from ..rl.importance import clipped_surrogate, importance_ratio


def mv_grpo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, num_views: int, per_dim: int, clip_range: float | tuple[float, float] = 1e-4
) -> Tensor:
    """What one view adds to the loss of one solver step, (B,); the views' sum is the loss. So each view's graph stands alone.

    Args:
        log_prob, old_log_prob: (B,) nats, of the stored action under the view's caption, summed over dimensions; the second
            before the first update and without gradient.
        advantage: (B,), under this view, without gradient.
        num_views: 1 + K, the prompt itself included.
        per_dim: number of dimensions of the action; 1 for the true ratio.
        clip_range: 1e-4, Flow-GRPO's.
    """
    return clipped_surrogate(importance_ratio(log_prob, old_log_prob, per_dim), advantage, clip_range) / num_views
