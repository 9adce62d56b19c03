"""One update of an algorithm on own samples, and of one on preferences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss, gaussian_kl
from diffusers_align.forward_process import ForwardProcess

from ..cell import DoesNotApply, require
from ..column import Column
from ..subject import Subject, smooth
from .pixels import is_sound


@contextmanager
def _update(subject: Subject) -> Iterator[torch.optim.Optimizer]:
    """Context: an optimiser of the LoRA, whose step is checked at the end; the LoRA is as before afterwards."""
    parameters = [p for own in subject.lora.values() for p in own]
    before = [p.detach().clone() for p in parameters]
    subject.forget_gradients()
    try:
        yield torch.optim.AdamW(parameters, lr=1e-3)
        require(all(bool(p.isfinite().all()) for p in parameters), "The update is not finite.")
        require(any(not torch.equal(p, old) for p, old in zip(parameters, before)), "The update changed nothing.")
    finally:
        for parameter, old in zip(parameters, before):
            parameter.data.copy_(old)
        subject.forget_gradients()


def grpo(subject: Subject) -> None:
    policy, trajectory, errors = subject.policy, subject.trajectory, []
    advantage = torch.tensor([1.0, -1.0])[: subject.size]
    per_dim = trajectory.final[0].numel()
    with _update(subject) as optimizer:
        with policy.reference():
            references = policy.transitions(trajectory)

        def on_step(k, transition):
            log_prob, old = transition.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k]
            errors.append(float(((log_prob - old).exp() - 1).abs().max()))
            kl = gaussian_kl(transition.mean, references[k].mean, transition.std)
            (flow_grpo_loss(log_prob, old, advantage, per_dim=per_dim) + 0.04 * kl).mean().backward()

        with torch.enable_grad():
            policy.replay(trajectory, on_step)
        optimizer.step()
    require(max(errors) == 0, f"The ratio is off by {max(errors):.1e} before the first update.")


def _errors(subject: Subject, latents: Tensor, noisy: Tensor, times: Tensor, noise: Tensor, process: ForwardProcess) -> Tensor:
    output = subject.policy.predict(noisy, times, subject.trajectory.condition)
    return (output.float() - process.target(latents, noise, times).float()).square().flatten(1).mean(1)


def dpo(subject: Subject) -> None:
    policy, trajectory = subject.policy, subject.trajectory
    with torch.no_grad():
        shape = policy.decode(trajectory.final, trajectory.condition).shape
        if is_sound(shape):
            raise DoesNotApply("Audio: pairs are of pictures and videos.")
        pair = [policy.encode(smooth(shape, seed), trajectory.condition) for seed in (2, 5)]
    process = ForwardProcess(policy.scheduler)
    noised = [next(process.noised(latents, subject.seeds, 1, time_seed=7)) for latents in pair]
    calls = [(latents, noisy, times, noise, process) for latents, (noisy, times, noise) in zip(pair, noised)]
    with _update(subject) as optimizer:
        with torch.no_grad(), policy.reference():
            references = [_errors(subject, *call) for call in calls]
        with torch.enable_grad():
            loss = diffusion_dpo_loss(*(_errors(subject, *call) for call in calls), *references, beta=100.0).mean()
            loss.backward()
        optimizer.step()
    require(abs(float(loss) - math.log(2)) < 1e-4, f"The first loss is {float(loss):.4f}, not log 2.")


COLUMNS = (
    Column("grpo", "grpo", "one update of Flow-GRPO: the ratio is exactly 1 at first, the step finite", grpo, ("rollout",), half=True),
    Column("dpo", "dpo", "one update of Diffusion-DPO on pairs of pictures: the loss is log 2 at first", dpo, ("rollout", "decode")),
)
