r"""Stochastic kernels of flow matching, each a Gaussian whose mean is linear in the state and in the velocity.

With $x_\sigma = (1-\sigma) x_0 + \sigma\epsilon$ and $v = \epsilon - x_0$, a step from $\sigma$ to $\sigma' < \sigma$ draws

$$ x' \sim \mathcal N(c_x x + c_v v,\; s^2 I). $$

The Euler-Maruyama kernels are one formula, $\mu = x + [v + \tfrac{g^2}{2\sigma}(x + (1-\sigma) v)]\,dt$ and $s = g\sqrt{-dt}$, with
$dt = \sigma' - \sigma$: the reverse SDE whose marginals are those of the probability-flow ODE, for any $g$. The others are
written in the form of DDIM: $\mu = (1-\sigma')\hat x_0 + \sqrt{\sigma'^2 - s^2}\,\hat\epsilon$, or as the exact posterior.

Coefficients are computed in Python's float64 and only then multiplied with float32 tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Kernel(NamedTuple):
    """mean = x_weight * x + v_weight * v, standard deviation = std."""

    x_weight: float
    v_weight: float
    std: float


def euler_maruyama(sigma: float, sigma_next: float, g: float) -> Kernel:
    """The reverse SDE with diffusion coefficient g, discretised by Euler-Maruyama. Its order is 1 in the step, for bounded g."""
    dt = sigma_next - sigma
    pull = g * g / (2 * sigma) * dt
    return Kernel(1 + pull, dt + pull * (1 - sigma), g * math.sqrt(-dt))


def flow_grpo(sigma: float, sigma_next: float, noise_level: float, sigma_after_first: float) -> Kernel:
    r"""Flow-GRPO (https://arxiv.org/abs/2505.05470, eq. 9): $g = a\sqrt{\sigma/(1-\sigma)}$.

    At sigma = 1 the coefficient is infinite; as in Flow-GRPO's official code (ac4c86e), the second sigma of the schedule stands inside
    $(1-\sigma)$ there, so the first step's std is exactly a. The same holds near 1, where some schedules (UniPC's) start.
    """
    singular = min(sigma, sigma_after_first) if sigma > 0.999 else sigma
    return euler_maruyama(sigma, sigma_next, noise_level * math.sqrt(sigma / (1 - singular)))


def dance_grpo(sigma: float, sigma_next: float, noise_level: float, sigma_after_first: float) -> Kernel:
    """DanceGRPO (https://arxiv.org/abs/2505.07818, eq. 9): constant g; eta is 0.3 in the official code (15cc71d)."""
    return euler_maruyama(sigma, sigma_next, noise_level)


def memoryless_em(sigma: float, sigma_next: float, noise_level: float, sigma_after_first: float) -> Kernel:
    r"""The memoryless SDE of Adjoint Matching (https://arxiv.org/abs/2409.08861, table 1), Euler-Maruyama with the offsets of
    its appendix: $g^2 = 2(\sigma - dt)/(1-\sigma')$ and $1/(1-\sigma')$ in the drift, finite at sigma = 1.

    `noise_level` does not enter: only this much noise forgets x_T. The last step, to sigma 0, is deterministic as in the paper.
    """
    dt = sigma_next - sigma
    g = math.sqrt(2 * (sigma - dt) / (1 - sigma_next)) if sigma_next > 0 else 0.0
    return Kernel(1 + dt / (1 - sigma_next), 2 * dt, g * math.sqrt(-dt))


def memoryless(sigma: float, sigma_next: float, noise_level: float, sigma_after_first: float) -> Kernel:
    r"""The ancestral kernel, $q(x_{\sigma'} \mid x_\sigma, \hat x_0)$ of the memoryless process, exact for any step size:

    $a = \frac{1-\sigma}{1-\sigma'}$, $c = \sigma^2 - a^2\sigma'^2$, $\mu = a\frac{\sigma'^2}{\sigma^2}x + (1-\sigma')\frac{c}{\sigma^2}\hat x_0$,
    $s = \sigma'\sqrt{c}/\sigma$. At sigma = 1 it forgets x_T altogether. `noise_level` does not enter.
    """
    a = (1 - sigma) / (1 - sigma_next)
    c = sigma**2 - a**2 * sigma_next**2
    clean = (1 - sigma_next) * c / sigma**2
    return Kernel(a * sigma_next**2 / sigma**2 + clean, -clean * sigma, sigma_next * math.sqrt(c) / sigma)


def cps(sigma: float, sigma_next: float, noise_level: float, sigma_after_first: float) -> Kernel:
    r"""Coefficients-preserving sampling (Flow-CPS, https://arxiv.org/abs/2509.05952): $s = \sigma'\sin(a\pi/2)$.

    The total noise of the state is right by construction, but the marginals are not preserved: as steps grow many, their
    variance shrinks. Never evaluate with it.
    """
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    direction = math.sqrt(max(0.0, sigma_next**2 - std**2))
    return Kernel(1 - sigma_next + direction, direction * (1 - sigma) - (1 - sigma_next) * sigma, std)


KERNELS = {"flow_grpo": flow_grpo, "dance_grpo": dance_grpo, "memoryless": memoryless, "memoryless_em": memoryless_em, "cps": cps}
