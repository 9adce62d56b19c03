"""How noisy a policy gradient is, by what its advantages are: returns, rewards to go, baselines, and generalised advantages at four lambdas.

    python benchmarks/gradient_variance.py

On an embedded model with a new LoRA: each step's gain of the reward along the ODE (DenseGRPO's), a value network fitted to other samples, and the
gradient of every (sample, step) by itself, so that all estimators are sums of the same gradients. Two halves of the samples, of different prompts, make two
gradients; their cosine says how much of a half's gradient is signal. Each row's other cosine is that with the other half's unbiased gradient (reward minus
learned value); of an estimator that has no bias it is the geometric mean of the two own ones, which stands beside it. Errors are those of a jackknife over
prompts. Prints the table for benchmarks/README.md and draws docs/gradient_variance.png.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from torch import Tensor

from diffusers_align import Policy, Trajectory, embedded, sde_twin
from diffusers_align.algorithms.dense_grpo import step_gains
from diffusers_align.data import load_prompts
from diffusers_align.rewards import load_reward
from diffusers_align.rl import ValueBaseline, gae, group_advantages, value_advantages
from diffusers_align.rl.trust_region import flat_gradient
from diffusers_align.rl.values import explained_variance, value_targets

CALL = {"mini-sd3": {"max_sequence_length": 1}, "mini-sd": {}}
LAMBDAS = (0.0, 0.5, 0.9, 1.0)
STEPS, GROUP = 6, 8
REFERENCE = "reward minus learned value"


@dataclass(frozen=True)
class Drawn:
    """N samples, GROUP of each prompt.

    Attributes:
        trajectory: of all.
        features: (N, E), of the prompts.
        rewards: (N,).
        gains: (N, K), of the steps with noise.
        groups: (N,) integers.
    """

    trajectory: Trajectory
    features: Tensor
    rewards: Tensor
    gains: Tensor
    groups: Tensor

    @property
    def steps(self) -> list[int]:
        return self.trajectory.noisy_steps


def draw(policy: Policy, prompts: list, first_seed: int) -> Drawn:
    """Roll out GROUP samples of each prompt, and score what the ODE makes of every state with noise behind it or ahead."""
    asked = [prompt for prompt in prompts for _ in range(GROUP)]
    reward = load_reward("background_color")
    parts, scores, features = [], [], []
    for start in range(0, len(asked), 32):
        part = asked[start : start + 32]
        seeds = list(range(first_seed + start, first_seed + start + len(part)))
        trajectory = policy.rollout([prompt.text for prompt in part], seeds=seeds)
        ends = [policy.complete(trajectory, k) for k in trajectory.noisy_steps] + [trajectory.final]
        columns = {"background": [prompt.columns.get("background") for prompt in part]}
        scores.append(torch.stack([reward(policy.decode(z, trajectory.condition).float(), [prompt.text for prompt in part], **columns) for z in ends], 1))
        features.append(policy.prompt_features(trajectory.condition))
        parts.append(trajectory)
    found = torch.cat(scores)
    groups = torch.arange(len(asked)) // GROUP
    return Drawn(Trajectory.cat(parts), torch.cat(features), found[:, -1], step_gains(found), groups)


def fitted(drawn: Drawn, rewards: Tensor, updates: int) -> ValueBaseline:
    """A value network that foretells what is earned from each state on; `rewards` (N,) or (N, K)."""
    values = ValueBaseline(STEPS, learning_rate=1e-3, batch_size=64, accumulation_steps=1, buffer_size=10**6)
    number = len(drawn.rewards)
    targets = value_targets(rewards, torch.zeros(number, len(drawn.steps)))
    at = torch.tensor(drawn.steps).repeat_interleave(number)
    states = torch.cat([drawn.trajectory.states[:, k] for k in drawn.steps])
    values.remember(states, drawn.features.repeat(len(drawn.steps), 1), at, targets.T.flatten())
    values.fit(updates)
    return values


def predicted(values: ValueBaseline, drawn: Drawn) -> Tensor:
    """(N, K)."""
    number = len(drawn.rewards)
    return torch.stack([values(drawn.trajectory.states[:, k], drawn.features, torch.full((number,), k)) for k in drawn.steps], 1)


def estimators(drawn: Drawn, of_reward: Tensor, of_gains: Tensor) -> dict[str, Tensor]:
    """Advantages (N, K) by name, from the values (N, K) of the final reward and of the gains."""
    number, nothing = len(drawn.steps), torch.zeros_like(drawn.gains)
    grouped = group_advantages(drawn.rewards, drawn.groups, normalise=False)
    found = {
        "return": drawn.rewards[:, None].expand(-1, number),
        "gains to go": gae(drawn.gains, nothing, lam=1.0),
        "group's mean": grouped[:, None].expand(-1, number),
        "a step's gain beside its group's": group_advantages(drawn.gains, drawn.groups, normalise=False),
        REFERENCE: value_advantages(drawn.rewards, of_reward),
    }
    found |= {f"GAE of the reward, {lam:g}": value_advantages(drawn.rewards, of_reward, lam=lam) for lam in LAMBDAS}
    return found | {f"GAE of gains, {lam:g}": value_advantages(drawn.gains, of_gains, lam=lam) for lam in LAMBDAS}


def gradients(policy: Policy, drawn: Drawn, parameters: list[Tensor]) -> Tensor:
    """Of each step's log-probability, (N, K, P)."""
    found = []
    for i in range(len(drawn.rewards)):
        alone, rows = drawn.trajectory.select([i]), {}

        def on_step(k, transition, alone=alone, rows=rows):
            rows[k] = flat_gradient(transition.log_prob(alone.actions[:, k]).sum(), parameters)

        policy.replay(alone, on_step, drawn.steps)
        found.append(torch.stack([rows[k] for k in drawn.steps]))
    return torch.stack(found)


# --- two halves --------------------------------------------------------------------------------------------------------


def cosines(mine: Tensor, other: Tensor, repeats: int = 200, seed: int = 0) -> float:
    """Mean cosine of two halves' gradients, from Gram matrices: of the estimator's own gradients of prompts (M, P), and with another's."""
    gram, own, theirs = mine @ other.T, mine @ mine.T, other @ other.T
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(repeats):
        order = torch.randperm(len(mine), generator=generator)
        a, b = order[: len(mine) // 2], order[len(mine) // 2 :]
        found.append(gram[a][:, b].sum() / (own[a][:, a].sum() * theirs[b][:, b].sum()).sqrt())
    return float(torch.stack(found).mean())


def with_error(mine: Tensor, other: Tensor) -> tuple[float, float]:
    """The cosine, and its standard error by leaving out one prompt (two, so that halves stay equal) at a time."""
    number = len(mine)
    left = [cosines(*(torch.cat([x[:i], x[i + 2 :]]) for x in (mine, other)), repeats=50) for i in range(0, number - 1, 2)]
    spread = torch.tensor(left)
    return cosines(mine, other), float((spread.var(correction=0) * (len(left) - 1)).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini-sd3", choices=sorted(CALL))
    parser.add_argument("--prompts", type=int, default=32, help=f"whose gradients are taken, {GROUP} samples each")
    parser.add_argument("--fit_prompts", type=int, default=40, help="whose samples the value networks are fitted to")
    parser.add_argument("--updates", type=int, default=400, help="of the value networks")
    parser.add_argument("--output", default="docs/gradient_variance.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.process_time()
    pipeline = DiffusionPipeline.from_pretrained(embedded.path(args.model))
    pipeline.set_progress_bar_config(disable=True)
    policy = Policy(pipeline, sde_twin(pipeline.scheduler), num_inference_steps=STEPS, guidance_scale=1.0, **CALL[args.model])
    parameters = policy.add_lora(rank=2)
    prompts = load_prompts("likes_blue_train")
    chosen = [prompts[i % len(prompts)] for i in range(args.prompts + args.fit_prompts)]
    with torch.no_grad():
        seen, fresh = draw(policy, chosen[args.prompts :], 10**6), draw(policy, chosen[: args.prompts], 0)
    of_reward, of_gains = (predicted(fitted(seen, rewards, args.updates), fresh) for rewards in (seen.rewards, seen.gains))
    print(f"{args.model}: {len(fresh.rewards)} samples of {len(fresh.steps)} steps with noise; {time.process_time() - start:.0f} s")
    for name, rewards, values in (("reward", fresh.rewards, of_reward), ("gains to go", fresh.gains, of_gains)):
        print(f"the value network explains {explained_variance(value_targets(rewards, torch.zeros_like(values)), values):.2f} of the {name}")
    each = gradients(policy, fresh, parameters)
    table(estimators(fresh, of_reward, of_gains), each, args.prompts, Path(args.output))
    print(f"{time.process_time() - start:.0f} s of one thread")


def table(found: dict[str, Tensor], each: Tensor, prompts: int, output: Path) -> None:
    """Print a row an estimator, and draw them."""
    of_prompts = {name: torch.einsum("nk,nkp->np", a.float(), each).reshape(prompts, -1, each.shape[-1]).sum(1) for name, a in found.items()}
    print("| advantages | their mean square | cosine of two halves | with the unbiased half | without bias |\n|---|---|---|---|---|")
    rows = {}
    for name, gradient in of_prompts.items():
        rows[name] = with_error(gradient, gradient), with_error(gradient, of_prompts[REFERENCE])
    for name, ((own, own_error), (other, other_error)) in rows.items():
        unbiased = (max(0.0, own) * max(0.0, rows[REFERENCE][0][0])) ** 0.5
        size = found[name].square().mean()
        print(f"| {name} | {size:.4f} | {own:.3f} ± {own_error:.3f} | {other:.3f} ± {other_error:.3f} | {unbiased:.3f} |", flush=True)
    figure = Figure(figsize=(8, 4.2))
    axes = figure.subplots()
    for offset, (label, color) in enumerate((("cosine of two halves", "tab:blue"), ("with the unbiased half", "tab:orange"))):
        numbers = [rows[name][offset] for name in rows]
        places = [place + 0.2 * offset for place in range(len(rows))]
        axes.errorbar([v for v, _ in numbers], places, xerr=[e for _, e in numbers], fmt="o", color=color, label=label)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("cosine")
    axes.axvline(0, color="#999999", lw=0.8)
    axes.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
