r"""DenseGRPO: Flow-GRPO with a reward for every step (https://arxiv.org/abs/2601.20218).

One reward at the end of a trajectory says nothing about which of its steps earned it. The ODE leads from any state
$x_i$ to one image without further chance, so that image's reward $R_i$ is the state's value, and the credit of step i is what its
noise gained. Steps with credit of their own also tell how much noise each of them bears.

$$ R_i = r\big(\mathrm{ODE}(x_i)\big), \qquad \Delta R_i = R_{i+1} - R_i, \qquad
A_{i} = \frac{\Delta R_i - \mathrm{mean}_G\,\Delta R_i}{\mathrm{std}_G\,\Delta R_i} $$

$$ L = \mathbb E\Big[\max(-A_i\rho_i, -A_i\,\mathrm{clip}(\rho_i, 1-c, 1+c)) + \beta\, D_{KL}(\pi_\theta \| \pi_{ref})\Big] $$

The gains telescope: their sum is $R_K - R_0$, the reward of the sample less that of the ODE from the *same* initial noise. The loss
is Flow-GRPO's (`flow_grpo_loss`), with the advantage of the step in the place of the sample's.

Calibration (`calibrate`): the noise of step i is $\psi_i\sqrt{-dt}$. Before training, rounds of sampling move each $\psi_i$ up while
gains and losses are equally many, and down once they are not: then most noise only does damage, and there is nothing to choose
from. Afterwards psi is fixed.

Cost, in denoiser calls per sample: the completions of a trajectory with T noisy steps take T + (T - 1) + ... + 1 = T (T + 1) / 2 calls
beside its own T: 55 beside 10. A noise window of w steps from step s on takes w (T - s) - w (w - 1) / 2, for states behind the last
noisy step lie on the final sample's own ODE.

There is no official code; what the paper leaves open is decided here. Completions take all remaining steps of the schedule: the
paper's best. (One step, so the predicted clean sample, was worse than Flow-GRPO there.) Counts are over all samples of a round.
The rule of calibration looks at a count, not at a test: among N gains of random sign the two counts differ by less than 2 with a
probability near $\sqrt{2/(\pi N)}$ only (16% for 24; N is even), so that psi drifts down even where the noise is harmless. Give `tolerance` the
order of $\sqrt N$ where that matters. psi stays above zero.

Generalised advantages (`--advantage gae`, not of the paper): all gains from a step on count for it, less what a learned value $V(x_i, c, i)$ expected of
them, instead of the step's own gain beside its group's. A gain is already a TD error, of the value that the ODE gives a state, so it leaves out that noise
moves what later noise can gain; this does not, at the price of its variance, of which $\lambda$ keeps a part (`rl.returns.gae`, targets by
TD($\lambda$)). Every step with noise is completed then, also those that are not trained, and advantages are normalised over samples and steps together.

Logged: `reward` of the samples; `gain/i`, the mean gain of step i, and `gained/i`, the share of samples that gained there;
`ratio_error`, `kl` and `clip_fraction` as for Flow-GRPO; with a learned value `explained_variance` and `value_error` as for DPOK. psi is printed
once it is fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step_gains(rewards: Tensor) -> Tensor:
    """The credit of each step, (N, K): R[i + 1] - R[i].

    Args:
        rewards: (N, K + 1), of the ODE's completion from each state, and last of the sample itself. NaN where it could not be
            scored or was not asked for; the gains on either side are NaN then, and their advantage 0.
    """
    return rewards[:, 1:] - rewards[:, :-1]


def calibrate(psi: Tensor, gains: Tensor, *, tolerance: float | None = None, increment: float = 0.01) -> Tensor:
    """One round of calibration: the next psi, (K,).

    Args:
        psi: (K,) noise levels.
        gains: (N, K) of samples drawn with them. NaN counts as neither sign; a step whose gains are all NaN keeps its psi.
        tolerance: the paper's epsilon_1: psi rises where gains and losses differ by fewer than so many samples. The square root of N if
            absent, one standard deviation of the difference between equally likely signs; the paper's is 2.
        increment: the paper's epsilon_2. No psi falls below it: without noise there is no policy.
    """
    surplus = (gains > 0).sum(0) - (gains < 0).sum(0)
    tolerance = len(gains) ** 0.5 if tolerance is None else tolerance
    moved = torch.where(surplus.abs() < tolerance, psi + increment, psi - increment).clamp(min=increment)
    return torch.where(gains.isnan().all(0), psi, moved)


def gain_metrics(gains: Tensor) -> dict[str, float]:
    """`gain/i` and `gained/i` of the steps that have any gains (N, K)."""
    metrics = {}
    for i, column in enumerate(gains.unbind(1)):
        valid = column[~column.isnan()]
        if len(valid):
            metrics |= {f"gain/{i}": float(valid.mean()), f"gained/{i}": float((valid > 0).float().mean())}
    return metrics
