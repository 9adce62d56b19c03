r"""The continuous adjoint: reward gradients along an ODE in the memory of one step (https://arxiv.org/abs/1806.07366).

The gradient of the reward with respect to the state obeys an ODE of its own, which is integrated from the sample back to the
noise, with one vector-Jacobian product of the model a step. In flow matching's time, where sigma falls from 1 to 0 and
$dx = v\, d\sigma$:

$$ \frac{da}{d\sigma} = -\Big(\frac{\partial v}{\partial x}\Big)^{\!\top} a, \qquad a(0) = \nabla_{x} r, \qquad
\frac{dr}{d\theta} = \int_1^0 \Big(\frac{\partial v}{\partial\theta}\Big)^{\!\top} a\, d\sigma $$

often printed with both signs turned, which is right in reversed time only. Its discretisation that goes with the solver is exact:

$$ a_k = a_{k+1} + \Delta\sigma_k \Big(\frac{\partial v}{\partial x}(x_k)\Big)^{\!\top} a_{k+1}, \qquad
\frac{dr}{d\theta} = \sum_k \Delta\sigma_k \Big(\frac{\partial v}{\partial\theta}(x_k)\Big)^{\!\top} a_{k+1} $$

with $\Delta\sigma_k = \sigma_{k+1} - \sigma_k < 0$. It is autograd's gradient to rounding if the states x_k are those of the forward
pass. They are stored, which costs a latent per step. The original integrates them backwards as well: no storage,
but the states that come back are not those that went, by O(step) along the chain, and stiff fields diverge.
`AdjointResult.mismatch` states that error.

Any one-step solver will do: `adjoint_gradient` takes the step itself, x_{k+1} = step(k, x_k), of which Euler's is one.

Logged (`train_draft.py --adjoint`): `reward`; `mismatch`, 0 with stored states. `AdjointResult.norms` has the adjoint's growth along the chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdjointResult:
    """What the way back found.

    Attributes:
        gradients: one per parameter, of the summed objective; zeros where it has no influence.
        state: (B, *D), the gradient with respect to the first state.
        norms: (K + 1,), of the adjoint at each state.
        mismatch: the largest relative distance between step(k, x_k) and the given x_{k+1}.
    """

    gradients: list[Tensor]
    state: Tensor
    norms: Tensor
    mismatch: float


def adjoint_gradient(
    step: Callable[[int, Tensor], Tensor], states: Sequence[Tensor], final: Tensor, parameters: Sequence[Tensor], *, tolerance: float | None = 1e-3
) -> AdjointResult:
    """The gradient of an objective of the chain's last state, in the memory of one step.

    Args:
        step: (k, x_k) -> x_{k+1}, (B, *D), with the parameters in its graph.
        states: the K + 1 of the forward pass, or integrated backwards.
        final: (B, *D), the objective's gradient at the last state.
        tolerance: of the mismatch. None accepts any, for states integrated backwards.

    Raises:
        ValueError: a step leads elsewhere than the states say: other weights, or a solver that remembers earlier steps.
    """
    gradients, adjoint, mismatch = [torch.zeros_like(p) for p in parameters], final, 0.0
    norms = [final.norm()]
    for k in reversed(range(len(states) - 1)):
        x = states[k].detach().requires_grad_()
        with torch.enable_grad():
            x_next = step(k, x)
        error = float((x_next.detach() - states[k + 1]).abs().max() / states[k + 1].abs().max())
        mismatch = max(mismatch, error)
        if tolerance is not None and not error <= tolerance:
            raise ValueError(
                f"Step {k} leads {error:.1e} away from the stored state {k + 1}: the weights have changed, or the solver remembers earlier steps. "
                "Take a one-step solver (Euler, DDIM); for states integrated backwards pass tolerance=None."
            )
        found = torch.autograd.grad(x_next, [x, *parameters], adjoint, allow_unused=True)
        gradients = [g if f is None else g + f for g, f in zip(gradients, found[1:])]
        adjoint = torch.zeros_like(x) if found[0] is None else found[0]
        norms.append(adjoint.norm())
    return AdjointResult(gradients, adjoint, torch.stack(norms[::-1]), mismatch)
