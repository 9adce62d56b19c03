"""The loop of the scripts that differentiate the reward: what they set up alike, the batches of each update, and what is kept of it.

```python
training = RewardTraining(run)
num_steps = training.check_reward()
for update in training.updates():
    for batch in update.batches:
        ...  # which steps carry the gradient, the roll-out, the loss: the script's own
        training.descend(update, batch, rollout, rewards, loss)
```

Whatever is random about an update follows from (seed, epoch, position): a sample's noise from its own position, the choice of steps
from the update's. So all processes make the same denoiser calls, and the result depends on neither their number nor what came before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...condition import Condition
from ...data.prompts import Prompt, prompts_of_epoch
from ...gradients.rollout import DifferentiableRollout
from ...policy import Policy, noise_seed
from ..flags.methods import RewardGradientArguments
from ..report.report import Report
from ..run.division import division_of, epoch_batches
from ..run.inputs import condition_of
from .bound_rewards import BoundReward, bound_reward
from .epoch_log import EpochLog, GradientClip
from .losses import reward_map, scored_sum, total_loss
from .pretraining import Pretraining
from .reward_check import check_on_prompts


def checkpoint_options(args: RewardGradientArguments) -> dict[str, bool | None]:
    """What is computed again on the way back."""
    return {"checkpoint": args.checkpoint_steps, "decode_checkpoint": args.checkpoint_decoder}


@dataclass(frozen=True)
class Batch:
    """B samples to be rolled out.

    Attributes:
        condition: the call, with its seeds.
        asked: prompts with the data set's other fields.
        reward: images (B, 3, H, W) or (B, F, 3, H, W) in [0, 1] to (B,), NaN where it is masked.
    """

    condition: Condition
    asked: list[Prompt]
    reward: BoundReward


@dataclass(frozen=True)
class Update:
    """One optimizer step.

    Attributes:
        batches: this process's, each to be rolled out with the current weights.
        numbers: theirs in the epoch.
        generator: what the method draws for the step, the same on all processes and for all its batches.
        weight: makes the sum over its samples, on all processes, their mean.
    """

    batches: list[Batch]
    numbers: range
    generator: torch.Generator
    weight: float


def updates_of_epoch(run, policy: Policy, report, epoch: int) -> Iterator[Update]:
    """The optimizer steps of an epoch, after the run's `batches`."""
    args = run.args
    chosen = prompts_of_epoch(report.prompts, args.num_samples_per_epoch, args.seed, epoch)
    parts = division_of(run, args.num_samples_per_epoch).batches
    run.meter.count_images(sum(map(len, parts)))
    policy.expect_prompts(report.prompts[chosen[i]].text for part in parts for i in part)

    def batch(b: int) -> Batch:
        places = parts[b]
        asked = [report.prompts[chosen[i]] for i in places]
        condition = condition_of(policy, asked, seeds=[noise_seed(args.seed, epoch, i, chosen[i]) for i in places])
        return Batch(condition, asked, bound_reward(report.reward, asked, args, policy))

    for number, (chunk, weight) in enumerate(epoch_batches(run)):
        generator = torch.Generator().manual_seed(noise_seed(args.seed, epoch, "update", number))
        yield Update([batch(b) for b in chunk], chunk, generator, weight)


class RewardTraining:
    """A run that descends a differentiable reward: report, pipeline and optimizer, resumed.

    Attributes:
        reward_map: of the flags, for the loss of the algorithm's page.
        rollout_options: arguments of every `differentiable_rollout` of the run.
        logged: the `EpochLog` of the epoch.
    """

    def __init__(self, run):
        args, self.run = run.args, run
        run.batches(args.num_samples_per_epoch)
        self.report, self.pretraining = Report(run), Pretraining(run)
        self.policy = run.load_policy(**({} if args.eta is None else {"eta": args.eta}))
        self.clip, self.logged, self.reward_map = GradientClip(run), EpochLog(), reward_map(args)
        self.rollout_options = {"stochastic": args.stochastic, **checkpoint_options(args)}
        run.load_optimizer(args.num_epochs * run.division.num_steps)
        run.resume()

    def check_reward(self, **options: Any) -> int:
        """Whether a reward's gradient comes through the last step. Returns the number of solver steps.

        Raises:
            GradientError: it does not; the message names the component that cuts it.
            InvalidReward: none of the first prompts could be scored.
        """
        return check_on_prompts(self.run, self.policy, self.report, **self.rollout_options, **options)

    def updates(self) -> Iterator[Update]:
        """The updates of all epochs. The loop's body adds gradients; when it comes back for the next one, those of the pre-training loss are
        added and the weights are updated, and after an epoch's last the numbers are logged and the model validated. Evaluates before the
        first, evaluates and saves after the last."""
        run = self.run
        self.report.start()
        for epoch in run.epochs():
            self.logged = EpochLog()
            for update in updates_of_epoch(run, self.policy, self.report, epoch):
                yield update
                self.pretraining.descend(self.policy, epoch, update.numbers, self.logged)
                self.logged.norms.append(self.clip.step())
            run.log(self.logged.metrics(run, self.report))
            self.report.validate(epoch)
        self.report.finish()

    def descend(self, update: Update, batch: Batch, rollout: DifferentiableRollout, rewards: Tensor, loss: Tensor) -> None:
        """Add the gradient of a batch's loss (B,), and of `--kl_weight` times its distance to the pretrained model, to the parameters'; log the
        rewards (B,)."""
        with self.run.accelerator.autocast():
            loss = total_loss(self.policy, rollout, loss, self.run.args, self.logged)
        self.run.accelerator.backward(scored_sum(loss) * update.weight)
        self.logged.add_rewards(batch, rewards, self.run.args)
