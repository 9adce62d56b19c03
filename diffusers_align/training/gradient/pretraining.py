r"""The model's own training loss on captioned images, beside a reward's: it keeps what the model knows while the reward pulls.

$$ L = L_{\text{reward}} + w\, \mathbb E_{(x_0, c),\, t,\, \epsilon}\, \lVert f_\theta(x_t, t, c) - f^*(x_0, \epsilon, t) \rVert^2 $$

with f* what a perfect model would answer, in the model's own terms. Source: ReFL (https://arxiv.org/abs/2304.05977), whose objective
is L_pre + lambda L_reward: lambda is `--reward_scale` here. Its released code has no such term.

Logged: `pretrain_loss`, without its weight.
"""

from __future__ import annotations

from ...policy import Policy
from ..offline.descent import descend
from ..offline.pairs_and_batches import Examples
from ..offline.rows import load_captioned
from ..run.division import sample_weight


class Pretraining:
    """The loss of one run. Made before the pipeline is loaded: a data set that does not exist is found at once."""

    def __init__(self, run):
        self.run, self.examples = run, None
        self.rows = load_captioned(run, run.args.pretrain_dataset_name) if run.args.pretrain_weight else []

    def descend(self, policy: Policy, epoch: int, batches: range, logged: dict[str, list[float]]) -> None:
        """Add the gradient at one optimizer step to the parameters': a batch of images for each of the step's own `batches`, which
        tell the images and their noise. Nothing without images, or with weight 0."""
        if not self.rows:
            return
        if self.examples is None:
            self.examples = Examples(self.run, policy, self.rows, "pretraining")
        weight = self.run.args.pretrain_weight * sample_weight(self.run, batches)
        for b in batches:
            _, noised = self.examples.batch(epoch, b)
            loss, _ = descend(self.run, policy, lambda own: own.error, [noised], weight)
            logged["pretrain_loss"].append(loss.mean().item())
