"""A trust-region step (`diffusers_align.rl.trust_region`) on an epoch's trajectories, by replaying them.

`train_ddpo.py --update trpo` alone has it: it walks the trajectories many times for one step, where `policy_gradient` walks them once.

Every number is a sum over the steps of a trajectory and a mean over the trajectories of all processes, made one denoiser step of
one batch at a time: memory is that of any other update, plus the means of the rollout. The KL is the exact one of the Gaussian
kernels, in nats, summed over steps and latent dimensions: the KL between distributions of trajectories.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...policy import Policy
from ...rl.diagnostics import effective_sample_size
from ...rl.trust_region import finite_difference_fisher_product, flat_gradient, trust_region_step
from ...transition import GaussianTransition
from ..run.model_loading import DTYPES
from ..run.run import Run
from .ruling_steps import describe_ruling_steps
from .sampling import Samples

# A shift of every dimension by a fifth of its noise in one of the steps. The KL is a sum over dimensions, so a fixed radius is nothing for many.
KL_PER_DIMENSION = 0.02


class TrajectorySurrogate:
    """What a trust-region step asks of an epoch's samples, over all processes.

    The surrogate is the mean over samples of $-\\sum_k A \\rho_k$ with each step's true ratio (no division by its dimensions).

    Args:
        advantages: (N,), of all processes' samples, on the policy's device.

    Attributes:
        parameters: what is trained.
        ratio_error: max |ratio - 1| before the step, once `value_and_gradient` was called.
        ess: effective sample size of the trajectories' ratios as a share of N, at the last `evaluate`.
    """

    def __init__(self, run: Run, policy: Policy, samples: Samples, advantages: Tensor):
        self.run, self.policy, self.samples, self.advantages = run, policy, samples, advantages
        self.parameters = policy.trainable_parameters()
        self.old: list[dict[int, GaussianTransition]] = [{} for _ in samples.batches]
        self.ratio_error = self.ess = 0.0

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """The surrogate and its gradient (P,) at the policy that sampled; remembers that policy's kernels."""
        total, gradient, errors = [], torch.zeros_like(self._flat()), []
        for b in range(len(self.old)):

            def on_step(k: int, transition: GaussianTransition, b: int = b) -> None:
                log_ratio = self._log_ratio(b, k, transition)
                loss = self._losses(b, log_ratio).sum()
                gradient.add_(flat_gradient(loss, self.parameters))
                total.append(loss.detach())
                errors.append(log_ratio.detach().expm1().abs().max())
                self.old[b][k] = GaussianTransition(transition.mean.detach(), transition.std)

            self._replay(b, on_step)
        self.ratio_error = float(self.run.accelerator.gather(torch.stack(errors).max()).max())
        return float(self._mean(torch.stack(total).sum())), self._mean(gradient)

    def fisher_product(self, vector: Tensor) -> Tensor:
        """F v (P,) by finite differences, so that any attention kernel will do."""
        total = torch.zeros_like(vector)
        for b in range(len(self.old)):

            def sweep(on_step: Callable[[Tensor, Tensor], None], b: int = b) -> None:
                self._replay(b, lambda k, transition: on_step(transition.mean, transition.std))

            total += finite_difference_fisher_product(sweep, self.parameters, vector, rounding=rounding_error(self.run))
        return self._mean(total)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """The surrogate and the KL from the policy that sampled, under the current parameters."""
        sums, log_weights = torch.zeros(2, dtype=torch.float64), []
        for b in range(len(self.old)):
            log_ratios = []

            def on_step(k: int, transition: GaussianTransition, b: int = b, log_ratios: list = log_ratios) -> None:
                log_ratios.append(self._log_ratio(b, k, transition))
                sums[0] += float(self._losses(b, log_ratios[-1]).sum())
                sums[1] += float(self.old[b][k].kl(transition).sum())

            self._replay(b, on_step)
            log_weights.append(torch.stack(log_ratios).sum(0))
        weights = self.run.accelerator.gather(torch.cat(log_weights))
        self.ess = float(effective_sample_size(weights)) / len(weights)
        surrogate, kl = self._mean(sums.to(self.advantages.device, weights.dtype)).tolist()
        return surrogate, kl

    def _replay(self, b: int, on_step: Callable[[int, GaussianTransition], None]) -> None:
        # autocast remembers the weights it has cast until it is left: entered anew for each place of the parameters.
        with self.run.accelerator.autocast():
            self.policy.replay(self.samples.batches[b], on_step)

    def _log_ratio(self, b: int, k: int, transition: GaussianTransition) -> Tensor:
        trajectory = self.samples.batches[b]
        return transition.log_prob(trajectory.actions[:, k]) - trajectory.log_probs[:, k]

    def _losses(self, b: int, log_ratio: Tensor) -> Tensor:
        return -self.advantages[self.samples.index[b]] * log_ratio.exp()

    def _flat(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters])

    def _mean(self, total: Tensor) -> Tensor:
        """A sum over this process's samples as the mean over all."""
        return self.run.accelerator.reduce(total, "sum") / len(self.samples.rewards)


def rounding_error(run: Run) -> float:
    """Of the denoiser's arithmetic, relative: TF32 keeps ten bits of float32's, and convolutions use it unless told otherwise."""
    tf32 = run.accelerator.device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    dtype = DTYPES[run.args.mixed_precision]
    return max(torch.finfo(dtype).eps, 2**-10 if tf32 else 0.0)


def trust_region_update(
    run: Run, policy: Policy, samples: Samples, advantages: Tensor, *, max_kl: float | None, cg_iterations: int, cg_damping: float
) -> dict[str, float]:
    """One step on all samples of an epoch. Returns the report of `trust_region_step` with `ratio_error` before the step and `ess`.

    Args:
        max_kl: nats per trajectory, see the module's page; None is 0.02 for each dimension of the latents. The gradient lies along the noise
            of these very samples, so their ratios move much further than the KL says: at an `ess` near 1 / N the line search sees one
            sample, accepts every step, and the radius is a step size.
    """
    if max_kl is None:
        dimensions = samples.batches[0].final[0].numel()
        max_kl = KL_PER_DIMENSION * dimensions
        run.explain_once(f"--max_kl is {max_kl:.4g} nats, {KL_PER_DIMENSION:g} for each of the {dimensions} dimensions of the latents")
    run.explain_once(*describe_ruling_steps(policy.scheduler, samples.batches[-1], samples.batches[-1].noisy_steps))
    problem = TrajectorySurrogate(run, policy, samples, advantages)
    report = trust_region_step(
        problem.parameters, problem.value_and_gradient, problem.fisher_product, problem.evaluate,
        max_kl=max_kl, cg_iterations=cg_iterations, damping=cg_damping,
    )  # fmt: skip
    if report["accepted"]:
        run.count_update()
    return {**report, "ratio_error": problem.ratio_error, "ess": problem.ess}
