"""A training that may be killed at any time: a constant rate without an end, and a short decay from wherever it stands.

The schedule is warm-up, stable, decay (https://arxiv.org/abs/2404.06395). The stable part writes its state every few minutes and goes
on from it bit by bit: each update draws from a generator seeded with its own number. The decay starts at that state and leaves it as it
is, so a model can be taken at any time and the training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .latents import write_safely
from .muon import AdamW, Muon, split

WARM_UP = 100


class Training:
    """Modules with their two optimizers, an average of their weights, and the number of updates they have had.

    rates: learning rates of Muon and of AdamW. memory: updates that the average looks back on, once there are so many.
    """

    def __init__(self, modules: list[nn.Module], rates: tuple[float, float], memory: int = 1000):
        inner, rest = split(modules)
        self.weights, self.rates, self.memory = inner + rest, rates, memory
        self.optimizers = (Muon(inner, rates[0]), AdamW(rest, rates[1]))
        self.average = [weight.detach().clone() for weight in self.weights]
        self.updates = self.averaged = 0

    def update(self, loss_fn: Callable[[], Tensor], factor: float) -> float:
        """One update at `factor` times the rates; returns the loss. All that `loss_fn` draws belongs to this update's number."""
        torch.manual_seed(self.updates)
        loss = loss_fn()
        for weight in self.weights:
            weight.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.set_rate(rate * factor * min(1, (self.updates + 1) / WARM_UP))
            optimizer.step()
        self.updates += 1
        self.averaged += 1
        decay = min(1 - 1 / self.memory, (1 + self.averaged) / (10 + self.averaged))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [weight.detach() for weight in self.weights], 1 - decay)
        return loss.item()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average."""
        for weight, average in zip(self.weights, self.average):
            held = weight.detach().clone()
            weight.copy_(average)
            average.copy_(held)

    def write(self, file: Path) -> None:
        """The whole state, at `file`."""
        tensors = {"updates": torch.tensor(self.updates), "averaged": torch.tensor(self.averaged)}
        for i, (weight, average) in enumerate(zip(self.weights, self.average)):
            tensors |= {f"weight.{i}": weight.detach(), f"average.{i}": average}
        for name, optimizer in zip(("muon", "adamw"), self.optimizers):
            for i, state in enumerate(optimizer.state()):
                tensors |= {f"{name}.{i}.{key}": value for key, value in state.items()}
        write_safely({key: value.contiguous() for key, value in tensors.items()}, file)

    @torch.no_grad()
    def read(self, file: Path) -> None:
        """Go on from a state that `write` left."""
        tensors = load_file(file)
        self.updates, self.averaged = int(tensors["updates"]), int(tensors["averaged"])
        for i, (weight, average) in enumerate(zip(self.weights, self.average)):
            weight.copy_(tensors[f"weight.{i}"])
            average.copy_(tensors[f"average.{i}"])
        for name, optimizer in zip(("muon", "adamw"), self.optimizers):
            for i, state in enumerate(optimizer.state()):
                prefix = f"{name}.{i}."
                state.update({key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)})


def state_file(folder: Path, name: str) -> Path:
    """Where a training keeps its state."""
    return folder / f"{name}.state.safetensors"


def shorten(file: Path, target: Path) -> None:
    """A state of half the length, to be kept: weights and average in float16, moments in bfloat16. What goes on from it is close, not equal."""

    def short(name: str, value: Tensor) -> Tensor:
        if value.numel() == 1:
            return value
        return value.half() if name.startswith(("weight.", "average.")) else value.bfloat16()

    write_safely({name: short(name, value) for name, value in load_file(file).items()}, target)


def train_on(name: str, training: Training, loss_fn, save, folder: Path, minutes: float, decay: bool = False, write_every: float = 180) -> None:
    """Train for so many minutes of this process's own time, from the state in `folder` if there is one.

    Without `decay` the rate stays, and the state is written every `write_every` seconds and at the end. With it the rate falls linearly
    to zero over the minutes, and the state stays as it was. At the end `save()` is called with the average in place of the weights.
    """
    file, budget = state_file(folder, name), 60 * minutes
    if file.exists():
        training.read(file)
    print(f"{name}: {sum(w.numel() for w in training.weights) / 1e6:.2f} M parameters, from update {training.updates}", flush=True)
    if decay:
        # The average over a decay need not look back far.
        training.averaged, training.memory = 0, 100
    first, started, written, mean = training.updates, time.process_time(), time.monotonic(), None
    while (used := time.process_time() - started) < budget:
        loss = training.update(loss_fn, 1 - used / budget if decay else 1.0)
        mean = loss if mean is None else 0.99 * mean + 0.01 * loss
        if training.updates % 100 == 0:
            print(f"{name} update {training.updates}, {used:.0f} CPU s: loss {mean:.4f}", flush=True)
        if not decay and time.monotonic() - written > write_every:
            written = time.monotonic()
            training.write(file)
    if not decay and training.updates > first:
        training.write(file)
    training.swap()
    save()
    training.swap()
