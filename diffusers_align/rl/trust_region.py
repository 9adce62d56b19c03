r"""Trust-region policy optimisation (TRPO, https://arxiv.org/abs/1502.05477).

Of all small steps, take the one that improves a surrogate of the objective most while the policy moves by at most $\delta$ in KL
divergence. To first order in the surrogate (gradient g) and second in the KL (Fisher matrix F) that is the natural gradient,

$$ \Delta\theta = -\sqrt{\frac{2\delta}{g^\top F^{-1} g}}\; F^{-1} g, $$

with $F^{-1} g$ by conjugate gradients, which need products with F alone; a line search on the exact surrogate and the exact KL
then shortens the step until both agree. It has no learning rate: $\delta$ says how far the policy may go.

For Gaussian steps $\mathcal N(\mu_\theta, \mathrm{std}^2 I)$ of fixed std, $F = \sum J^\top \mathrm{diag}(\mathrm{std}^{-2}) J$ with J the Jacobian of
the means. Its products are a sum over steps and micro-batches that a `sweep` hands out one after the other, so that memory stays one
denoiser step's. `finite_difference_fisher_product` needs forward passes and first derivatives alone, so any attention kernel will do:
differentiating the KL twice would be exact, but fused attention has no second derivative.

Vectors are flat, (P,): all parameters one after the other, as in `torch.nn.utils.parameters_to_vector`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

# sweep(on_step) hands out each step's mean (B, *D) and std, broadcastable to it, under the current parameters and autograd mode, in
# the same order each time.
Sweep = Callable[[Callable[[Tensor, Tensor], None]], None]


class Solution(NamedTuple):
    """What `conjugate_gradient` found: x (P,), what is left of b, b - A x (P,), and the number of products it took."""

    x: Tensor
    residual: Tensor
    iterations: int


def conjugate_gradient(matvec: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int = 10, tolerance: float = 1e-5) -> Solution:
    """Solve A x = b for a symmetric positive definite A that is known by its products `matvec`.

    Args:
        b: (P,); the solution has its dtype.
        iterations: at most; 10 as in TRPO's appendix C.
        tolerance: stop where |b - A x| is below this share of |b|, or where A turns out not to be positive along a direction.
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, squared = residual.clone(), residual.dot(residual)
    goal = tolerance**2 * squared
    for iteration in range(iterations):
        if squared <= goal:
            return Solution(x, residual, iteration)
        product = matvec(direction)
        curvature = direction.dot(product)
        if not curvature > 0:
            return Solution(x, residual, iteration + 1)
        length = squared / curvature
        x = x + length * direction
        residual = residual - length * product
        before, squared = squared, residual.dot(residual)
        direction = residual + squared / before * direction
    return Solution(x, residual, iterations)


@contextmanager
def displaced(parameters: Sequence[Tensor], vector: Tensor) -> Iterator[None]:
    """While inside, the parameters are moved by `vector` (P,); afterwards they are what they were, bit for bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    move(parameters, vector)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)


@torch.no_grad()
def move(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Add `vector` (P,) to the parameters in place."""
    for parameter, part in zip(parameters, vector.split([parameter.numel() for parameter in parameters])):
        parameter.add_(part.view_as(parameter))


def flat_gradient(output: Tensor, parameters: Sequence[Tensor], cotangent: Tensor | None = None, create_graph: bool = False) -> Tensor:
    """The gradient of `output` (of its product with `cotangent`, if it is no scalar) as a vector (P,); 0 for unused parameters."""
    found = torch.autograd.grad(output, parameters, cotangent, create_graph=create_graph, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, parameters)])


def finite_difference_fisher_product(sweep: Sweep, parameters: Sequence[Tensor], vector: Tensor, *, rounding: float | None = None) -> Tensor:
    r"""F v (P,) of all steps of `sweep`, summed: $J^\top \mathrm{std}^{-2} (\mu_{\theta + hv} - \mu_{\theta - hv}) / 2h$, three sweeps.

    The two sweeps without gradient keep their means: let a sweep be one micro-batch, and sum.

    Args:
        rounding: relative rounding error of the means, which h balances against the means' curvature; that of the vector's dtype by
            default, more where they are computed in a coarser one.
    """
    norm, size = vector.norm(), parameters_to_vector(parameters).detach().norm()
    if norm == 0:
        return torch.zeros_like(vector)
    # The error is about rounding / r + 20 r^2 at a relative step r (measured on a LoRA, in float32), least near this r.
    relative = 0.2 * (rounding or torch.finfo(vector.dtype).eps) ** (1 / 3)
    h = relative * (size if size > 0 else 1.0) / norm
    means: dict[int, list[Tensor]] = {1: [], -1: []}
    for sign, kept in means.items():
        with torch.no_grad(), displaced(parameters, sign * h * vector):
            sweep(lambda mean, std, kept=kept: kept.append(mean))
    differences = zip(means[1], means[-1], strict=True)
    total = torch.zeros_like(vector)

    def on_step(mean: Tensor, std: Tensor) -> None:
        forth, back = next(differences)
        total.add_(flat_gradient(mean, parameters, (forth - back) / (2 * h * std.where(std > 0, math.inf).square())))

    with torch.enable_grad():
        sweep(on_step)
    return total


def trust_region_step(
    parameters: Sequence[Tensor],
    surrogate_and_gradient: Callable[[], tuple[float, Tensor]],
    fisher_product: Callable[[Tensor], Tensor],
    evaluate: Callable[[], tuple[float, float]],
    *,
    max_kl: float,
    cg_iterations: int = 10,
    cg_tolerance: float = 1e-5,
    damping: float = 0.1,
    backtracks: int = 10,
    backtrack_factor: float = 0.8,
    accept_ratio: float = 0.1,
) -> dict[str, float]:
    """Move the parameters once, so that the surrogate falls and the KL to where they were is at most `max_kl`; or not at all.

    Args:
        surrogate_and_gradient: the surrogate to minimise and its gradient (P,), at the parameters as they are.
        fisher_product: F v (P,) there. F is the Hessian of the KL that `evaluate` returns.
        evaluate: (surrogate, KL to the policy before the step), both exact, at the parameters when it is called.
        max_kl: in the units of `evaluate`.
        damping: added to F's diagonal, against directions in which few samples show no curvature. 0.1, a usual value.
        backtracks: how often the step is shortened by `backtrack_factor` before it is given up.
        accept_ratio: the improvement must be this share of what the gradient promises. 0.1, a usual value.

    Returns:
        `accepted` 1 or 0; `surrogate` before, `improvement` and `expected_improvement` (by the gradient) of the step taken, or of
        the last one tried; its exact `kl`; `backtracks`; `cg_residual` |g - (F + damping) x| / |g| (above 1 for the first iterations, if F
        is ill-conditioned; the error of x falls all the same); `grad_norm`; `step_norm`.
        Where nothing was accepted the parameters are what they were, bit for bit.
    """
    surrogate, gradient = surrogate_and_gradient()
    report = {"accepted": 0.0, "surrogate": surrogate, "grad_norm": float(gradient.norm())}
    report |= dict.fromkeys(("improvement", "expected_improvement", "kl", "backtracks", "cg_residual", "step_norm"), 0.0)
    if report["grad_norm"] == 0:
        return report
    solution = conjugate_gradient(lambda v: fisher_product(v) + damping * v, gradient, iterations=cg_iterations, tolerance=cg_tolerance)
    report["cg_residual"] = float(solution.residual.norm() / gradient.norm())
    # x^T (F + damping) x without another product.
    curvature = solution.x.dot(gradient - solution.residual)
    if not curvature > 0:
        return report
    full_step = -(2 * max_kl / curvature).sqrt() * solution.x
    for backtrack in range(backtracks + 1):
        step = backtrack_factor**backtrack * full_step
        with displaced(parameters, step):
            now, kl = evaluate()
        report |= {"improvement": surrogate - now, "expected_improvement": -float(gradient.dot(step)), "kl": kl}
        report |= {"backtracks": float(backtrack), "step_norm": float(step.norm())}
        # The full step's KL is max_kl to second order: to rounding, it may lie above.
        if kl <= max_kl * (1 + 1e-6) and report["improvement"] > accept_ratio * report["expected_improvement"]:
            move(parameters, step)
            return report | {"accepted": 1.0}
    return report
