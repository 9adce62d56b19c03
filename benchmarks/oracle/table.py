"""The rows of the oracle's table: each algorithm, what its optimum is, and how far from p* it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffusers_align.rl.chain import aligned, marginals, total_variation

from . import continuous, offline, online
from .problem import Problem, problem

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One algorithm on the chain.

    Attributes:
        name: of the algorithm.
        optimum: in words, what it is to reach.
        to_target: total variation of its samples to p*, one for each seed; a single number of a method without draws.
        to_optimum: the same to its own optimum, or absent where that is p*.
        optimum_to_target: how far that one is from p*.
        bounds: what the objective that was reached says of `to_target` at most, or absent.
        remark: what else was checked.
    """

    name: str
    optimum: str
    to_target: list[float]
    to_optimum: list[float] | None = None
    optimum_to_target: float | None = None
    bounds: list[float] | None = None
    remark: str = ""


def mean_and_error(numbers: list[float]) -> tuple[float, float]:
    """Mean and standard error; 0 for a single number."""
    values = torch.tensor(numbers, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def distance(p: Tensor, q: Tensor) -> float:
    return float(total_variation(p, q))


def of_policies(held: Problem, name: str, optimum: str, policies: list[Tensor], best: Tensor | None = None, remark: str = "") -> Row:
    """The row of learned tables; `best` (G,) are the samples of the optimum where that is not p*."""
    samples = [held.samples_of(policy) for policy in policies]
    return Row(
        name, optimum, [distance(p, held.target) for p in samples],
        None if best is None else [distance(p, best) for p in samples], None if best is None else distance(best, held.target),
        [held.bound(policy) for policy in policies], remark,
    )  # fmt: skip


def online_rows(held: Problem, seeds: Sequence[int], share: float) -> list[Row]:
    """Policy gradients. `share` of the updates are made."""
    many, few = max(2, int(100 * share)), max(2, int(60 * share))
    price = "p*; the price is in the reward"
    rows = [
        of_policies(held, "REINFORCE", price, [online.reinforce(held, seed, updates=3 * many) for seed in seeds]),
        of_policies(held, "PPO (DDPO-IS)", price, [online.ppo(held, seed, rollouts=many * 3 // 2) for seed in seeds]),
    ]
    runs = [online.trpo(held, seed, rollouts=few) for seed in seeds]
    reports = [report for _, own in runs for report in own]
    worst = max(report["kl"] / report["max_kl"] for report in reports)
    held_bound = sum(report["after"] >= report["lower_bound"] for report in reports)
    remark = f"KL at most {worst:.3f} of what is allowed; the monotone bound held in {held_bound} of {len(reports)} steps"
    rows.append(of_policies(held, "TRPO", price, [policy for policy, _ in runs], remark=remark))
    policies = [online.dpok(held, seed, rollouts=many) for seed in seeds]
    pairs = [online.dpok_bound(held, policy) for policy in policies]
    remark = f"KL of the samples {pairs[0][0]:.3f} <= {pairs[0][1]:.3f} of the paths, in {sum(a <= b for a, b in pairs)} of {len(pairs)} runs"
    visited = "that of the KL at visited states"
    rows.append(of_policies(held, "DPOK", visited, policies, held.samples_of(online.best_of_visited_states(held, held.beta)), remark))
    shrunk = held.beta * online.GROUP / (online.GROUP - 1)
    best = held.samples_of(online.best_of_visited_states(held, shrunk))
    remark = f"the group's mean is beta {shrunk:.3f} in the place of {held.beta:g}"
    rows.append(of_policies(held, "Flow-GRPO", visited, [online.flow_grpo(held, seed, rollouts=many) for seed in seeds], best, remark))
    return rows


def offline_rows(held: Problem, seeds: Sequence[int], share: float) -> list[Row]:
    """Preferences, likes and scores."""
    many = max(4, int(200 * share))
    shaped = [offline.kto(held, seed, utility="kahneman_tversky", updates=3 * many) for seed in seeds]
    default = [offline.kto(held, seed, utility="kahneman_tversky", kind="batch_mean", updates=3 * many) for seed in seeds]
    likes = offline.kto_optimum(held)
    return [
        of_policies(held, "DPO", "p*", [offline.dpo(held, seed, updates=2 * many) for seed in seeds]),
        of_policies(held, "KTO, logistic", "p*, likes of sigma(r - V*)", [offline.kto(held, seed, utility="logistic", updates=3 * many) for seed in seeds]),
        of_policies(held, "KTO, S-shaped", "nothing of what is disliked", shaped, likes, "the reference point is 0"),
        of_policies(held, "KTO, S-shaped, Q of the batch", "nothing of what is disliked", default, likes, "under the pretrained model's samples Q is 0"),
        of_policies(held, "Reward-weighted regression", "p*", [offline.reward_weighted(held, seed, updates=3 * many // 2) for seed in seeds]),
    ]


def of_samples(name: str, optimum: str, held: Problem, draws: Callable[[int], Tensor], seeds: Sequence[int], remark: str = "") -> Row:
    """The row of a method that has no table: its samples (G,) by seed."""
    return Row(name, optimum, [distance(draws(seed), held.target) for seed in seeds], remark=remark)


def continuous_rows(held: Problem, seeds: Sequence[int], share: float) -> list[Row]:
    """What moves means, weighs particles and chooses candidates."""
    limit, updates = "p* as steps grow many", max(10, int(150 * share))
    rows = []
    for steps in (8, 32) if share >= 1 else (8,):
        draws = partial(continuous.adjoint_matching, steps, updates=updates)
        rows.append(of_samples(f"Adjoint Matching, {steps} steps", limit, continuous.even(steps), draws, seeds))
    groups = max(16, int(512 * share))
    for potential in ("difference", "max", "add"):
        runs = [continuous.steered(held, seed, potential=potential, groups=groups) for seed in seeds]
        z, error = mean_and_error((torch.cat([evidence for _, evidence in runs]) - held.value / held.beta).exp().tolist())
        remark = f"its evidence is {z:.3f} ± {error:.3f} of the exact one"
        rows.append(Row(f"SMC steering, {potential}", "p*", [distance(p, held.target) for p, _ in runs], remark=remark))
    for name, guide in (("noise-aware", continuous.value_guidance), ("twist", continuous.twisted)):
        for steps in (16, 64):
            rows.append(Row(f"Value guidance, {name}, {steps} steps", limit, [distance(guide(steps), continuous.even(steps).target)]))
    plug_in = distance(continuous.plug_in_guidance(64), continuous.even(64).target)
    rows.append(Row("Guidance by the clean estimate's reward, 64 steps", "not p*", [plug_in]))
    for number in (4, 16):
        draws = partial(continuous.candidates, held, number=number, exact=True)
        rows.append(of_samples(f"SVDD with the exact value, {number} candidates", "p* as candidates grow many", held, draws, seeds))
    draws = partial(continuous.candidates, held, number=16, exact=False)
    rows.append(of_samples("SVDD with the clean estimate's reward, 16", "not p*", held, draws, seeds))
    return rows


def control_rows(held: Problem) -> list[Row]:
    """What all others are to be compared with."""
    flow = problem(sampler="flow_sde")
    samples = [marginals(*aligned(p.chain, p.reward, p.beta, fixed_noise=fixed))[-1] for p, fixed in ((held, True), (flow, True), (flow, False))]
    return [
        Row("The pretrained model", "", [distance(held.reference, held.target)]),
        Row("Soft value iteration", "p*", [distance(samples[0], held.target)]),
        Row("the same, Flow-GRPO's SDE", "p*, with the first noise aligned too", [distance(samples[2], flow.target)]),
        Row("the same, its first noise as it is", "not p*: the chain remembers it", [distance(samples[1], flow.target)]),
    ]


def rows(seeds: Sequence[int] = SEEDS, share: float = 1.0) -> list[Row]:
    """The whole table. `share` of the updates and draws, for a quick look."""
    held = problem()
    return [*control_rows(held), *online_rows(held, seeds, share), *offline_rows(held, seeds, share), *continuous_rows(held, seeds, share)]


def as_markdown(found: list[Row]) -> str:
    """The table as the docs have it."""

    def number(values: list[float] | None) -> str:
        if values is None:
            return ""
        mean, error = mean_and_error(values)
        return f"{mean:.4f} ± {error:.4f}" if len(values) > 1 else f"{mean:.4f}"

    lines = ["| algorithm | its optimum | that to p* | it to its optimum | it to p* | at most, by its objective | |", "|---|---|---|---|---|---|---|"]
    for row in found:
        apart = "" if row.optimum_to_target is None else f"{row.optimum_to_target:.4f}"
        own = number(row.to_optimum)
        lines.append(f"| {row.name} | {row.optimum} | {apart} | {own} | {number(row.to_target)} | {number(row.bounds)} | {row.remark} |")
    return "\n".join(lines)
