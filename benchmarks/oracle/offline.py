"""Preferences, likes and scores on the chain: the shipped losses on the pretrained model's own paths, whose log-probability is the (negative) error."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.algorithms.diffusion_kto import ReferencePoint, kto_loss
from diffusers_align.algorithms.reward_weighted_regression import reward_weighted_loss, reward_weights

from .problem import Paths, Problem, learn, log_probs, roll_out


def drawn(problem: Problem, log_policy: Tensor, batch: int, generator: torch.Generator) -> tuple[Paths, Tensor]:
    """Paths of the pretrained model, and their log-probabilities (N,) under the table."""
    paths = roll_out(problem.chain, problem.chain.kernels, batch, generator)
    return paths, log_probs(log_policy, paths.states).sum(1)


def dpo(problem: Problem, seed: int, *, updates: int = 400, batch: int = 2048) -> Tensor:
    """Pairs of the pretrained model, with the probability that Bradley and Terry's model gives the first. An error is -2 log p, as a Gaussian's squared
    one is."""

    def loss(log_policy: Tensor, generator: torch.Generator) -> Tensor:
        paths, own = drawn(problem, log_policy, batch, generator)
        errors, references, rewards = -2 * own, -2 * paths.log_prob.sum(1), problem.reward[paths.final]
        w, l_ = slice(0, batch // 2), slice(batch // 2, None)
        label = torch.sigmoid(rewards[w] - rewards[l_])
        return diffusion_dpo_loss(errors[w], errors[l_], references[w], references[l_], beta=problem.beta, label=label).mean()

    return learn(problem, loss, seed, updates=updates)


def liked(problem: Problem) -> Tensor:
    """The probability (G,) that a sample is liked: sigma(r - V*), one half where the reward is what the aligned model is worth."""
    return torch.sigmoid(problem.reward - problem.value)


def kto(problem: Problem, seed: int, *, utility: str, kind: str = "zero", updates: int = 600, batch: int = 2048) -> Tensor:
    """Single samples that are liked with the probability `liked`."""
    point = ReferencePoint(kind)

    def loss(log_policy: Tensor, generator: torch.Generator) -> Tensor:
        paths, own = drawn(problem, log_policy, batch, generator)
        reference, y = -paths.log_prob.sum(1), liked(problem)[paths.final]
        return kto_loss(-own, reference, y, point(reference + own), beta=problem.beta, utility=utility).mean()

    return learn(problem, loss, seed, updates=updates, learning_rate=0.2)


def kto_optimum(problem: Problem) -> Tensor:
    r"""What the S-shaped utility is best served by, (G,): of all $p = p_{ref}\, e^{z / \beta}$ that sum to 1 the one with the largest
    $\mathbb E_{ref}[(2y - 1)\, \sigma(z)]$. Disliked samples have no mass; the others solve $(2y - 1)\, \sigma'(z)\, e^{-z / \beta} = \mu$, in which the
    left side falls with z for beta up to 1. It is not p*."""
    y = liked(problem)
    wanted = y > 0.5

    def tilt(log_mu: Tensor) -> Tensor:
        low, high = torch.full_like(y, -60.0), torch.full_like(y, 60.0)
        for _ in range(80):
            z = (low + high) / 2
            left = (2 * y - 1).clamp(min=1e-300).log() + F.logsigmoid(z) + F.logsigmoid(-z) - z / problem.beta
            low, high = torch.where(left > log_mu, z, low), torch.where(left > log_mu, high, z)
        return problem.reference * (z / problem.beta).exp() * wanted

    low, high = torch.tensor(-200.0), torch.tensor(200.0)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if tilt(middle).sum() > 1 else (low, middle)
    return tilt(middle) / tilt(middle).sum()


def reward_weighted(problem: Problem, seed: int, *, updates: int = 300, batch: int = 4096) -> Tensor:
    """Paths weighted by exp(r / beta); an error is -log p."""

    def loss(log_policy: Tensor, generator: torch.Generator) -> Tensor:
        paths, own = drawn(problem, log_policy, batch, generator)
        return reward_weighted_loss(-own, reward_weights(problem.reward[paths.final], temperature=problem.beta)).mean()

    return learn(problem, loss, seed, updates=updates)
