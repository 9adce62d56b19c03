r"""Diffusion-KTO: learning from likes and dislikes of single images (https://arxiv.org/abs/2404.04465).

No pairs are needed: an image is desirable or not. How much better than the reference the model denoises it stands for an implicit
reward; people value rewards against a point of reference, with a utility that flattens for gains and for losses, and the model
maximises the utility, of the negative for undesirable images:

$$ L = \lambda_y\big(1 - U(\pm z)\big), \qquad z = \beta\,(g - Q), \qquad g = L_{ref} - L_\theta, \qquad Q = \max(0, \overline{g}) $$

Utilities: `kahneman_tversky`, sigma(z), S-shaped, the paper's best; `loss_averse`, log sigma(z), concave, close to DPO;
`risk_seeking`, -log sigma(-z), convex; `logistic`, the binary classifier -[y log sigma(z) + (1 - y) log sigma(-z)], which has the gradient of `loss_averse` and
is 0 when all is learned. Labels y may be probabilities.

There is no factor 1/2 here: beta 5000 (paper; the command line of the official code has 1000) has the logit scale of Diffusion-DPO at 10000, and, the utility
being bounded and the mean over single images, its gradient at 2500.

Against the official code (jacklishufan/diffusion-kto, 226bbd0): the losses are the same, as are the reference points `batch_mean` (its
default), `class_mean` and `mismatched` (with `clamp=False` for these two, as there). Its `class_mean` (`bce_offset="sigmoid"`) counts a class
that a batch lacks as a mean of 0, which halves Q, and averages the processes' means; ours is of the classes that are there, over all
processes. The paper's Q is `mismatched`: gains under other samples' prompts, at the price of a second forward pass. `ema` is a running mean, for
single-image batches; `zero` leaves the point out.

Logged: `gain_desirable`, `gain_undesirable`, mean g of either class; `reference_point`, Q; `accuracy`, the share of images on their side of Q
(ties half); `gradient_weight`, mean of 4 sigma'(z), 1 at first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rl.importance import refuse_spread
from ..rl.matching import check_errors

# What is lost at the signed logit: 1 - U.
UTILITY_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "kahneman_tversky": lambda z: torch.sigmoid(-z),
    "loss_averse": lambda z: 1 - F.logsigmoid(z),
    "risk_seeking": lambda z: 1 + F.logsigmoid(-z),
    "logistic": lambda z: -F.logsigmoid(z),
}
REFERENCE_POINTS = ("batch_mean", "class_mean", "mismatched", "ema", "zero")


def kto_loss(
    error: Tensor,
    ref_error: Tensor,
    desirable: Tensor,
    reference_point: Tensor | float,
    *,
    beta: float,
    utility: str = "kahneman_tversky",
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
) -> Tensor:
    """The loss of each image, (B,).

    Args:
        error, ref_error: (B,) mean squared errors of model and reference at the same noise and timestep; the second without gradient.
        desirable: (B,) bool, or the probability that the image is desirable.
        reference_point: Q, `ReferencePoint`, without gradient.
        beta: on the mean over dimensions, without a factor 1/2; 5000 in the paper.
        utility: of the page above.
        lambda_d, lambda_u: weights of the classes, both 1 in the official code. KTO (https://arxiv.org/abs/2402.01306)
            advises lambda_d n_d / (lambda_u n_u) in [1, 4/3]: `describe_balance`.

    Raises:
        TypeError: errors in half precision.
        ValueError: an unknown utility, a label that is no probability, or numbers that are not one a sample, of the same samples.
    """
    check_errors(error, ref_error)
    refuse_spread(error, desirable=desirable)
    if utility not in UTILITY_LOSSES:
        raise ValueError(f"Unknown utility {utility!r}; choose one of {', '.join(UTILITY_LOSSES)}.")
    y = desirable.to(error.dtype)
    if not bool(((y >= 0) & (y <= 1)).all()):
        raise ValueError("`desirable` is True or False, or a probability in [0, 1].")
    z, loss = beta * (ref_error - error - reference_point), UTILITY_LOSSES[utility]
    return y * lambda_d * loss(z) + (1 - y) * lambda_u * loss(-z)


class ReferencePoint:
    """Q, to which gains are compared: a number without gradient, the same on all processes.

    Args:
        kind: `batch_mean`, the mean gain of the batch; `class_mean`, the mean of the two classes' means, so that their shares do
            not matter; `mismatched`, the mean gain of images under other images' prompts, the KL divergence's estimate of KTO;
            `ema`, a running batch mean that starts at the reference's 0; `zero`.
        decay: of `ema`; 0.99 is our choice, a memory of a hundred batches.
        clamp: no less than 0, like the KL divergence that it estimates (official code, for `batch_mean`).

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: str = "batch_mean", *, decay: float = 0.99, clamp: bool = True):
        if kind not in REFERENCE_POINTS:
            raise ValueError(f"Unknown reference point {kind!r}; choose one of {', '.join(REFERENCE_POINTS)}.")
        self.kind, self.decay, self.clamp, self.running = kind, decay, clamp, 0.0

    @torch.no_grad()
    def __call__(
        self,
        gain: Tensor,
        desirable: Tensor | None = None,
        *,
        mismatched_gain: Tensor | None = None,
        reduce: Callable[[Tensor], Tensor] = lambda total: total,
    ) -> Tensor:
        """The reference point for a batch, a scalar like `gain`; `ema` takes the batch in first.

        Args:
            gain: (B,) error of the reference minus that of the model, over all micro-batches of an update.
            desirable: (B,), for `class_mean`; an image counts in either class by its label.
            mismatched_gain: (B,), for `mismatched`.
            reduce: sums a tensor over all processes, as `accelerator.reduce(x, "sum")` does; on one process nothing is to be done.

        Raises:
            ValueError: what the kind needs is missing, or the batch is of one image only.
        """
        gain = gain.detach()
        if self.kind == "zero":
            return torch.zeros_like(gain[0])
        if self.kind == "mismatched":
            point = _mean(_given(mismatched_gain, "mismatched_gain", self.kind).detach(), reduce, self.kind)
        elif self.kind == "class_mean":
            point = _class_mean(gain, _given(desirable, "desirable", self.kind).to(gain.dtype), reduce)
        else:
            point = _mean(gain, reduce, self.kind)
        if self.kind == "ema":
            self.running = self.decay * self.running + (1 - self.decay) * float(point)
            point = torch.full_like(point, self.running)
        return point.clamp(min=0) if self.clamp else point

    def state_dict(self) -> dict[str, float]:
        return {"running": self.running}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.running = float(state["running"])


def _mean(gain: Tensor, reduce: Callable[[Tensor], Tensor], kind: str) -> Tensor:
    total, count = reduce(torch.stack([gain.sum(), torch.full_like(gain[0], len(gain))]))
    if kind != "ema":
        _refuse_one_image(count, kind)
    return total / count


def _class_mean(gain: Tensor, desirable: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the classes that the batch holds, the mean of their means."""
    weights = torch.stack([desirable, 1 - desirable])
    totals, counts = reduce(torch.stack([weights @ gain, weights.sum(1)]))
    _refuse_one_image(counts.sum(), "class_mean")
    return (totals / counts)[counts > 0].mean()


def _refuse_one_image(count: Tensor, kind: str) -> None:
    if count < 2:
        raise ValueError(
            f"A batch of one image cannot be its own reference point ({kind}): its gain minus the mean is 0 whatever it has learned, so "
            "its loss never fades, and it has no other image's prompt. Have more images in a batch, or choose ema or zero."
        )


def _given(value: Tensor | None, name: str, kind: str) -> Tensor:
    if value is None:
        raise ValueError(f"The reference point {kind} needs `{name}`.")
    return value


@torch.no_grad()
def kto_metrics(error: Tensor, ref_error: Tensor, desirable: Tensor, reference_point: Tensor | float, *, beta: float) -> dict[str, float]:
    """The logged numbers of the page above, over the images (B,); a class that the batch lacks has no gain."""
    gain, liked = (ref_error - error).double(), desirable.double() > 0.5
    z = beta * (gain - reference_point)
    metrics = {
        "reference_point": float(reference_point),
        "accuracy": float((0.5 * (torch.where(liked, z, -z).sign() + 1)).mean()),
        "gradient_weight": float((4 * torch.sigmoid(z) * torch.sigmoid(-z)).mean()),
    }
    classes = {"gain_desirable": gain[liked], "gain_undesirable": gain[~liked]}
    return metrics | {name: float(own.mean()) for name, own in classes.items() if len(own)}


def describe_balance(desirable: int, undesirable: int, lambda_d: float = 1.0, lambda_u: float = 1.0) -> str:
    """The balance of the classes, with a warning outside KTO's advice and the lambda_d that would mend it."""
    text = f"{desirable} desirable and {undesirable} undesirable images"
    if not desirable or not undesirable:
        return text + "; one class alone only moves the model towards its images, or away from them"
    if not lambda_d or not lambda_u:
        return text + f", of which the {'desirable' if not lambda_d else 'undesirable'} weigh nothing"
    balance = lambda_d * desirable / (lambda_u * undesirable)
    text += f", weighing {balance:.3g} to 1"
    if 1 <= balance <= 4 / 3:
        return text
    if abs(balance - 4) < 0.5:
        return text + ", as in Diffusion-KTO (gamma 0.8)"
    return text + f"; KTO advises 1 to 4/3 (https://arxiv.org/abs/2402.01306): lambda_d {lambda_u * undesirable / desirable:.3g} gives 1"
