"""What `--cache_dir` saves: one epoch of Diffusion-DPO without a cache, while it is filled, and from it, in one process.

    python benchmarks/latent_cache.py --repeats 5

Reading and encoding (images to latents, prompts to embeddings) are timed by themselves, and within a whole epoch of training. On the embedded
models, and on mini-sd with a text encoder and an autoencoder of realistic weight beside the denoiser (random, built here). Processor time: wall
time would count what else the machine does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from diffusers_align import embedded
from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.files.paths import front_door
from diffusers_align.training.offline.descent import Reference, descend
from diffusers_align.training.offline.loop import load_policy
from diffusers_align.training.offline.pairs_and_batches import Examples, pairs_of
from diffusers_align.training.offline.rows import load_rows
from diffusers_align.training.report.pictures import to_pil
from diffusers_align.training.run.run import Run

PAIRS, BATCH = 16, 8
MODES = ("no cache", "cold", "warm")


def heavy(folder: Path) -> Path:
    """mini-sd with random networks in the proportions of a large model: text encoder 19 M, autoencoder 2.5 M, UNet 4.3 M."""
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd"))
    larger = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    text = type(pipeline.text_encoder.config)(**pipeline.text_encoder.config.to_dict() | larger)
    vae = dict(pipeline.vae.config) | {"block_out_channels": [64 * 2**i for i in range(len(pipeline.vae.config.block_out_channels))], "norm_num_groups": 16}
    unet = dict(pipeline.unet.config) | {"cross_attention_dim": 512}
    pipeline.register_modules(
        text_encoder=CLIPTextModel(text).eval(), vae=AutoencoderKL.from_config(vae).eval(), unet=UNet2DConditionModel.from_config(unet).eval()
    )
    pipeline.save_pretrained(folder)
    return folder


def make_data(folder: Path, size: int) -> Path:
    """Random images; what they show does not matter here."""
    rows = []
    for i in range(PAIRS):
        for side in range(2):
            to_pil(torch.rand(3, size, size)).save(folder / f"{i}_{side}.png")
        rows.append({"prompt": f"a picture of number {i}", "image_0": f"{i}_0.png", "image_1": f"{i}_1.png", "label_0": 1})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


class Session:
    """A run of train_dpo.py up to its loop."""

    def __init__(self, model: str, call: dict, data: Path, folder: Path, cache: Path | None):
        spec = importlib.util.spec_from_file_location("train_dpo", front_door("training_scripts", "train_dpo"))
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        flags = {"pretrained_model_name_or_path": model, "call_kwargs": json.dumps(call), "dataset_name": data, "output_dir": folder, "rank": 8}
        flags |= {"num_samples_per_epoch": PAIRS, "train_batch_size": BATCH, "num_inference_steps": 2, "guidance_scale": 1}
        flags |= {"cache_dir": cache} if cache else {}
        self.run = Run(script.parse_args([f"--{name}={value}" for name, value in flags.items()]), "Diffusion-DPO")
        self.run.finished = True  # there is no loop to come to the end of
        self.num_batches, _ = self.run.batches(PAIRS)
        self.rows = load_rows(self.run, "pair")
        self.policy = load_policy(self.run)
        self.policy.remember_prompts(1, self.policy.prompt_memory.store)  # an epoch's batches are not met again
        self.run.load_optimizer(100)
        self.examples, self.reference = Examples(self.run, self.policy, self.rows), Reference(self.run, self.policy)

    def encode(self, epoch: int) -> None:
        """Everything that a cache may save, with no denoiser in it."""
        for b in range(self.num_batches):
            places = self.examples.positions(epoch, b)
            condition, (images, *_) = self.examples.condition(places), pairs_of(self.rows, places, self.policy.device)
            for side in images:
                self.examples.latents(side, places, condition)
            with torch.no_grad():
                self.policy.drive(condition, lambda step: step.skip() or step.sample, needs_denoiser=lambda k: False)

    def train(self, epoch: int) -> None:
        for b in range(self.num_batches):
            sides, *_ = self.examples.pairs(epoch, b)
            self.reference(*sides)

            def loss(winner, loser):
                return diffusion_dpo_loss(winner.error, loser.error, *(side.ref_error for side in sides), beta=2000)

            descend(self.run, self.policy, loss, sides, 1 / BATCH)
            self.run.optimizer_step()


def measure(model: str, call: dict, repeats: int, work: Path) -> dict[str, dict[str, float]]:
    """Median seconds of processor time of an epoch, by what is timed and by mode."""
    size = embedded_size(model)
    data = make_data(work, size)
    times = {part: {mode: [] for mode in MODES} for part in ("encode", "train")}
    for repeat in range(repeats + 1):
        for part in times:
            cache = work / f"cache-{part}-{repeat}"
            for mode in MODES:  # cold fills what warm reads
                session = Session(model, call, data, work / "run", None if mode == "no cache" else cache)
                getattr(session, part)(0)  # whatever is found out once
                for file in cache.rglob("*.safetensors") if mode == "cold" else ():
                    file.unlink()
                start = time.process_time()
                getattr(session, part)(1)
                if repeat:
                    times[part][mode].append(time.process_time() - start)
    return {part: {mode: statistics.median(values) for mode, values in modes.items()} for part, modes in times.items()}


def embedded_size(model: str) -> int:
    """Pixels of the pipeline's images by default."""
    pipeline = DiffusionPipeline.from_pretrained(embedded.path(model) if model in embedded.NAMES else model)
    return pipeline.vae_scale_factor * int(pipeline.default_sample_size if hasattr(pipeline, "default_sample_size") else pipeline.unet.config.sample_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"Seconds of processor time of an epoch of {PAIRS} pairs, medians of {args.repeats}.\n")
    print("| model | part | no cache | filling the cache | from the cache | no cache / from the cache |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = {"mini-sd3": ("mini-sd3", {"max_sequence_length": 1}), "mini-sd": ("mini-sd", {})}
        models["heavy encoders"] = (str(heavy(Path(folder) / "heavy")), {})
        for name, (model, call) in models.items():
            (work := Path(folder) / name.replace(" ", "-")).mkdir()
            found = measure(model, call, args.repeats, work)
            for part, label in (("encode", "reading and encoding"), ("train", "whole epoch")):
                seconds = [found[part][mode] for mode in MODES]
                print(f"| {name} | {label} | {' | '.join(f'{s:.3f}' for s in seconds)} | {seconds[0] / seconds[2]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
