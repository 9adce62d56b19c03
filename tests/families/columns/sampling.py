"""Stock call, policy, roll-out and replay."""

from __future__ import annotations

import torch

from ..cell import DoesNotApply, require
from ..column import Column
from ..subject import Subject, relative_error


def stock(subject: Subject) -> None:
    try:
        images = subject.stock_images
    except Exception as error:
        if subject.dtype == torch.float32:
            raise
        raise DoesNotApply(f"The stock call itself fails in {str(subject.dtype).removeprefix('torch.')}: {' '.join(str(error).split())[:150]}") from error
    require(bool(images.isfinite().all()), "The stock call's output is not finite.")


def policy(subject: Subject) -> str:
    return type(subject.policy.scheduler).__name__


def rollout(subject: Subject) -> None:
    trajectory = subject.trajectory
    steps = trajectory.noisy_steps
    require(len(steps) > 0, "No step has a log-probability.")
    require(bool(trajectory.samples.isfinite().all()), "The states are not finite.")
    require(bool(trajectory.log_probs[:, steps].isfinite().all()), "The log-probabilities are not finite.")


def seeds(subject: Subject) -> None:
    again = subject.rollout()
    require(torch.equal(again.final, subject.trajectory.final), f"Equal seeds: off by {relative_error(again.final, subject.trajectory.final):.1e}.")
    other = subject.rollout(seeds=[seed + 2 for seed in subject.seeds])
    require(not torch.equal(other.final, subject.trajectory.final), "Other seeds make the same samples.")
    if subject.size > 1:
        require(not torch.equal(again.final[0], again.final[1]), "Both samples are the same.")


def replay(subject: Subject) -> None:
    log_probs, _ = subject.replayed
    trajectory = subject.trajectory
    require(sorted(log_probs) == trajectory.noisy_steps, f"Steps {sorted(log_probs)} of {trajectory.noisy_steps} were replayed.")
    off = {k: float((log_prob - trajectory.log_probs[:, k]).abs().max()) for k, log_prob in log_probs.items()}
    worst = max(off, key=off.get)
    require(not any(off.values()), f"The replay is off by {off[worst]:.1e} nats at step {worst}.")


def gradient(subject: Subject) -> None:
    _, gradients = subject.replayed
    totals = {name: sum(of_step[name] for of_step in gradients.values()) for name in subject.lora}
    for name, total in totals.items():
        require(total > 0 and total < float("inf"), f"The gradient of the {name} is {total}.")
    blind = [k for k, of_step in gradients.items() if not sum(of_step.values()) > 0]
    require(not blind, f"No gradient at steps {blind}.")


@torch.no_grad()
def step(subject: Subject) -> None:
    trajectory, whole = subject.trajectory, {}
    k = trajectory.noisy_steps[min(1, len(trajectory.noisy_steps) - 1)]
    with subject.moved():
        subject.policy.replay(trajectory, whole.__setitem__)
        alone = subject.policy.transition(trajectory, k)
    same = torch.equal(alone.mean, whole[k].mean) and torch.equal(alone.std, whole[k].std)
    require(same, f"Step {k} alone is off by {relative_error(alone.mean, whole[k].mean):.1e}.")
    changed = not torch.equal(alone.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k])
    require(changed, "A LoRA that was moved changes no log-probability.")


COLUMNS = (
    Column("stock", "call", "the stock call runs with these tiny components", stock, half=True),
    Column("policy", "policy", "`Policy(pipeline)` is made; its scheduler has a Gaussian kernel", policy, ("stock",), half=True),
    Column("rollout", "roll", "a roll-out has finite states and log-probabilities", rollout, ("policy",), half=True),
    Column("seeds", "seed", "equal seeds make equal samples, others make others", seeds, ("rollout",)),
    Column(
        "replay",
        "rep",
        "a replay with gradients has the log-probabilities of the roll-out, bit for bit, at all steps with noise",
        replay,
        ("rollout",),
        half=True,
    ),
    Column("gradient", "grad", "every denoiser has a gradient, and every step gives one", gradient, ("rollout",), half=True),
    Column("step", "step", "one step by itself is that of the whole replay, bit for bit", step, ("rollout",)),
)
