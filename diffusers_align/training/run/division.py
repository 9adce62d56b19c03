"""How an epoch's samples are divided: into optimizer steps, the same on any number of processes, and each step into processes and their batches.

The samples of an epoch have positions 0 to N - 1. An optimizer step takes `--train_batch_size` times `--gradient_accumulation_steps` of
them in order, of all processes together. Each process takes an equal share of every step, one stretch of positions, in batches of at most
`--train_batch_size`. So the number of processes changes neither how many steps an epoch has nor which samples make a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Division:
    """An epoch's division, as one of `world` processes sees it.

    Attributes:
        num_samples: of an epoch, on all processes.
        step_size: of an optimizer step, on all processes; the last step of an epoch may have fewer.
        batch_size: most samples at a time on one process.
    """

    num_samples: int
    step_size: int
    batch_size: int
    rank: int = 0
    world: int = 1

    @property
    def num_steps(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self.num_samples // self.step_size)

    def step(self, number: int) -> range:
        """The positions of an optimizer step's samples, on all processes."""
        return range(number * self.step_size, min(self.num_samples, (number + 1) * self.step_size))

    @property
    def batches_a_step(self) -> int:
        """This process's batches of a full optimizer step."""
        return -(-(self.step_size // self.world) // self.batch_size)

    @cached_property
    def batches(self) -> list[range]:
        """The positions of the samples of each of this process's batches, step after step."""
        return [batch for number in range(self.num_steps) for batch in self._share(self.step(number))]

    def _share(self, step: range) -> Iterator[range]:
        """This process's part of a step, in as few batches as there can be, of sizes that differ by one at most."""
        size = len(step) // self.world
        number, start = -(-size // self.batch_size), step.start + self.rank * size
        for i in range(number):
            yield range(start + size * i // number, start + size * (i + 1) // number)

    def step_of(self, batch: int) -> int:
        """The number of the optimizer step that one of this process's batches belongs to."""
        return self.batches[batch].start // self.step_size

    def block(self, batch: int) -> int:
        """Which `batch_size` samples of the epoch a batch begins in: what is drawn once a batch goes by it, so that batches which are parts
        of one block, on several processes, draw the same."""
        return self.batches[batch].start // self.batch_size


def divide(args, num_samples: int, steps: int, rank: int, world: int) -> tuple[Division, str]:
    """The division that the flags ask for, and what had to be changed for so many processes, in words ("" if nothing).

    Args:
        steps: optimizer steps per epoch where `--gradient_accumulation_steps` does not say.

    Raises:
        ValueError: the samples do not divide into equal batches, or not among the processes; the message lists sizes that fit.
    """
    batch_size = args.train_batch_size
    if num_samples % batch_size:
        fitting = ", ".join(map(str, _nearest(divisors(num_samples), batch_size)))
        raise ValueError(
            f"{num_samples} samples per epoch ({_asked(args)}) do not divide into batches of {batch_size}. Change --train_batch_size to one that fits "
            f"({fitting}), or the number of samples to a multiple of {batch_size}."
        )
    if num_samples % world:
        below = num_samples // world * world
        raise ValueError(
            f"{num_samples} samples per epoch ({_asked(args)}) do not divide among {world} processes. Take {f'{below} or ' if below else ''}{below + world} "
            f"samples, or another number of processes ({', '.join(map(str, _nearest(divisors(num_samples), world)))})."
        )
    size = step_size(num_samples, batch_size, args.gradient_accumulation_steps, steps)
    shared = -(-size // world) * world
    division = Division(num_samples, shared, batch_size, rank, world)
    return division, "" if shared == size else _change(args, division, size, steps)


def division_of(run, num_samples: int) -> Division:
    """The run's own (`Run.batches`), or, for another number of samples than its epochs have, one of a single optimizer step."""
    own = getattr(run, "division", None)
    if own is not None and own.num_samples == num_samples:
        return own
    return divide(run.args, num_samples, 1, run.accelerator.process_index, run.accelerator.num_processes)[0]


def step_size(num_samples: int, batch_size: int, accumulation: int | None, steps: int) -> int:
    """Samples of an optimizer step: `accumulation` batches of one process, or what makes `steps` an epoch."""
    number = num_samples // batch_size
    return batch_size * min(number, accumulation or -(-number // steps))


def _change(args, division: Division, wanted: int, steps: int) -> str:
    number, world, accumulation = division.num_samples, division.world, args.gradient_accumulation_steps
    fitting = [size for size in divisors(number) if step_size(number, size, accumulation, steps) % world == 0]
    advice = f"take --train_batch_size {' or '.join(map(str, _nearest(fitting, division.batch_size)))}" if fitting else "change the number of samples"
    return (
        f"Changed for {world} processes: an optimizer step of {wanted} samples (--train_batch_size {division.batch_size} times "
        f"--gradient_accumulation_steps {wanted // division.batch_size}) does not divide among them. Here it has {division.step_size}, and an epoch "
        f"{division.num_steps} steps where one process makes {-(-number // wanted)}. For the same steps on any of these numbers, {advice}."
    )


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _nearest(sizes: list[int], wanted: int) -> list[int]:
    """At most four of `sizes` about `wanted`, in order."""
    return sorted(sorted(sizes, key=lambda size: abs(size - wanted))[:4])


def _asked(args) -> str:
    """The flags that say how many samples an epoch has."""
    names = ("num_samples_per_epoch", "num_prompts_per_epoch", "group_size")
    return " times ".join(f"--{name} {getattr(args, name)}" for name in names if getattr(args, name, None)) or "as the script has it"


def sample_weight(run, batches: range) -> float:
    """What makes the sum over the samples of an optimizer step's batches, on all processes, their mean."""
    return 1 / (sum(len(run.division.batches[b]) for b in batches) * run.accelerator.num_processes)


def epoch_batches(run) -> Iterator[tuple[range, float]]:
    """This process's batches of each optimizer step, and their `sample_weight`."""
    for batches in run.chunks(run.num_batches, run.division.batches_a_step):
        yield batches, sample_weight(run, batches)
