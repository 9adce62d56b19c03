"""The loop of the scripts that fine-tune a pipeline on a data set (DPO, DSPO, KTO, RWR): what they set up alike, and what is kept of each optimizer step.

```python
training = OfflineTraining(run, load_rows(run, "pair"))
for step in training.steps():
    for b in step.batches:
        ...  # examples, the reference, the loss: the script's own
```
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...policy import Policy
from ..report.report import Report
from ..run.division import epoch_batches
from .data_latents import disk_cache
from .descent import Reference
from .pairs_and_batches import Examples


def load_policy(run, batches_in_turn: int = 1) -> Policy:
    """The run's policy, remembering the prompts of as many batches as are visited in turn, and with `--cache_dir` every prompt's on disk."""
    policy = run.load_policy()
    policy.remember_prompts(2 * batches_in_turn + 2, disk_cache(run.args, policy, "prompts"))
    return policy


@dataclass(frozen=True)
class Step:
    """An optimizer step.

    Attributes:
        batches: numbers of this process's batches in the epoch.
        weight: makes the sum over its samples, on all processes, their mean.
        logged: the epoch's numbers by name, of which the mean is logged.
    """

    epoch: int
    batches: range
    weight: float
    logged: dict[str, list[float]]

    def log(self, **numbers: float) -> None:
        """Numbers of a batch, for the epoch's means."""
        for name, number in numbers.items():
            self.logged[name].append(number)


class OfflineTraining:
    """A run on a data set: pipeline, examples, reference and report.

    Args:
        run: after its `batches`.
        rows: of the data set.
        reference_decay: as `Reference` has it.
        batches_in_turn: as `load_policy` has it.
        examples: other arguments of `Examples`.
    """

    def __init__(self, run, rows: list[dict], *, reference_decay: float | None = None, batches_in_turn: int = 1, **examples: Any):
        self.run, self.report = run, Report(run, rows)
        self.policy = load_policy(run, batches_in_turn)
        self.examples, self.reference = Examples(run, self.policy, rows, **examples), Reference(run, self.policy, reference_decay)

    @property
    def is_flow(self) -> bool:
        """Whether the model is one of flow matching, for defaults that differ."""
        return self.examples.noising.forward.is_flow

    def steps(self, **constants: float) -> Iterator[Step]:
        """The optimizer steps of all epochs. The loop's body adds gradients; when it comes back for the next step, the weights are updated,
        and after an epoch's last the numbers are logged and the model validated. Resumes and evaluates before the first, evaluates and
        saves after the last.

        Args:
            constants: numbers of every epoch's line.
        """
        run = self.run
        run.load_optimizer(run.args.num_epochs * run.division.num_steps)
        run.resume()
        self.report.start()
        for epoch in run.epochs():
            norms, logged = [], defaultdict(list)
            self.policy.expect_prompts(self.examples.captions([place for b in range(run.num_batches) for place in self.examples.positions(epoch, b)]))
            for batches, weight in epoch_batches(run):
                yield Step(epoch, batches, weight, logged)
                norms.append(run.optimizer_step())
                self.reference.follow()
            run.log(run.epoch_metrics(None, [], norms, logged) | constants)
            self.report.validate(epoch)
        self.report.finish()
