"""Discrete Adjoint Matching on a masked diffusion of short words whose every probability is known.

    python benchmarks/discrete_adjoint_matching.py

The base writes words of `LENGTH` letters: an unmasked position is drawn uniformly, its letter from the exact conditional of a random
joint distribution. The energy dislikes a letter. A small network starts as the base and is trained on its own samples; the exact law of
its words is compared with the tilted one, p_base e^-g / Z.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor, nn

from diffusers_align.algorithms.discrete_adjoint_matching import generalized_kl_loss, log_adjoint, log_weight

LETTERS, LENGTH = 3, 3
MASK = LETTERS
WORDS = torch.tensor(list(itertools.product(range(LETTERS), repeat=LENGTH)))
STATES = torch.tensor(list(itertools.product(range(LETTERS + 1), repeat=LENGTH)))
PLACES = torch.tensor([(LETTERS + 1) ** i for i in reversed(range(LENGTH))])


def number(states: Tensor) -> Tensor:
    """Positions (B,) of states (B, LENGTH) in `STATES`."""
    return (states * PLACES).sum(-1)


def after(states: Tensor) -> Tensor:
    """(B, LENGTH * LETTERS, LENGTH): the states with one position set to one letter."""
    moved = states[:, None].repeat(1, LENGTH * LETTERS, 1)
    for edge in range(LENGTH * LETTERS):
        moved[:, edge, edge // LETTERS] = edge % LETTERS
    return moved


class Base:
    """The exact base: a joint law of words, its conditionals, and its values under an energy."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.law = (1.5 * torch.randn(len(WORDS), generator=generator, dtype=torch.float64)).softmax(0)
        self.fits = ((STATES[:, None] == WORDS) | (STATES[:, None] == MASK)).all(-1).double()
        self.completions = self.fits * self.law / (self.fits * self.law).sum(1, keepdim=True)  # p(word | state)

    def log_rates(self, states: Tensor) -> Tensor:
        """(B, LENGTH * LETTERS): log of 1 / (masks left) times the letter's probability, -inf where there is no mask."""
        there = torch.stack([(WORDS[:, edge // LETTERS] == edge % LETTERS).double() for edge in range(LENGTH * LETTERS)], 1)
        letters = self.completions[number(states)] @ there
        masked = (states == MASK).repeat_interleave(LETTERS, 1)
        return torch.where(masked, (letters / (states == MASK).sum(1, keepdim=True).clamp(min=1)).log(), -torch.inf)


class Model(nn.Module):
    """The base's rates times what a small network says of each position; their sum at a position is the base's."""

    def __init__(self, base: Base):
        super().__init__()
        self.base = base
        self.layers = nn.Sequential(nn.Linear(LENGTH * (LETTERS + 1), 64), nn.Tanh(), nn.Linear(64, LENGTH * LETTERS)).double()
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, states: Tensor) -> Tensor:
        base = self.base.log_rates(states)
        masked, said = states == MASK, self.layers(nn.functional.one_hot(states, LETTERS + 1).flatten(1).double())
        logits = torch.where(masked[..., None], base.unflatten(1, (LENGTH, LETTERS)), 0.0) + said.unflatten(1, (LENGTH, LETTERS))
        rates = logits.log_softmax(-1) - masked.sum(1).clamp(min=1).log()[:, None, None]
        return torch.where(masked[..., None], rates, -torch.inf).flatten(1)


@torch.no_grad()
def law_of(log_rates) -> Tensor:
    """The exact law of words (len(WORDS),) of the chain with these rates: probabilities flow along the edges until no mask is left."""
    mass = torch.zeros(len(STATES), dtype=torch.float64)
    mass[number(torch.full((1, LENGTH), MASK))] = 1
    rates, target = log_rates(STATES).exp(), number(after(STATES))
    for _ in range(LENGTH):
        moved = torch.zeros_like(mass).index_add(0, target.flatten(), (mass[:, None] * rates).flatten())
        mass = moved + mass * (STATES != MASK).all(1)
    return mass[number(WORDS)]


@torch.no_grad()
def sample(model: Model, count: int, generator: torch.Generator) -> Tensor:
    """(LENGTH + 1, count, LENGTH): states on the way from masks to words."""
    states = [torch.full((count, LENGTH), MASK)]
    for _ in range(LENGTH):
        edge = torch.multinomial(model(states[-1]).exp(), 1, generator=generator)
        states.append(after(states[-1]).gather(1, edge[..., None].expand(-1, -1, LENGTH))[:, 0])
    return torch.stack(states)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats."""
    return float((p * (p.log() - q.log())).sum())


def train(energy: Tensor, updates: int, batch: int, completions: int, seed: int = 0) -> tuple[float, float]:
    """KL of the model's words from the tilted law, before and after."""
    base, generator = Base(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Model(base)
    tilted = (base.law.log() - energy).softmax(0)
    before = kl(law_of(model), tilted)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    of_word = torch.full((len(STATES),), torch.nan, dtype=torch.float64).index_put((number(WORDS),), energy)
    for _ in range(updates):
        path = sample(model, batch, generator)
        states, final = path[:-1].flatten(0, 1), path[-1].repeat(LENGTH, 1)
        ends = base.completions[number(after(states))]
        drawn = torch.multinomial(ends.flatten(0, 1), completions, replacement=True, generator=generator).unflatten(0, ends.shape[:2])
        adjoint = log_adjoint(log_weight(energy[drawn]), log_weight(of_word[number(final)])[:, None])
        loss = generalized_kl_loss(model(states), base.log_rates(states), adjoint).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return before, kl(law_of(model), tilted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--batch", type=int, default=256, help="words sampled for an update")
    parser.add_argument("--completions", type=int, default=16, help="of each edge, by the base")
    args = parser.parse_args()
    before, after_training = train((WORDS == 0).sum(1).double(), args.updates, args.batch, args.completions)
    print(f"KL of the words from the tilted law: {before:.4f} nats before, {after_training:.2e} after {args.updates} updates")


if __name__ == "__main__":
    main()
