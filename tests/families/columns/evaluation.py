"""Single evaluations of the denoiser, and what it is asked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cell import DoesNotApply, require
from ..column import Column
from ..subject import Subject, relative_error, watched


def predict(subject: Subject) -> str | None:
    policy, trajectory = subject.policy, subject.trajectory
    if subject.size == 1:
        raise DoesNotApply("One sample a call has one time.")
    latents, condition, times = trajectory.states[:, min(1, trajectory.num_steps - 1)], trajectory.condition, trajectory.timesteps[[0, -1]]
    with torch.no_grad():
        together = policy.predict(latents, times, condition)
        alone = torch.cat([policy.predict(latents[[i]], times[[i]], condition.select([i])) for i in range(2)])
        at_each = [policy.predict(latents, times[[i, i]], condition) for i in range(2)]
    among_others = torch.stack([at_each[0][0], at_each[1][1]])
    errors = relative_error(together, alone), relative_error(together, among_others)
    require(min(errors) <= 1e-4, f"At a time each, off by {min(errors):.1e} from one by one.")
    require(times[0] == times[1] or relative_error(at_each[0][1:], at_each[1][1:]) > 1e-4, "The second sample's time made no difference.")
    assert subject.lora
    subject.forget_gradients()
    with torch.enable_grad():
        policy.predict(latents, times, condition).square().mean().backward()
    require(sum(subject.gradients().values()) > 0, "No gradient.")
    return "stock samples depend on their neighbours in a batch" if errors[0] > 1e-4 else None


@torch.no_grad()
def guided(subject: Subject) -> None:
    policy, trajectory, seen, told = subject.policy, subject.trajectory, [], {}
    k = min(1, trajectory.num_steps - 1)

    def keep(step) -> Tensor | None:
        if step.child == 0 and step.k == k:
            # Some models give a variance behind it, which is no part of what they predict.
            learned = step.model_output.shape[1:] == (2 * step.sample.shape[1], *step.sample.shape[2:])
            seen.append((step.timestep, step.sample.clone(), (step.model_output.chunk(2, 1)[0] if learned else step.model_output).clone()))
        return None

    def ask(forward, *args, **kwargs):
        told.update({name: x.clone() for name, x in kwargs.items() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 1 and not seen})
        return forward(*args, **kwargs)

    with policy.noise(trajectory.condition, False), policy.denoising(ask):
        policy.drive(trajectory.condition, keep)
    timestep, state, expected = seen.pop()
    times, before = torch.as_tensor(timestep).flatten()[:1].expand(len(state)), dict(told)
    with policy.denoising(ask):
        output = policy.predict(state, times, trajectory.condition, guidance=True)
    error = relative_error(output, expected)
    others = [name for name in before if name in told and not torch.equal(before[name], told[name])]
    if error > 1e-4 and others and not {"timestep", "timesteps", "t"} & set(others):
        raise DoesNotApply(f"The denoiser is also told where a step leads to ({', '.join(others)}); `predict` is of one time, and asks for the velocity there.")
    require(error <= 1e-4, f"Off by {error:.1e} from what the roll-out saw.")


@torch.no_grad()
def asked(subject: Subject) -> None:
    assert subject.stock_images is not None
    with watched(subject.policy.denoisers) as inputs:
        subject.rollout(deterministic=True)
    if not subject.first_inputs:
        raise DoesNotApply("The denoiser takes no time.")
    for name, (time, scale) in subject.first_inputs.items():
        require(name in inputs, f"The {name} is not asked.")
        for what, own, expected in (("time", inputs[name][0], time), ("scale", inputs[name][1], scale)):
            require(abs(own - expected) <= 0.3 * abs(expected), f"The {name} is asked first at the {what} {own:.4g}, by the stock call at {expected:.4g}.")


COLUMNS = (
    Column("predict", "pred", "`predict` at a time for each sample is that of one by one, with a gradient", predict, ("rollout",)),
    Column("guided", "cfg", "`predict(guidance=True)` is what the roll-out saw", guided, ("rollout",)),
    Column("asked", "ask", "the denoiser is asked first at the stock call's time and scale (30 %)", asked, ("rollout",)),
)
