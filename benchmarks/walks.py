"""Which of our files one latent of Flow-GRPO, and one pair of Diffusion-DPO, passes on its way to the optimizer: measured, listed and drawn.

    python benchmarks/walks.py --output docs

A small run of each script is traced up to its first optimizer step. A file is on the way if one of its functions is given the latent (the pair) or
returns it, as a tensor or inside of what holds it (a trajectory, a batch, a row). Files that only hand it on, without a look at it, are told
apart in `HANDED_ON`. Writes `walk_latent.png` and `walk_pair.png`; stops if a file on the way has no line in `WHAT_IT_DOES`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from diffusers_align.data.images import LazyImage
from diffusers_align.training import Report, Run

ROOT = Path(__file__).resolve().parents[1]
LATENT, PIXELS = (4, 16, 16), (3, 32, 32)  # of the embedded mini-sd3
SMALL = ("--num_epochs=1", "--train_batch_size=2", "--num_eval_samples=2", "--num_validation_images=2", "--num_inference_steps=3", "--guidance_scale=1")
WHAT_IT_DOES = {
    "training_scripts/train_flow_grpo.py": "says what a step costs: its loss and its KL",
    "training_scripts/train_dpo.py": "says what a pair costs: its loss",
    **{
        f"diffusers_align/{name}.py": what
        for name, what in {
            "driving/scheduler_hook": "stands in for the scheduler's step and calls back",
            "driving/tape": "records state and action; forces them in a replay",
            "schedulers/scheduling_flow_match_sde": "makes the step's Gaussian of state and velocity",
            "schedulers/scheduling_utils": "states in the pipeline's precision; draws, scores",
            "transition": "the Gaussian: sample, log-probability",
            "policy": "rolls out, replays, decodes; encodes, predicts",
            "driving/reproducibility": "walks two steps again: the same?",
            "trajectory": "keeps the states and actions of all steps",
            "training/online/sampling": "the epoch's roll-outs, decoded and scored",
            "training/online/policy_gradient": "replays each batch, step by step, and backward",
            "algorithms/flow_grpo": "the KL to the pretrained model's Gaussian",
            "data/read": "reads and checks a row",
            "data/images": "opens its images when they are asked for",
            "data/augment": "the same crop for both",
            "training/offline/pairs_and_batches": "rows to batches, images to both sides of a pair",
            "training/offline/data_latents": "latents of the images, computed once",
            "driving/latent_layout": "encodes as the pipeline decodes",
            "training/offline/noised_latents": "the same noise and time for both; errors",
            "forward_process": "noising, and what the model is asked for",
            "driving/prediction": "the model's output at given latents and times",
            "rl/matching": "the error of an output",
            "training/offline/descent": "model and reference, loss, gradient",
        }.items()
    },
}
# They call, count or check what others do with it.
HANDED_ON = {
    f"diffusers_align/{name}.py"
    for name in (
        "checks/ranges", "data/conversions", "driving/driver", "driving/denoiser_gates", "driving/replacements", "training/offline/rows",
        "training/offline/loop", "training/online/group_advantages", "training/online/trained_steps", "training/report/report", "training/run/costs",
        "training/run/inputs", "training/run/run",
    )
}  # fmt: skip


class Trace:
    """Which functions of ours are given something for which `carries` is true, or return it: functions by file, in the order of first touch."""

    def __init__(self, carries: Callable[[object], bool]):
        self.carries, self.functions = carries, {}

    def __call__(self, frame, event: str, value: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith((str(ROOT / "diffusers_align"), str(ROOT / "training_scripts"))):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(self.found(one) for one in ([value] if event == "return" else map(frame.f_locals.get, names))):
            self.functions.setdefault(os.path.relpath(code.co_filename, ROOT), {}).setdefault(code.co_name, None)

    def found(self, value: object, depth: int = 0) -> bool:
        """Whether `value` is it, or holds it within three levels of lists, dicts and dataclasses of ours."""
        if self.carries(value):
            return True
        if depth > 2 or isinstance(value, torch.Tensor):
            return False
        if isinstance(value, (list, tuple)):
            return any(self.found(one, depth + 1) for one in value[:4])
        if isinstance(value, dict):
            return any(self.found(one, depth + 1) for one in list(value.values())[:8])
        ours = type(value).__module__.startswith("diffusers_align") and dataclasses.is_dataclass(value)
        return ours and any(self.found(one, depth + 1) for one in vars(value).values())


def is_latent(value: object) -> bool:
    """A batch of states, noises, velocities or means of them."""
    return isinstance(value, torch.Tensor) and tuple(value.shape[-3:]) == LATENT


def is_of_pair(value: object) -> bool:
    """An image of a pair as a file, as pixels, or as latents."""
    return isinstance(value, LazyImage) or is_latent(value) or (isinstance(value, torch.Tensor) and tuple(value.shape[-3:]) == PIXELS)


def script(name: str):
    """A training script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "training_scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Arrived(Exception):
    """The latent is at the optimizer."""


def traced(module, begin: str, carries: Callable[[object], bool], flags: list[str]) -> dict[str, dict[str, None]]:
    """Run a script until its first optimizer step, traced from its first call of its function `begin` on."""
    trace, start, step, evaluation = Trace(carries), getattr(module, begin), Run.optimizer_step, Report.start

    def started(*args, **kwargs):
        sys.setprofile(trace)
        return start(*args, **kwargs)

    def arrived(run, *args, **kwargs):
        sys.setprofile(None)
        run.finished = True
        raise _Arrived

    setattr(module, begin, started)
    Run.optimizer_step, Report.start = arrived, lambda report: None  # the evaluation before the training has samples of its own
    try:
        with contextlib.suppress(_Arrived), open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            module.main([*flags, "--pretrained_model_name_or_path=mini-sd3", '--call_kwargs={"max_sequence_length": 1}', *SMALL])
    finally:
        sys.setprofile(None)
        Run.optimizer_step, Report.start = step, evaluation
    return trace.functions


def walk_of_a_latent(folder: Path) -> dict[str, dict[str, None]]:
    """From `sample_epoch` of train_flow_grpo.py to the first optimizer step."""
    flags = ["--prompts=mini_train", "--reward=jpeg_compressibility", "--num_prompts_per_epoch=2", "--group_size=2", f"--output_dir={folder / 'run'}"]
    return traced(script("train_flow_grpo"), "sample_epoch", is_latent, flags)


def walk_of_a_pair(folder: Path) -> dict[str, dict[str, None]]:
    """From `load_rows` of train_dpo.py to the first optimizer step."""
    images = folder / "pairs"
    images.mkdir()
    for number, color in enumerate(("red", "blue", "green", "white")):
        Image.new("RGB", PIXELS[1:], color).save(images / f"{number}.png")
    rows = [f'{{"prompt": "a fox", "image_0": "{i}.png", "image_1": "{i + 1}.png", "label_0": 1.0}}\n' for i in (0, 2)]
    (images / "pairs.jsonl").write_text("".join(rows))
    flags = [f"--dataset_name={images / 'pairs.jsonl'}", "--num_samples_per_epoch=2", f"--output_dir={folder / 'run'}"]
    return traced(script("train_dpo"), "load_rows", is_of_pair, flags)


def drawn(title: str, steps: list[tuple[str, str]], handed_on: list[str], file: Path) -> None:
    """The walk as a picture, from top to bottom in two columns; the file's own text says the same."""
    half = -(-len(steps) // 2)
    figure = Figure(figsize=(11, 0.62 * half + 1.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 2), ylim=(-half - 0.9, 0.9))
    axes.axis("off")
    axes.text(0.03, 0.45, title, fontsize=14, weight="bold")
    for number, (name, what) in enumerate(steps):
        left, top = (0.03, -number) if number < half else (1.03, half - number)
        axes.add_patch(FancyBboxPatch((left, top - 0.72), 0.9, 0.6, boxstyle="round,pad=0.01,rounding_size=0.02", fc="#eef0fa", ec="#3f51b5", lw=1))
        axes.text(
            left + 0.02, top - 0.33, f"{number + 1}  {name.removeprefix('diffusers_align/')}", fontsize=10, weight="bold", va="center", family="monospace"
        )
        axes.text(left + 0.06, top - 0.58, what, fontsize=9.5, va="center")
    names = ", ".join(name.removeprefix("diffusers_align/") for name in handed_on)
    axes.text(0.03, -half - 0.55, f"Handed on, without a look at it: {names}", fontsize=9, color="#555555", va="center", wrap=True)
    figure.savefig(file, dpi=100, metadata={"walk": "\n".join(name for name, _ in steps)})


def told_apart(functions: dict[str, dict[str, None]]) -> tuple[list[tuple[str, str]], list[str]]:
    """The files that do something with it, each with a line, and those that hand it on.

    Raises:
        ValueError: a file has no line.
    """
    if unknown := [name for name in functions if name not in WHAT_IT_DOES and name not in HANDED_ON]:
        raise ValueError(f"On the way, but without a line in WHAT_IT_DOES or HANDED_ON: { {name: [*functions[name]] for name in unknown} }")
    return [(name, WHAT_IT_DOES[name]) for name in functions if name in WHAT_IT_DOES], [name for name in functions if name in HANDED_ON]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs", help="folder of the pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, title, walk in (
        ("latent", "One latent through an epoch of Flow-GRPO", walk_of_a_latent),
        ("pair", "One pair through Diffusion-DPO", walk_of_a_pair),
    ):
        with tempfile.TemporaryDirectory() as folder:
            functions = walk(Path(folder))
        for file, own in functions.items():
            print(name, file, *own)
        steps, handed_on = told_apart(functions)
        print(f"{title}: {len(steps)} files, and {len(handed_on)} that hand it on")
        drawn(title, steps, handed_on, Path(args.output) / f"walk_{name}.png")


if __name__ == "__main__":
    main()
