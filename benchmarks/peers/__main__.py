"""Duels: a training epoch of ours beside the same of other programs, and beside the bare denoiser's.

    python -m benchmarks.peers ddpo alignprop dpo --ddpo_pytorch ~/ddpo-pytorch --diffusers_dpo ~/train_diffusion_dpo.py --trl_python ~/trl/bin/python
    python -m benchmarks.peers flow_grpo --larger

Nothing is fetched: a peer runs where its checkout or interpreter is given. Each worker is a process on one thread that does an epoch when it is its turn; the
first round is thrown away. Seconds are of processor time, medians; ratios are medians of each round's, with the extremes in brackets. Denoiser calls, rows,
optimizer steps and trained weights are counted, and a duel of unequal ones fails. `limit` is the denoiser with the same LoRA, forward and backward on ready
inputs, the autoencoder and AdamW, and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.peers.tasks import PEERS, REWARD, SIZES, Task
from benchmarks.peers.turns import Player, check, play, table


def prepared(method: str, larger: bool, folder: Path) -> Task:
    """The task, with its model, its reward and its pairs in the folder."""
    from benchmarks import plan
    from diffusers_align import embedded

    base, small, big = SIZES[method]
    plan.task(folder)  # pairs of pictures
    pairs = (folder / "pairs.jsonl").read_text()
    sizes = big if larger else small
    lines = (pairs.splitlines() * sizes["batches"] * sizes["batch"])[: sizes["batches"] * sizes["batch"]]
    (folder / "pairs.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "reward.py").write_text(REWARD)
    model = plan.larger(base, folder / "model") if larger else embedded.path(base)
    return Task(method, str(model), str(folder), **sizes)


def players(task: Task, args: argparse.Namespace) -> list[Player]:
    """The workers of a task that can be had."""
    where = {"limit": (sys.executable, None), "ours": (sys.executable, None)}
    if args.trl_python:
        where["trl"] = (args.trl_python, None)
    if args.ddpo_pytorch:
        where["ddpo_pytorch"] = (args.peer_python or sys.executable, args.ddpo_pytorch)
    if args.diffusers_dpo:
        where["diffusers_dpo"] = (args.peer_python or sys.executable, args.diffusers_dpo)
    made, given = [], json.dumps(dataclasses.asdict(task))
    for name in ("limit", "ours", *PEERS[task.method]):
        if name in where:
            python, path = where[name]
            command = [python, "-m", "benchmarks.peers.worker", name, given, *([str(Path(path).resolve())] if path else [])]
            made.append(Player(name, command, Path(task.folder) / f"{name}.log"))
        else:
            print(f"{name} is left out: no flag says where it is", flush=True)
    return made


def duel(method: str, args: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"{method}-"))
    task = prepared(method, args.larger, folder)
    playing = players(task, args)
    try:
        found = play(playing, args.rounds)
    finally:
        for player in playing:
            player.end()
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        name = f"{method}{'_larger' if args.larger else ''}.json"
        (args.output_dir / name).write_text(json.dumps({"task": dataclasses.asdict(task), "epochs": found}))
    check(found, task)
    steps = f", {task.steps} steps" if task.steps else ""
    model = f"{SIZES[method][0]}{', wider' if args.larger else ''}"
    print(f"\n{method}, {model}, batches of {task.batch}: {task.batches}{steps}, {args.rounds} rounds\n\n{table(found)}\n", flush=True)
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=list(SIZES))
    parser.add_argument("--larger", action="store_true", help="a denoiser of random weights, 40 to 65 million of them")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each worker that count")
    parser.add_argument("--trl_python", help="an interpreter that has TRL 0.23.1")
    parser.add_argument("--ddpo_pytorch", type=Path, help="a checkout of kvablack/ddpo-pytorch")
    parser.add_argument("--diffusers_dpo", type=Path, help="train_diffusion_dpo.py of a checkout of diffusers")
    parser.add_argument("--peer_python", help="an interpreter for these two, this one if absent; it needs diffusers, peft, accelerate and datasets")
    parser.add_argument("--output_dir", type=Path, help="keep every epoch's figures there, as JSON")
    args = parser.parse_args()
    for method in args.methods:
        duel(method, args)


if __name__ == "__main__":
    main()
