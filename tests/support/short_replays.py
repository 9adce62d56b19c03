"""Replays with a `backward` at each step, and what they took."""

import torch


def error(actual, expected):
    """Relative, by norms."""
    return float((actual - expected).norm() / expected.norm())


def replayed(policy, trajectory, forwards=None, steps=None):
    """The means of the kernels, the gradient of a function of them by a `backward` at each step, and the rows of each denoiser call."""
    means, rows = {}, []
    for parameter in policy.trainable_parameters():
        parameter.grad = None

    def on_step(k, kernel):
        means[k] = kernel.mean.detach()
        if torch.is_grad_enabled():
            ((k + 1) * kernel.mean.square().mean()).backward()

    def count(forward, *args, **kwargs):
        rows.append(len(args[0] if args else next(iter(kwargs.values()))))
        return forward(*args, **kwargs)

    with policy.denoising(count):
        policy.replay(trajectory, on_step, steps, forwards=forwards)
    gradients = [p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None]
    return means, torch.cat(gradients) if gradients else None, rows
