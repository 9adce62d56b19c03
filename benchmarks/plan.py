"""`diffusers-align plan` against the runs that it is of, and its table for models of the Hub.

    python -m benchmarks.plan check --model embedded --model larger
    python -m benchmarks.plan table

Check: each script runs two epochs on the CPU; the second is measured, above what was there before it, by the meter that a plan uses and by torch's own
record of its allocator. The larger models have the embedded ones' architecture and random weights, 40 to 65 million of them in the denoiser.
Table: no weights and no network; the figures are computed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel

from diffusers_align import embedded
from diffusers_align.plan import Plan, command, plan
from diffusers_align.plan.meter import Meter, Work
from diffusers_align.plan.report import COLUMNS, markdown
from diffusers_align.training import Run

REWARD = "def brightness(images, prompts, **columns):\n    return images.flatten(1).mean(1)\n"
SHORT = {"mini-sd3": {"call_kwargs": '{"max_sequence_length": 1}'}, "mini-sd": {}}
SAMPLED = {"num_inference_steps": "4", "guidance_scale": "1.0", "rank": "8", "lora_alpha": "8", "num_eval_samples": "2", "num_validation_images": "1"}
ONLINE = {**SAMPLED, "train_batch_size": "4"}
# Script, embedded model, flags.
CASES: dict[str, tuple[str, str, dict[str, str]]] = {
    "DDPO": ("train_ddpo", "mini-sd", {**ONLINE, "num_samples_per_epoch": "8"}),
    "Flow-GRPO": ("train_flow_grpo", "mini-sd3", {**ONLINE, "num_prompts_per_epoch": "2", "group_size": "4", "kl_weight": "0.01"}),
    "Flow-GRPO, checkpointed": ("train_flow_grpo", "mini-sd3", {**ONLINE, "num_prompts_per_epoch": "2", "group_size": "4", "gradient_checkpointing": ""}),
    "DPO": ("train_dpo", "mini-sd3", {**ONLINE, "num_samples_per_epoch": "8"}),
    "DRaFT-1": ("train_draft", "mini-sd3", {**ONLINE, "num_samples_per_epoch": "8", "method": "draft_k", "truncation": "1"}),
    "Adjoint Matching": ("train_adjoint_matching", "mini-sd3", {**ONLINE, "num_prompts_per_epoch": "8", "last_steps": "2", "random_steps": "1"}),
}
# Of the embedded denoisers, what is larger.
WIDER = {
    "transformer": (SD3Transformer2DModel, {"num_layers": 6, "num_attention_heads": 8, "attention_head_dim": 64, "caption_projection_dim": 512}),
    "unet": (UNet2DConditionModel, {"block_out_channels": (192, 384, 384)}),
}
# A row of the table: recipe, what is changed of it.
ROWS = (
    ("ddpo_sd15", {}),
    ("dpo_sdxl", {}),
    ("flow_grpo_sd35", {"mixed_precision": "bf16"}),
    ("flow_grpo_flux", {}),
    ("flow_grpo_flux", {"pretrained_model_name_or_path": "Qwen/Qwen-Image", "guidance_scale": None, "call_kwargs": '{"true_cfg_scale": 4.0}'}),
    ("vader_wan", {}),
    ("vader_wan", {"pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}),
)


def larger(name: str, folder: Path) -> Path:
    """An embedded pipeline, or one made of it, with a wider denoiser of random weights, saved."""
    pipe = DiffusionPipeline.from_pretrained(name if Path(name).is_dir() else embedded.path(name))
    part = next(part for part in WIDER if hasattr(pipe, part))
    torch.manual_seed(0)
    pipe.register_modules(**{part: wider(part, getattr(pipe, part).config)})
    pipe.save_pretrained(folder)
    return folder


def wider(part: str, config: dict) -> torch.nn.Module:
    """A denoiser of 40 to 65 million random weights, otherwise as this config has it."""
    cls, sizes = WIDER[part]
    return cls.from_config({key: value for key, value in {**config, **sizes}.items() if not key.startswith("_")})


def task(folder: Path) -> dict[str, str]:
    """Flags of prompts, reward and pairs of pictures."""
    from PIL import Image

    (folder / "reward.py").write_text(REWARD)
    prompts = [f"a {color} fox" for color in ("red", "blue", "green", "white")]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    rows = []
    for i in range(8):
        for side in ("chosen", "rejected"):
            Image.new("RGB", (32, 32), (25 * i, 100, 200 if side == "chosen" else 10)).save(folder / f"{side}{i}.png")
        rows.append({"prompt": prompts[i % 4], "chosen": f"chosen{i}.png", "rejected": f"rejected{i}.png"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"prompts": str(folder / "prompts.txt"), "reward": f"{folder / 'reward.py'}:brightness", "dataset_name": str(folder / "pairs.jsonl")}


def words(flags: dict[str, str]) -> list[str]:
    """As on a command line; an empty value is a bare flag."""
    return [word for name, value in flags.items() for word in ([f"--{name}", value] if value else [f"--{name}"])]


@contextmanager
def second_epoch(found: list[Work], kept: list[int]) -> Iterator[None]:
    """Context: the second epoch of a run is measured, by the meter, and for the third by torch's profiler."""
    epochs = Run.epochs

    def measured(run: Run) -> Iterator[int]:
        meter = Meter()
        for epoch in epochs(run):
            with ExitStack() as stack:
                if epoch == 1:
                    found.append(stack.enter_context(meter.measure()))
                if epoch == 2:
                    record = stack.enter_context(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True))
                yield epoch
            if epoch == 2:
                kept.append(allocated(record))

    with mock.patch.object(Run, "epochs", measured):
        yield


def allocated(record: torch.profiler.profile) -> int:
    """The peak of what was allocated and not yet freed, in bytes, above the start."""
    live = peak = 0
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def flags_of(name: str, model: str, folder: Path) -> tuple[str, dict[str, str]]:
    """The script and the flags of a case."""
    script, base, own = CASES[name]
    given = task(folder)
    common = {"pretrained_model_name_or_path": model, **SHORT[base], **own, "output_dir": str(folder / "out"), "validation_epochs": "99", "allow_no_signal": ""}
    return script, common | {flag: given[flag] for flag in (("dataset_name",) if script == "train_dpo" else ("prompts", "reward"))}


def run(name: str, model: str, folder: Path, profiled: bool = False) -> tuple[Work, int]:
    """What an epoch of the real script takes above what there was, by the meter and, if `profiled`, by the allocator's own record."""
    script, flags = flags_of(name, model, folder)
    works, kept = [], [0]
    with second_epoch(works, kept):
        command.module_of(script).main([*words(flags), "--num_epochs", "3" if profiled else "2"])
    costs = json.loads((folder / "out" / "costs.json").read_text())
    epochs = 3 if profiled else 2
    with_gradients = costs["denoiser_evaluations_with_gradients"]
    works[0].rows.update({True: with_gradients // epochs, False: (costs["denoiser_evaluations"] - with_gradients) // epochs})
    return works[0], kept[-1]


def planned(name: str, model: str, folder: Path) -> Plan:
    """The plan of the same."""
    script, flags = flags_of(name, model, folder)
    return command.planned(words(flags), script=script, as_on_gpu=False)


def of_an_epoch(made: Plan) -> int:
    """The peak of an epoch above what there was before it, in bytes: gradients are made anew in each."""
    return made.stored + made.state["gradients"] + made.activations


def check(models: list[str], cases: list[str]) -> None:
    print("| model | script | epoch's peak, planned | measured | allocator's | kept for backward, planned | measured | rows, planned | counted |")
    print("|" + "---|" * 9)
    for kind in models:
        for name in cases:
            base, folder = CASES[name][1], Path(tempfile.mkdtemp())
            model = base if kind == "embedded" else str(larger(base, folder / "model"))
            made, (work, record) = planned(name, model, folder), run(name, model, folder, profiled=True)
            shutil.rmtree(folder)
            kept = max(stage.work.kept for stage in made.stages)
            sizes = [f"{size / 2**20:.1f} MiB" for size in (of_an_epoch(made), work.peak, record, kept, work.kept)]
            print(f"| {base if kind == 'embedded' else f'{base}, wider'} | {name} | {' | '.join(sizes)} | {sum(made.rows)} | {work.rows.total()} |", flush=True)


def table() -> None:
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for recipe, changes in ROWS:
        print(markdown(plan(recipe, **changes)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "table"])
    parser.add_argument("--model", action="append", choices=["embedded", "larger"], help="of a check; may be repeated")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="of a check; all if absent")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    check(args.model or ["embedded"], args.cases) if args.what == "check" else table()


if __name__ == "__main__":
    sys.exit(main())
