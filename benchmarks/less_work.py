"""What options that save work in online training cost and bring, each beside the same without it.

    python -m benchmarks.less_work replay
    python -m benchmarks.less_work epochs
    python -m benchmarks.less_work scouting
    python -m benchmarks.less_work gains --output_dir runs/less_work

`replay`: an update's pass over a roll-out: several solver steps in one forward, the rows without the prompt without a gradient. `epochs`: whole epochs of
recipes. Both in turns in one process, on one thread, process time, medians. `scouting`: how far cheap samples foretell the rewards of those trained on.
`gains`: trainings of several seeds, judged on held-out prompts as `benchmarks.frontier` does; what is there is not done again.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from benchmarks.frontier.data import Data, Sizes
from benchmarks.frontier.judging import Bench, Terms
from benchmarks.frontier.methods import ONLINE, Method, settings
from benchmarks.frontier.results import Results, weights_of
from benchmarks.frontier.running import UNWATCHED, Clock, run_script, spent, train
from benchmarks.frontier.tasks import CALL, TASKS
from diffusers_align import Policy, embedded
from diffusers_align.data import load_prompts
from diffusers_align.driving.forwards import Forwards
from diffusers_align.files.levels import digest_of
from diffusers_align.files.paths import find_recipe, front_door
from diffusers_align.rewards import load_reward
from diffusers_align.training.run.costs import Cost
from diffusers_align.training.run.run import Run

STEPS = 6
FORWARDS = {
    "step by step": None,
    "two steps": Forwards(2),
    "all steps": Forwards(STEPS),
    "conditional": Forwards(1, unconditional_gradient=False),
    "both": Forwards(STEPS, unconditional_gradient=False),
}


def process_seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


# replay


def replay_row(model: str, guidance: float, batch: int, repeats: int) -> str:
    policy = Policy(DiffusionPipeline.from_pretrained(embedded.path(model)), num_inference_steps=STEPS, guidance_scale=guidance, **CALL[model])
    policy.add_lora(16, init_lora_weights=False)
    for parameter in policy.trainable_parameters():
        parameter.data.mul_(0.1)
    trajectory = policy.rollout(["a fox on a red background"] * batch, seeds=list(range(batch)))

    def update(forwards: Forwards | None) -> torch.Tensor:
        for parameter in policy.trainable_parameters():
            parameter.grad = None
        policy.replay(trajectory, lambda k, kernel: kernel.mean.square().sum().backward(), forwards=forwards)
        return torch.cat([parameter.grad.flatten() for parameter in policy.trainable_parameters()])

    chosen = {name: forwards for name, forwards in FORWARDS.items() if guidance > 1 or forwards is None or forwards.unconditional_gradient}
    gradients = {name: update(forwards) for name, forwards in chosen.items()}  # and what is found out once
    times = {name: [] for name in chosen}
    for _ in range(repeats):
        for name, forwards in chosen.items():
            times[name].append(process_seconds(lambda forwards=forwards: update(forwards)))
    whole, base = gradients["step by step"], statistics.median(times["step by step"])
    ratios = [f"{statistics.median(times[name]) / base:.2f}" if name in times else "" for name in list(FORWARDS)[1:]]
    error = float((gradients["all steps"] - whole).norm() / whole.norm())
    other = f"{float(torch.nn.functional.cosine_similarity(gradients['conditional'], whole, 0)):+.2f}" if "conditional" in gradients else ""
    return " | ".join(["", model, f"{guidance:g}", str(batch), f"{1000 * base:.0f}", *ratios, f"{error:.0e}", other, ""]).strip()


def replay(args) -> None:
    print("| model | guidance | samples | step by step, ms | two steps | all six | conditional rows | both | error, all six | cosine, conditional |")
    print("|" + "---|" * 10)
    for model in CALL:
        for guidance in (1.0, 4.0):
            for batch in args.batches:
                print(replay_row(model, guidance, batch, args.repeats), flush=True)


# epochs

SMALL = [word for name, value in UNWATCHED.items() if name != "allow_no_signal" for word in (f"--{name}", str(value))]
HALF = ["--num_prompts_per_epoch", "4", "--train_batch_size", "24"]
GUIDED = ["--guidance_scale", "3", *HALF]
PAIRS = {
    "--replay_steps_per_forward 2": ("train_flow_grpo", "flow_grpo_mini_sd3", HALF, [], ["--replay_steps_per_forward", "2"]),
    "--replay_steps_per_forward 2, groups of 2": (
        "train_flow_grpo", "flow_grpo_mini_sd3", [*HALF, "--group_size", "2", "--num_prompts_per_epoch", "2", "--train_batch_size", "4"], [],
        ["--replay_steps_per_forward", "2"],
    ),
    "--no-unconditional_gradient, guidance 3": ("train_flow_grpo", "flow_grpo_mini_sd3", GUIDED, [], ["--no-unconditional_gradient"]),
    "--kl_share 0.5": ("train_flow_grpo", "flow_grpo_mini_sd3", HALF, [], ["--kl_share", "0.5"]),
    "--share_prefix, --sde_window 2 4": (
        "train_flow_grpo", "flow_grpo_mini_sd3", [*HALF, "--sde_window", "2", "4"], ["--no-share_prefix"], ["--share_prefix"],
    ),
    "--no-checkpoint_steps (default), DRaFT-1": (
        "train_draft", "draft_mini_sd3", ["--truncation", "1", "--num_samples_per_epoch", "48"], ["--checkpoint_steps"], ["--no-checkpoint_steps"],
    ),
}  # fmt: skip


def run_in_turn(script: str, argv: list[str], turn: Connection) -> None:
    """In a process of its own: each epoch begins when asked for, and answers with its process seconds."""
    torch.set_num_threads(1)

    class Timed(Run):
        def epochs(self):
            for epoch in super().epochs():
                turn.recv()
                start = time.process_time()
                yield epoch
                turn.send(time.process_time() - start)

    spec = importlib.util.spec_from_file_location(script, front_door("training_scripts", script))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Run = Timed
    module.main(argv)


def in_turns(script: str, variants: list[list[str]], number: int) -> tuple[list[list[float]], list[int]]:
    """Of runs that take turns, the process seconds of their epochs, the first one left out, and the denoiser rows of all epochs."""
    context, turns, processes, folders = multiprocessing.get_context("spawn"), [], [], []
    for argv in variants:
        ours, theirs = context.Pipe()
        folders.append(Path(tempfile.mkdtemp()))
        own = [*argv, "--num_epochs", str(number + 1), "--output_dir", str(folders[-1])]
        processes.append(context.Process(target=run_in_turn, args=(script, own, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        turns.append(ours)
    times = []
    for _ in range(number + 1):
        times.append([])
        for turn in turns:
            turn.send(None)
            times[-1].append(turn.recv())
    for process in processes:
        process.join()
    return [list(column) for column in zip(*times[1:])], [Cost.read(folder).denoiser_evaluations for folder in folders]


def epochs(args) -> None:
    rows = ["| option | recipe | without, s an epoch | with, s | with / without, medians of pairs [least, most] | denoiser rows |"]
    rows.append("|---" * 6 + "|")
    for name, (script, recipe, common, without, own) in PAIRS.items():
        if args.only and not name.startswith(args.only):
            continue
        argv = ["--config", str(find_recipe(recipe)), *common, *SMALL]
        (plain, less), (all_rows, fewer) = in_turns(script, [[*argv, *without], [*argv, *own]], args.epochs)
        ratios, medians = sorted(b / a for a, b in zip(plain, less)), [statistics.median(times) for times in (plain, less)]
        spread = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        rows.append(f"| `{name}` | `{recipe}` | {medians[0]:.2f} | {medians[1]:.2f} | {spread} | {fewer / all_rows - 1:+.0%} |")
    print("\n".join(rows))


# scouting


@torch.no_grad()
def scouting(args) -> None:
    """Correlations within prompts of the rewards of cheap samples with those of six steps, along the ODE and with the recipe's noise."""
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    policy, reward = Policy(pipeline, num_inference_steps=STEPS, guidance_scale=1.0, **CALL["mini-sd3"]), load_reward("background_color")
    prompts = load_prompts("likes_blue_train")[:8]

    def scores(number: int, steps: int, deterministic: bool) -> torch.Tensor:
        found = []
        for p, prompt in enumerate(prompts):
            columns = {name: [value] * number for name, value in prompt.columns.items()}
            condition = policy.condition([prompt.text] * number, seeds=[1000 * p + i for i in range(number)], num_inference_steps=steps)
            found.append(reward(policy.decode(policy.rollout(condition, deterministic=deterministic).final), [prompt.text] * number, **columns))
        return torch.stack(found)

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
        return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())

    scouts = {steps: scores(args.samples, steps, True) for steps in (1, 2, 3)}
    print("| reward of | scouts of 1 step | 2 steps | 3 steps |\n|---|---|---|---|")
    for name, window, deterministic in (("the ODE", None, True), ("noise in all steps", None, False), ("noise in steps 0 and 1", [0, 2], False)):
        policy.scheduler.register_to_config(sde_window=window)
        full = scores(args.samples, STEPS, deterministic)
        print(f"| {name} | " + " | ".join(f"{correlation(found, full):.2f}" for found in scouts.values()) + " |", flush=True)


# gains

# Half of the recipes' prompts an epoch, so that there are as many updates in half of the rows.
HALF_SIZE, BUDGET = {"num_prompts_per_epoch": 4, "train_batch_size": 24}, 4000
OWN = {**HALF_SIZE, "same_latent": False}
POOL = {"scout_pool": 36, "scout_steps": 1}
GAINS = {
    "DiffusionNFT": (Method(ONLINE, "nft_mini_sd3", settings={**HALF_SIZE, "gradient_accumulation_steps": 2}), BUDGET),
    "DiffusionNFT, --scout_pool 36 --scout_steps 1": (
        Method(ONLINE, "nft_mini_sd3", settings={**HALF_SIZE, "gradient_accumulation_steps": 2, **POOL}),
        BUDGET,
    ),
    "Flow-GRPO, one initial noise a group": (Method(ONLINE, "flow_grpo_mini_sd3", settings=HALF_SIZE), BUDGET),
    "Flow-GRPO, each its own": (Method(ONLINE, "flow_grpo_mini_sd3", settings=OWN), BUDGET),
    "Flow-GRPO, each its own, --scout_pool 36 --scout_steps 1": (Method(ONLINE, "flow_grpo_mini_sd3", settings={**OWN, **POOL}), BUDGET),
    "Flow-GRPO, 8 epochs": (Method(ONLINE, "flow_grpo_mini_sd3", settings={**HALF_SIZE, "num_epochs": 8}), None),
    "Flow-GRPO, 8 epochs, --kl_share 0.5": (Method(ONLINE, "flow_grpo_mini_sd3", settings={**HALF_SIZE, "num_epochs": 8, "kl_share": 0.5}), None),
}


def settings_of(method: Method) -> dict:
    return settings(method, TASKS["color"], "mini-sd3", TASKS["color"].train, {})


def trained(name: str, seed: int, folder: Path):
    """The folder of the weights, and what they cost."""
    method, budget = GAINS[name]
    own = settings_of(method) | {"seed": seed}
    place = folder / "".join(c if c.isalnum() else "_" for c in name)
    if budget is not None:
        return place / str(seed), train(method.script, own, budget, place / str(seed), place / "probes")
    target = place / str(seed)
    if not any(target.glob("*.safetensors")):
        target.mkdir(parents=True, exist_ok=True)
        run_script(method.script, {**own, **UNWATCHED, "checkpointing_epochs": own["num_epochs"], "output_dir": str(target)}, target)
    return target, spent(target)


def gains(args) -> None:
    task, folder, clock = TASKS["color"], args.output_dir.resolve(), Clock(args.minutes)
    results, weights = Results(folder / "results.jsonl"), weights_of("mini-sd3", [task.reward, task.judge])
    prompts = Data(folder, "color", "mini-sd3", Sizes(), print).prompts(True)
    bench = Bench("color", "mini-sd3", prompts, Terms(3.0, task.judge, args.images, 0), folder / "bases", weights)
    names = [name for name in GAINS if not args.only or name.startswith(args.only)]
    for seed in args.seeds:
        for name in names:
            key = {"task": "color", "model": "mini-sd3", "method": name, "budget": 0, "seed": seed, "guidance": 3.0, "judge": task.judge, "images": args.images,
                   "weights": weights, "settings": digest_of(settings_of(GAINS[name][0]))[:8]}  # fmt: skip
            if key in results or clock.over:
                continue
            place, cost = trained(name, seed, folder)
            row = bench.of_lora(place).row(bench.base)
            results.add({**key, **row, "rows": cost.rows, "drawn": cost.images, "processor_seconds": cost.processor_seconds})
            print(f"{name}, seed {seed}: {row['reward_gain']['mean']:+.3f} ± {row['reward_gain']['se']:.3f}, {cost.rows} rows", flush=True)
    print("| | denoiser rows | images | CPU s | background_color: gain by seed | mean ± s.e. over seeds | scene_score: gain |\n|" + "---|" * 7)
    for name in names:
        found = [row for row in results.all() if row["method"] == name and row["settings"] == digest_of(settings_of(GAINS[name][0]))[:8]]
        if found:
            print(gains_row(name, found))


def gains_row(name: str, found: list[dict]) -> str:
    by_seed, judged = ([row[f"{what}_gain"]["mean"] for row in found] for what in ("reward", "judge"))
    costs = [f"{statistics.mean(row[what] for row in found):,.0f}" for what in ("rows", "drawn", "processor_seconds")]
    error = f" ± {statistics.stdev(by_seed) / len(by_seed) ** 0.5:.3f}" if len(by_seed) > 1 else ""
    means = f"{statistics.mean(by_seed):+.3f}{error} | {statistics.mean(judged):+.3f}"
    return f"| {name} | {' | '.join(costs)} | {', '.join(f'{gain:+.3f}' for gain in by_seed)} | {means} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("replay", "epochs", "scouting", "gains"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=24, help="a prompt, of `scouting`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=96, help="held-out images a model")
    parser.add_argument("--only", help="rows whose name begins so")
    parser.add_argument("--minutes", type=float, help="of `gains`: begin nothing new after so long")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/less_work"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    {"replay": replay, "epochs": epochs, "scouting": scouting, "gains": gains}[args.part](args)


if __name__ == "__main__":
    main()
