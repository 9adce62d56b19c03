"""Views: other captions of a group's images, from a file or a function, and what the policy and the reward make of them.

`train_mv_grpo.py` alone has it: reading and checking captions is no part of the algorithm that its page shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...condition import Condition
from ...data.files import read_rows
from ...data.prompts import Prompt
from ...driving.outcome import Outcome
from ...policy import Policy
from ...rewards.registry import load_callable
from ...trajectory import Trajectory
from .sampling import Samples, score_again

Writer = Callable[[str, Tensor | None], list[str]]


def load_views(spec: str, prompts: list[Prompt], number: int) -> Writer:
    """What writes captions: of a prompt and, for a posterior captioner, its group's images (G, 3, H, W) in [0, 1].

    Args:
        spec: a `.json` file {prompt: [captions]}, a `.jsonl` file with the fields `prompt` and `captions`, or a function
            (prompt, images or None) -> list[str] as `module:function` or `path/to/file.py:function`.
        prompts: those that a file must have `number` captions of.

    Raises:
        ValueError: no such file or function, or a prompt with fewer captions in the file (the message names it).
    """
    path = Path(spec)
    if path.suffix.lower() not in (".json", ".jsonl"):
        source, _, name = spec.rpartition(":")
        try:
            return load_callable(source, name, "They")
        except ValueError as error:
            raise ValueError(
                f"Cannot load the views {spec!r}: {error.__cause__ or error}. Name a .json or .jsonl file, or a function "
                "(prompt, images or None) -> list[str] as 'module:function' or 'path/to/file.py:function'."
            ) from error
    if not path.is_file():
        raise ValueError(f"No views file {spec!r}.")
    captions = _captions(path)
    for prompt in prompts:
        _check(captions.get(prompt.text, []), prompt.text, number, spec)
    return lambda prompt, images: captions[prompt]


def _captions(path: Path) -> dict[str, list[str]]:
    rows, lines = read_rows(path)
    if path.suffix.lower() == ".json":
        if len(rows) != 1 or not isinstance(rows[0], dict):
            raise ValueError(f"{path} is no JSON object {{prompt: [captions]}}.")
        return rows[0]
    for row, line in zip(rows, lines):
        if not isinstance(row, dict) or not {"prompt", "captions"} <= set(row):
            raise ValueError(f"{path}, line {line}: no object with the fields 'prompt' and 'captions': {row!s:.100}.")
    return {row["prompt"]: row["captions"] for row in rows}


def _check(captions: list[str], prompt: str, number: int, source: str) -> list[str]:
    if isinstance(captions, str) or len(captions) < number or not all(isinstance(caption, str) and caption for caption in captions):
        raise ValueError(
            f"{source} has to give a list of at least {number} captions for the prompt {prompt!r}, got {captions!r}. Lower --num_views or add some."
        )
    return list(captions)


@torch.no_grad()
def decoded(run, policy: Policy, samples: Samples) -> list[Outcome]:
    """What was made in this process's batches, on the CPU."""
    with run.accelerator.autocast():
        return [policy.outcome(trajectory).to(torch.float32).to("cpu") for trajectory in samples.batches]


def write_views(run, writer: Writer, samples: Samples, images: list[Outcome], epoch: int) -> list[list[str]]:
    """1 + K captions of each sample, as 1 + K lists of N: the prompts, then `--num_views` drawn for each group.

    Each process writes for its share of the groups. A posterior captioner (`--posterior_views`) gets all images of a group, so
    they are gathered on every process then.
    """
    args, accelerator = run.args, run.accelerator
    pictures = {}
    if args.posterior_views:
        pictures = dict(gather_object([(i, image) for index, batch in zip(samples.index, images) for i, image in zip(index.tolist(), batch.images)]))
    written = []
    for group in samples.groups.unique().tolist()[accelerator.process_index :: accelerator.num_processes]:
        members = (samples.groups == group).nonzero().flatten().tolist()
        prompt = samples.prompts[members[0]]
        captions = writer(prompt, torch.stack([pictures[i] for i in members]) if pictures else None)
        captions = _check(captions, prompt, args.num_views, args.views)
        written.append((group, random.Random(f"{args.seed}/{epoch}/{group}/views").sample(captions, args.num_views)))
    drawn = dict(gather_object(written))
    return [samples.prompts, *([drawn[group][k] for group in samples.groups.tolist()] for k in range(args.num_views))]


def view_rewards(run, reward, samples: Samples, images: list[Outcome], captions: list[list[str]]) -> Tensor:
    """Rewards of the same images under each view, (N, 1 + K) on all processes; column 0 is the samples' own."""
    device = run.accelerator.device
    others = [score_again(run, reward, samples, lambda b: images[b].to(device), view) for view in captions[1:]]
    return torch.stack([samples.rewards, *others], 1)


def view_trajectories(run, policy: Policy, samples: Samples, captions: list[list[str]], steps: list[int]) -> list[list[Trajectory]]:
    """For each of this process's batches, its trajectory under each view: other prompts, and the log-probabilities that the recorded actions of
    `steps` have under them and the current weights. Before the first update those are of the policy that sampled. The first view is the
    batch itself."""
    views = []
    policy.expect_prompts(view[i] for view in captions for index in samples.index for i in index.tolist())
    for trajectory, index in zip(samples.batches, samples.index):
        others = [replace(trajectory.condition, prompts=[view[i] for i in index.tolist()]) for view in captions[1:]]
        views.append([trajectory, *(_under(run, policy, trajectory, condition, steps) for condition in others)])
    return views


def _under(run, policy: Policy, trajectory: Trajectory, condition: Condition, steps: list[int]) -> Trajectory:
    with run.accelerator.autocast():
        transitions = policy.transitions(trajectory, steps, condition)
    log_probs = torch.full_like(trajectory.log_probs, torch.nan)
    for k, transition in transitions.items():
        log_probs[:, k] = transition.log_prob(trajectory.actions[:, k])
    return replace(trajectory, condition=condition, log_probs=log_probs)
