"""Candidates for each solver step from one and the same state, each with the clean sample that the model sees in it, and their scores.

`train_spo.py` alone has it: its roll-out is another one than that of all other methods.

A state's candidates are rows of the pipeline's batch: at the next step its denoiser evaluates all of them, which gives their clean
samples; the chosen candidate's denoiser output is reused. So k candidates cost k denoiser rows per step and no pass of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...algorithms.spo import resample, step_pairs
from ...condition import Condition
from ...data.prompts import Prompt, prompts_of_epoch
from ...driving.scheduler_hook import Step
from ...driving.tape import Tape
from ...policy import Policy, noise_seed
from ...trajectory import Trajectory
from ...transition import GaussianTransition
from ..run.division import division_of
from ..run.inputs import condition_of
from .sampling import Samples
from .scoring import Scorer, gather_scores


@dataclass
class Candidates:
    """What a roll-out with k candidates per step leaves behind.

    Attributes:
        trajectory: of the N paths that sampling went on along; its actions are one of the candidates each.
        drawn: (N, K, k, *D), the candidates for the state after each step; equal ones where the step has no noise.
        clean: (N, K, k, *D), the clean sample that the model predicts from each, at the next step's timestep; the
            candidate itself after the last.
    """

    trajectory: Trajectory
    drawn: Tensor
    clean: Tensor


class _Sampler:
    """The `on_step` of a roll-out whose rows are the candidates, state by state."""

    def __init__(self, number: int, seeds: list[int]):
        self.number = number
        self.noise = [torch.Generator().manual_seed(noise_seed(seed, "candidate", j)) for seed in seeds for j in range(number)]
        self.choice = [torch.Generator().manual_seed(noise_seed(seed, "resample")) for seed in seeds]
        self.chosen = torch.arange(len(seeds)) * number
        self.tape, self.drawn, self.seen = Tape(), [], []

    def __call__(self, step: Step) -> Tensor:
        """Go on from the chosen candidates: new ones for the next state."""
        if step.child:
            raise ValueError("Candidates from one state need pipelines that denoise a single modality.")
        # A given next state saves the scheduler's own draw.
        output = step.run(prev_sample=step.sample)
        here = GaussianTransition(output.prev_sample_mean, output.std).select(self.chosen)
        kernel = here.select(torch.arange(len(self.chosen)).repeat_interleave(self.number))
        stochastic = output.log_prob is not None
        drawn = step.like(kernel.sample(self.noise, step.sample.dtype) if stochastic else kernel.mean)
        state, first = step.sample[self.chosen], torch.arange(len(self.chosen)) * self.number
        self.chosen = first + resample(len(first), self.number, self.choice)
        action = drawn[self.chosen]
        self.tape.add(step, state, action, here.log_prob(action) if stochastic else None)
        self.drawn.append(drawn.unflatten(0, (-1, self.number)))
        self.seen.append(output.pred_original_sample.unflatten(0, (-1, self.number)))
        return drawn

    def finish(self, condition: Condition) -> Candidates:
        """All steps, with what the model saw in each step's candidates one step later."""
        drawn = torch.stack(self.drawn, 1)
        return Candidates(self.tape.trajectory(condition), drawn, torch.stack([*self.seen[1:], drawn[:, -1]], 1))


@torch.no_grad()
def roll_out_candidates(policy: Policy, prompts: list[Prompt | str], seeds: list[int], number: int) -> Candidates:
    """Sample one path a prompt, with `number` candidates at each step with noise, going on from one of them at random.

    Everything follows from the sample's seed, whatever the batch.

    Raises:
        ValueError: the pipeline denoises several modalities.
    """
    rows = condition_of(policy, [prompt for prompt in prompts for _ in range(number)], seeds=[seed for seed in seeds for _ in range(number)])
    sampler = _Sampler(number, seeds)
    policy.drive(rows, sampler)
    return sampler.finish(condition_of(policy, prompts, seeds=seeds))


@dataclass
class StepSamples:
    """An epoch's paths with a pair at each of S steps. N and S as everywhere; B of a batch.

    Attributes:
        batches, index: trajectories of this process, and where their samples stand among the N.
        winners, losers: for each batch (B, S, *D), best and worst candidate.
        steps: the S solver steps.
        keep, gap: (N, S), whether the pair's scores differ enough, and by how much they do, in units of scaled rewards.
        samples: the paths as any other samples, with the rewards of their final images.
    """

    batches: list[Trajectory]
    index: list[Tensor]
    winners: list[Tensor]
    losers: list[Tensor]
    steps: list[int]
    keep: Tensor
    gap: Tensor
    samples: Samples

    def metrics(self) -> dict[str, float]:
        """Those of the images' rewards."""
        return self.samples.metrics()


def sample_pairs(run, policy: Policy, reward, prompts, epoch: int, number: int) -> StepSamples:
    """Roll out `number` paths with candidates, score the candidates' clean samples, and take best and worst of each state.

    `run.args` has `num_candidates`, `divert_start_step`, `score_scale` (what rewards are multiplied by) and `threshold`.
    """
    args, accelerator = run.args, run.accelerator
    chosen = prompts_of_epoch(prompts, number, args.seed, epoch)
    asked = [prompts[i] for i in chosen]
    parts = [list(part) for part in division_of(run, number).batches]
    run.meter.count_images(sum(map(len, parts)))
    policy.expect_prompts(asked[i].text for part in parts for i in part)
    found, index, steps = [], [], []
    with Scorer.of_run(reward, args) as scorer, Scorer.of_run(reward, args) as final:
        for part in parts:
            with accelerator.autocast():
                candidates = roll_out_candidates(
                    policy, [asked[i] for i in part], [noise_seed(args.seed, epoch, i, chosen[i]) for i in part], args.num_candidates
                )
            trajectory = candidates.trajectory
            steps = _paired_steps(args, trajectory)
            _score_candidates(args, policy, scorer, candidates, steps, part, asked)
            with torch.no_grad():
                final.submit(part, policy.outcome(trajectory).to(torch.float32), [asked[i] for i in part])
            found.append((trajectory, candidates.drawn[:, steps]))
            index.append(torch.tensor(part))
        width = len(steps) * args.num_candidates
        scores = gather_scores(run, scorer, [prompt for prompt in asked for _ in range(width)])["reward"]
        components = gather_scores(run, final, asked)
    pairs = step_pairs(args.score_scale * scores.reshape(-1, args.num_candidates), threshold=args.threshold)
    winner, loser, keep, gap = (value.reshape(number, len(steps)) for value in (pairs.winner, pairs.loser, pairs.keep, pairs.gap))
    batches = [trajectory for trajectory, _ in found]
    best, worst = ([_picked(drawn, side[i]) for (_, drawn), i in zip(found, index)] for side in (winner, loser))
    images = Samples(batches, index, [p.text for p in asked], torch.zeros(number, dtype=torch.long), components["reward"], components, asked)
    return StepSamples(batches, index, best, worst, steps, keep, gap, images)


def _paired_steps(args, trajectory: Trajectory) -> list[int]:
    """The solver steps with noise from `--divert_start_step` on.

    Raises:
        ValueError: there are none.
    """
    steps = [k for k in trajectory.noisy_steps if k >= args.divert_start_step]
    if not steps:
        raise ValueError(
            f"No step has pairs: those with noise are {', '.join(map(str, trajectory.noisy_steps)) or 'none'} of {trajectory.num_steps}, counted from 0, and "
            f"--divert_start_step is {args.divert_start_step}. Lower it, or give more steps noise (--sde_window, --num_inference_steps)."
        )
    return steps


def _score_candidates(args, policy: Policy, scorer: Scorer, candidates: Candidates, steps: list[int], part: list[int], asked) -> None:
    """Submit the clean samples of all candidates of `steps`, under keys in the order (sample, step, candidate)."""
    number, condition, levels = args.num_candidates, candidates.trajectory.condition, noise_levels(policy.scheduler, candidates.trajectory)
    for place, k in enumerate(steps):
        asked_here = [Prompt(asked[i].text, {**asked[i].columns, "noise_level": levels[k]}) for i in part]
        for j in range(number):
            with torch.no_grad():
                made = policy.outcome(candidates.clean[:, k, j], condition).to(torch.float32)
            scorer.submit([(i * len(steps) + place) * number + j for i in part], made, asked_here)


def noise_levels(scheduler, trajectory: Trajectory) -> list[float]:
    """The weight of the noise, in [0, 1], in the state after each step: what rewards that want it get as the column `noise_level`."""
    sigmas = None if trajectory.sigmas.isnan().any() else trajectory.sigmas[1:]
    return [*scheduler.noise_weight(trajectory.timesteps[1:], sigmas).tolist(), 0.0]


def _picked(drawn: Tensor, choice: Tensor) -> Tensor:
    """(B, S, *D): of (B, S, k, *D) the candidates `choice` (B, S)."""
    rows, steps = torch.arange(drawn.shape[0])[:, None], torch.arange(drawn.shape[1])[None]
    return drawn[rows, steps, choice]
