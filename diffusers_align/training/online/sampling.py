"""Sampling and scoring: an epoch's rollouts across processes, and evaluation at fixed prompts and seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...condition import Condition
from ...data.prompts import Prompt, prompts_of_epoch
from ...driving.outcome import Outcome
from ...driving.stock import stock_outcome
from ...policy import Policy, noise_seed
from ...rewards import InvalidReward
from ...trajectory import Trajectory
from ...transition import GaussianTransition
from ..report.statistics import mean_and_error
from ..run.division import division_of
from ..run.inputs import batches_by_size, condition_of
from .scoring import Scorer, columns_of, gather_scores
from .scouting import Asked, scout_metrics, scouted

# The fields of the SDE schedulers that flags choose.
NOISE_FIELDS = ("sde_type", "noise_level", "sde_window", "eta")


def noise_fields(args) -> dict[str, Any]:
    """Those of `NOISE_FIELDS` that the flags give, for `Run.load_policy`."""
    return {name: getattr(args, name) for name in NOISE_FIELDS if getattr(args, name, None) is not None}


@dataclass
class Samples:
    """One epoch's samples. Lists and tensors of length N are of all processes, in one order that all know.

    Attributes:
        batches: this process's trajectories, in the batches in which they are to be replayed: equal shapes make equal bits.
        index: for each of `batches`, the positions (B,) of its samples among the N.
        prompts: N texts.
        groups: (N,) integers, equal where rewards are compared: where prompt and occasion are equal, or without groups everywhere.
        rewards: (N,) float32; NaN where masked.
        components: every reward by name, (N,).
        asked: the N prompts with the data set's other fields.
        kernels: for each of `batches`, the Gaussians of its noisy steps under the policy that sampled; empty unless they were to be kept.
        scouted: (N,), the rewards by which they were chosen from a pool; None without one.
    """

    batches: list[Trajectory]
    index: list[Tensor]
    prompts: list[str]
    groups: Tensor
    rewards: Tensor
    components: dict[str, Tensor]
    asked: list[Prompt]
    kernels: list[dict[int, GaussianTransition]] = field(default_factory=list)
    scouted: Tensor | None = None

    def metrics(self) -> dict[str, float]:
        """Mean and s.e. of the reward, its spread within groups, the share of groups without any (`zero_std`), means of its components; how a pool's
        rewards go with them."""
        valid = self.rewards[~self.rewards.isnan()]
        out = {"reward": valid.mean(), **({"reward_se": valid.std() / len(valid) ** 0.5} if len(valid) > 1 else {})}
        spread = torch.stack([_spread(self.rewards[self.groups == g]) for g in self.groups.unique()])
        out |= {"reward_std": spread.mean(), "zero_std": (spread < 1e-6).float().mean()}
        out |= {} if self.scouted is None else scout_metrics(self.scouted, self.rewards, self.groups)
        parts = {f"reward/{name}": values[~values.isnan()].mean() for name, values in self.components.items() if name != "reward" and not values.isnan().all()}
        invalid = {"invalid_rewards": self.rewards.isnan().sum()} if len(valid) < len(self.rewards) else {}
        return {name: float(value) for name, value in {**out, **parts, **invalid}.items()}


def _spread(rewards: Tensor) -> Tensor:
    valid = rewards[~rewards.isnan()]
    return valid.std(correction=0) if len(valid) else torch.zeros(())


def sample_epoch(
    run,
    policy: Policy,
    reward,
    prompts: list[Prompt],
    epoch: int,
    num_prompts: int,
    group_size: int | None,
    same_latent: bool = False,
    deterministic: bool = False,
    keep_kernels: bool = False,
    scout: bool = True,
    **call_kwargs: Any,
) -> Samples:
    """Roll out `group_size` samples of each of `num_prompts` prompts and score them.

    Noise is keyed by (seed, epoch, prompt, sample), so neither the batch size nor the number of processes changes a sample. With `--scout_pool` the samples
    of a group are the extremes among so many (`online.scouting`).

    Args:
        group_size: None for one sample of each and no groups: all of the epoch are compared with each other.
        same_latent: the samples of a group share their initial noise, so that their rewards differ by the steps' noise alone.
        deterministic: walk the ODE, for methods that need no log-probabilities.
        keep_kernels: keep the Gaussians that the steps drew from; their means take as much memory as the states.
        scout: choose from the pool that the flags ask for; otherwise samples are as they come.
        call_kwargs: arguments of the pipeline's calls that override the policy's.

    Raises:
        ValueError: `same_latent` and `deterministic`: the images of a group would be equal, and so their rewards.
    """
    if same_latent and deterministic:
        raise ValueError("One initial noise a group (same_latent) and no other noise (deterministic) make equal images: leave out one of the two.")
    args = run.args
    pool = getattr(args, "scout_pool", 0) if scout and group_size else 0
    all_asked, scouted_rewards = _asked(args, prompts, epoch, num_prompts, pool or group_size or 1, same_latent), None
    if pool:
        all_asked, scouted_rewards = scouted(run, policy, reward, all_asked, group_size, **call_kwargs)
    asked = all_asked.prompts
    parts = [list(part) for part in division_of(run, len(asked)).batches]
    run.meter.count_images(sum(map(len, parts)))
    policy.expect_prompts(asked[i].text for part in parts for i in part)
    batches, index, kernels = [], [], []
    with Scorer.of_run(reward, args) as scorer:
        for part in parts:
            own, drawn_from = all_asked.select(part), {}
            keep = drawn_from.__setitem__ if keep_kernels else None
            trajectory = _rolled_out(run, policy, own, same_latent, deterministic=deterministic, on_step=keep, **call_kwargs)
            batches.append(trajectory)
            kernels.append(drawn_from)
            index.append(torch.tensor(part))
            with torch.no_grad():
                made = policy.outcome(trajectory).to(torch.float32)
            scorer.submit(part, made, own.prompts)
        components = gather_scores(run, scorer, asked)
    groups, kept = torch.tensor(all_asked.groups if group_size else [0] * len(asked)), kernels if keep_kernels else []
    return Samples(batches, index, [p.text for p in asked], groups, components["reward"], components, asked, kept, scouted_rewards)


def _rolled_out(run, policy: Policy, own: Asked, same_latent: bool, deterministic: bool, on_step, **call_kwargs: Any) -> Trajectory:
    """One batch, held to a second walk if it is the first, and explained."""
    with run.accelerator.autocast():
        condition = condition_of(policy, own.prompts, seeds=own.seeds, step_seeds=own.step_seeds, **call_kwargs)
        # The first roll-out is compared with another walk: of equal rows, so that kernels round alike.
        shared = same_latent and getattr(run.args, "share_prefix", False) and policy.compared
        trajectory = policy.rollout(condition, deterministic=deterministic, on_step=on_step, share_prefix=shared)
        policy.check_reproducible(trajectory)
    run.explain_once(*describe_walk(policy, trajectory), *describe_window(policy, trajectory))
    return trajectory


def _asked(args, prompts: list[Prompt], epoch: int, num_prompts: int, group_size: int, same_latent: bool) -> Asked:
    """Of each of an epoch's samples its prompt, its group, and the seeds of its initial noise and of its steps, in an order that mixes the groups."""
    chosen = prompts_of_epoch(prompts, num_prompts, args.seed, epoch)
    order = [(group, sample) for group in range(num_prompts) for sample in range(group_size)]
    random.Random(f"{args.seed}/{epoch}/order").shuffle(order)
    step_seeds = [noise_seed(args.seed, epoch, group, chosen[group], sample) for group, sample in order]
    seeds = [noise_seed(args.seed, epoch, group, chosen[group]) for group, _ in order] if same_latent else step_seeds
    return Asked([prompts[chosen[group]] for group, _ in order], [group for group, _ in order], seeds, step_seeds)


def describe_walk(policy: Policy, trajectory: Trajectory) -> list[str]:
    """What training walks in the place of the pipeline's own solver, in words; nothing where it is the same sampler with noise."""
    own, stock = policy.scheduler, policy.stock_scheduler
    if isinstance(own, type(stock)):
        return []
    times, name = ", ".join(f"{t:g}" for t in trajectory.timesteps.tolist()[:12]), type(stock).__name__
    more = ", ..." if trajectory.num_steps > 12 else ""
    return [f"Training samples with {type(own).__name__} at the timesteps {times}{more}: the pipeline's own {name} has no log-probabilities."]


def describe_window(policy: Policy, trajectory: Trajectory) -> list[str]:
    """Where a window of noise lies in calls that begin late in their schedule, in words: what a strength below 1 leaves out counts."""
    window, taken = policy.scheduler.config.get("sde_window"), trajectory.num_steps
    first = len(policy.scheduler.timesteps) - taken
    if window is None or first <= 0:
        return []
    noisy = ", ".join(str(first + k) for k in trajectory.noisy_steps) or "none"
    return [
        f"The calls take solver steps {first} to {first + taken - 1} alone (strength below 1), counted from 0, as --sde_window {window[0]} {window[1]} is: "
        f"steps with noise: {noisy}."
    ]


def score_again(run, reward, samples: Samples, outcome_of: Callable[[int], Outcome], captions: list[str] | None = None) -> Tensor:
    """Rewards (N,), on all processes, of other images of the same samples, or of their images under other captions.

    Args:
        outcome_of: of the number of a batch of `samples`, what is scored.
        captions: N in the place of the prompts; rewards get the data set's other fields all the same.
    """
    asked = samples.asked if captions is None else [replace(prompt, text=text) for prompt, text in zip(samples.asked, captions)]
    with Scorer.of_run(reward, run.args) as scorer:
        for b, index in enumerate(samples.index):
            scorer.submit(index.tolist(), outcome_of(b), [asked[i] for i in index.tolist()])
        return gather_scores(run, scorer, asked)["reward"]


@dataclass
class Evaluation:
    """Samples at fixed prompts and seeds, with their rewards by name, (N,) each, NaN where there is no score.

    Attributes:
        images: of the first samples: pictures (3, H, W), videos (F, 3, H, W) or sounds (C, T).
        solver: the class of the scheduler that they were drawn with.
        audio: what is heard with the videos, (C, T) each; empty where nothing is.
        sampling_rate: of the sound; None without.
    """

    prompts: list[str]
    seeds: list[int]
    images: list[Tensor]
    rewards: dict[str, Tensor]
    solver: str = ""
    audio: list[Tensor] = field(default_factory=list)
    sampling_rate: int | None = None

    def keep(self, number: int) -> None:
        """Forget what is not of the first samples, but for its rewards."""
        del self.images[number:], self.audio[number:]

    def check_scored(self, names: Iterable[str], shown: dict[str, str] | None = None) -> None:
        """Raise an InvalidReward if one of the rewards `names` scored not one image: a number that was asked for must not be missing unsaid.

        Args:
            shown: what some of them go by elsewhere, for the message.
        """
        for name in names:
            values = self.rewards.get(name)
            if values is None or values.isnan().all():
                name = (shown or {}).get(name, name)
                raise InvalidReward(
                    f"Reward {name!r} scored none of {len(self.prompts)} evaluation images, so there is no number for it. Repair the reward, give it the "
                    "fields that it needs beside the prompts, or leave it out; --invalid_rewards mask goes on without it."
                )


def evaluate(
    run, policy: Policy, rewards: dict[str, Any], prompts: list[Prompt], number: int, keep_images: int, on_images: Callable[[int], Any] = lambda number: None
) -> Evaluation:
    """Sample `number` images as users of the pipeline will, prompt after prompt, seed after seed, and score them with each of `rewards`.

    The solver is the one that the pipeline came with, outside autocast; with `--eval_scheduler twin` the ODE of the SDE scheduler that training
    walks. The two are other samplers: the same weights can differ by more than a training gains.

    Every process takes an equal share, some of them a sample again: with a sharded denoiser, one without a batch would leave the
    others waiting. All get the whole result (images: the first `keep_images`). `on_images(n)` is called after n more of all.
    """
    args, accelerator = run.args, run.accelerator
    jobs = [(i, prompts[i % len(prompts)], noise_seed(args.seed, "evaluation", i)) for i in range(number)]
    processes, rows = accelerator.num_processes, []
    mine = batches_by_size([prompt for _, prompt, _ in jobs], args.train_batch_size, accelerator.process_index, processes)
    call = {"num_inference_steps": args.eval_num_inference_steps, "guidance_scale": args.eval_guidance_scale}
    call = {name: value for name, value in call.items() if value is not None and name in policy.parameters}
    policy.expect_prompts(jobs[i][1].text for batch in mine for i in batch)
    scorers = {name: Scorer(reward, on_nan="mask", on_failure=args.invalid_rewards, timeout=args.reward_timeout) for name, reward in rewards.items()}
    for batch in mine:
        part = [jobs[i] for i in batch]
        condition = condition_of(policy, [p for _, p, _ in part], seeds=[seed for _, _, seed in part], **call)
        made = evaluation_outcome(run, policy, condition).to(torch.float32).to("cpu")
        scored = {name: scorer(made.to(accelerator.device), [p for _, p, _ in part]) for name, scorer in scorers.items()}
        for j, (i, _, _) in enumerate(part):
            flat = {f"{name}/{key}" if key != "reward" else name: value for name in rewards for key, value in scored[name][j].items()}
            rows.append((i, made[[j]] if i < keep_images else None, flat))
        on_images(len(part) * processes)
    rows = sorted({row[0]: row for row in gather_object(rows)}.values(), key=lambda row: row[0])
    for failure in [failure for scorer in scorers.values() for failure in scorer.failures]:
        run.print(f"Left out of the evaluation: {failure}")
    texts, seeds = [prompt.text for _, prompt, _ in jobs], [seed for _, _, seed in jobs]
    kept, columns = [made for _, made, _ in rows[:keep_images]], columns_of([row for _, _, row in rows])
    images, audio = [made.images[0] for made in kept], [made.audio[0] for made in kept if made.audio is not None]
    rate = next((made.sampling_rate for made in kept), None)
    return Evaluation(texts, seeds, images, columns, type(evaluation_scheduler(args, policy)).__name__, audio, rate)


def evaluation_scheduler(args, policy: Policy):
    """The scheduler that `--eval_scheduler` asks for."""
    return policy.stock_scheduler if args.eval_scheduler == "stock" else policy.scheduler


def described_solver(args, name: str) -> str:
    """What the images of an evaluation were drawn with, in words."""
    return f"the pipeline's own {name}" if args.eval_scheduler == "stock" else f"the ODE of {name}"


def evaluation_outcome(run, policy: Policy, condition: Condition) -> Outcome:
    """What is made of a condition with seeds, by the solver that `--eval_scheduler` asks for."""
    if run.args.eval_scheduler == "stock":
        return stock_outcome(policy, condition)
    with run.accelerator.autocast():
        trajectory = policy.rollout(condition, deterministic=True)
    with torch.no_grad():
        return policy.outcome(trajectory)


def paired_gain(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean of after - before over equal prompts and seeds, and its standard error. Pairs with a NaN are left out."""
    return mean_and_error(after - before)
