r"""REINFORCE on the denoising chain (DDPO-SF).

Denoising is a Markov decision process: the state is x_t, the action x_{t-1}, the policy the sampler's Gaussian kernel, and
the reward comes with the final sample. The score-function estimator needs nothing but log-probabilities (DDPO,
https://arxiv.org/abs/2305.13301, eq. 5):

$$ \nabla_\theta J = \mathbb E\Big[\sum_t \nabla_\theta \log p_\theta(x_{t-1} \mid x_t, c)\, A(x_0, c)\Big] $$

It holds for samples of the current policy only: one optimizer step per rollout. DDPO's official code (kvablack/ddpo-pytorch, 1958463) ships no such variant,
only importance sampling (`ddpo`), whose gradient is this one as long as the ratio is 1.
"""

from __future__ import annotations

from torch import Tensor

from ..rl.importance import refuse_spread


def reinforce_loss(log_prob: Tensor, advantage: Tensor, *, per_dim: int = 1) -> Tensor:
    """-A log p, (B,).

    Args:
        log_prob: (B,) nats, summed over dimensions, of the actions taken at one step.
        advantage: (B,), without gradient.
        per_dim: divide the log-probability by this many dimensions, as the papers do.

    Raises:
        ValueError: they are of other samples.
    """
    refuse_spread(log_prob, advantage=advantage)
    return -advantage * log_prob / per_dim
