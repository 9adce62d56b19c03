r"""DRTune: deep reward tuning with stopped inputs (https://arxiv.org/abs/2405.00760).

Early steps decide the composition, but gradients to them pass every later denoiser's Jacobian and explode. DRTune detaches the
denoiser's input at each step: the state then depends on earlier outputs through the solver alone, which is linear, and the gradient to
step k is one denoiser deep however early k is. A sparse, evenly spaced set of steps is trained, and the chain stops some steps
before its end, where the clean sample is predicted:

$$ x_{k+1} = A_k x_k + B_k\, \epsilon_\theta(\mathrm{sg}(x_k), k), \qquad
\nabla_\theta J = \mathbb E \sum_{k \in S} B_k \prod_{j>k} A_j \Big(\frac{\partial \epsilon_\theta(\mathrm{sg}(x_k))}{\partial\theta}\Big)^{\!\top} a_K $$

A roll-out with `detach_input=True`. For an Euler step of flow matching A = 1 and B is the step's length.

There is no official code. The steps are spaced by floor(K / number) from a random first one, after the paper; the number of steps
left out at the end is uniform in [0, skip_last_steps].

Logged: `reward`; `stop_step`, the mean step from which the clean sample was predicted.
"""

from __future__ import annotations

import torch


def grad_steps(num_steps: int, generator: torch.Generator | None = None, *, number: int = 5, skip_last_steps: int = 0) -> tuple[list[int], int]:
    """The steps to train and the step to stop at (`num_steps - 1`: the whole chain), drawn once a roll-out.

    Args:
        number: how many are trained, evenly spaced over what is walked.
        skip_last_steps: at most how many steps are left out at the end.

    Raises:
        ValueError: fewer steps than that.
    """
    if not 1 <= number <= num_steps - skip_last_steps or skip_last_steps < 0:
        raise ValueError(f"number must lie in [1, num_steps - skip_last_steps], got {number} of {num_steps} steps with skip_last_steps {skip_last_steps}.")
    walked = num_steps - int(torch.randint(skip_last_steps + 1, (), generator=generator))
    spacing = walked // number
    first = int(torch.randint(walked - spacing * (number - 1), (), generator=generator))
    return [first + spacing * i for i in range(number)], walked - 1
