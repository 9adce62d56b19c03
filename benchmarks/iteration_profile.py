"""Where one training iteration goes: seconds in denoiser, backward, autoencoder, reward, optimizer, and in everything else.

    python benchmarks/iteration_profile.py flow_grpo
    python benchmarks/iteration_profile.py ddpo

Runs the training script on the embedded model for three epochs and reports the median epoch.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch

from diffusers_align.files.paths import front_door
from diffusers_align.training.online import sampling
from diffusers_align.training.run import run as run_module

RECIPES = {"flow_grpo": "flow_grpo_mini_sd3.yaml", "ddpo": "ddpo_mini_sd.yaml"}
SPENT: dict[str, float] = defaultdict(float)


@contextmanager
def timed(name: str):
    """Charge the time inside to `name`, nested timers' time to themselves only."""
    start, before = time.perf_counter(), sum(SPENT.values())
    try:
        yield
    finally:
        SPENT[name] += time.perf_counter() - start - (sum(SPENT.values()) - before)


def wrap(owner, attribute: str, name: str) -> None:
    original = getattr(owner, attribute)

    def timed_call(*args, **kwargs):
        with timed(name):
            return original(*args, **kwargs)

    setattr(owner, attribute, timed_call)


class ProfiledRun(run_module.Run):
    """A run that times its parts and prints each epoch's share."""

    epochs_seen: list[dict[str, float]] = []

    def load_policy(self, **fields):
        policy = super().load_policy(**fields)
        for module in policy.denoisers.values():
            wrap(module, "forward", "denoiser, forward")
        wrap(policy.pipeline.vae, "decode", "autoencoder")
        wrap(self.accelerator, "backward", "backward")
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(policy.pipeline, name, None) is not None:
                wrap(getattr(policy.pipeline, name), "forward", "text encoders")
        return policy

    def load_optimizer(self, steps):
        super().load_optimizer(steps)
        wrap(self.optimizer, "step", "optimizer")

    def epochs(self):
        for epoch in super().epochs():
            SPENT.clear()
            start = time.perf_counter()
            yield epoch
            total = time.perf_counter() - start
            self.epochs_seen.append({**SPENT, "everything else": total - sum(SPENT.values()), "total": total})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=list(RECIPES))
    args = parser.parse_args()
    script = front_door("training_scripts", f"train_{args.algorithm}")
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Run = ProfiledRun
    wrap(sampling, "score", "reward")
    recipe = Path(script).parent / "recipes" / RECIPES[args.algorithm]
    with tempfile.TemporaryDirectory() as folder:
        small = ["--num_epochs", "3", "--num_eval_samples", "2", "--num_validation_images", "2", "--validation_epochs", "99", "--checkpointing_epochs", "99"]
        module.main(["--config", str(recipe), "--output_dir", folder, *small])
    print(
        f"\n{args.algorithm}, median of {len(ProfiledRun.epochs_seen)} epochs, {torch.get_num_threads()} threads\n\n| part | seconds | share |\n|---|---|---|"
    )
    medians = {name: statistics.median(epoch.get(name, 0.0) for epoch in ProfiledRun.epochs_seen) for name in ProfiledRun.epochs_seen[-1]}
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"| {name} | {seconds:.2f} | {seconds / medians['total']:.0%} |")


if __name__ == "__main__":
    main()
