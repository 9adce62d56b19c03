"""Where one training iteration goes: seconds in denoiser, backward, autoencoder, text encoders, reward, learned value, optimizer, and in everything else.

    python -m benchmarks.iteration_profile flow_grpo_mini_sd3
    python -m benchmarks.iteration_profile --recipes
    python -m benchmarks.iteration_profile --recipes --own_sizes
    python -m benchmarks.iteration_profile --recipes --larger

With the name of a recipe: the parts of its epoch, in its own sizes. With `--recipes`: a row each of all mini recipes, or of those that are named, in small
sizes (16 samples in batches of 8; with `--own_sizes` the recipe's own; with `--larger` 4 samples of 4 steps in batches of 4, and denoisers of random weights,
40 to 65 million of them). Seconds of processor time on one thread, medians of three epochs after one that is thrown away. Own time is everything outside of
the named parts, so total / parts says what an epoch costs beside those alone. Each recipe is a process of its own; data sets are pictures that are made
here. train_reward.py, which has no pipeline, is not among them.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from benchmarks import plan
from benchmarks.one_thread import call
from benchmarks.parts import REWARD, Parts
from diffusers_align.files.levels import made_by, script_of
from diffusers_align.files.paths import find_recipe, folder
from diffusers_align.plan import command
from diffusers_align.rl.values import ValueNetwork
from diffusers_align.training.online import scoring
from diffusers_align.training.run.run import Run

EPOCHS = 3
NEVER = "999"
EVALUATION = {"num_eval_samples": "2", "num_validation_images": "2", "validation_epochs": NEVER, "checkpointing_epochs": NEVER, "allow_no_signal": ""}
# No recipe has an embedded model for it: what it is tried with.
ALSO = {"vader_mini_sd3": ("train_vader", "draft_mini_sd3", {"method": None, "truncation": None, "backprop_mode": "random"})}
# Keys of a recipe that are no flags of a number of samples, made small.
SMALL = {"num_updates": 10, "update_batch_size": 32, "num_own_epochs": 1}


def recipes() -> list[str]:
    """All that train an embedded model."""
    return sorted([path.stem for path in (folder("training_scripts") / "recipes").glob("*_mini_*.yaml")] + list(ALSO))


def settings(recipe: str) -> tuple[str, dict]:
    """The script of a recipe and what it is given."""
    script, base, changes = ALSO.get(recipe, (None, recipe, {}))
    given = yaml.safe_load(find_recipe(base).read_text(encoding="utf-8")) | changes
    return script or script_of(recipe), {name: value for name, value in given.items() if value is not None}


def small(given: dict, samples: int, batch: int) -> dict:
    """The recipe with so many samples an epoch."""
    sizes = {"num_samples_per_epoch": samples, "train_batch_size": batch, "group_size": min(4, samples // 2), **SMALL}
    sizes["num_prompts_per_epoch"] = samples // sizes["group_size"] if "group_size" in given else samples
    sizes["best_of_n"] = min(given.get("best_of_n") or 2, sizes["group_size"])
    return given | {name: size for name, size in sizes.items() if name in given}


def short(given: dict) -> dict:
    """The recipe in four steps; an edit, which walks a part of its steps, in its own."""
    if "input_columns" in given:
        return given
    changes = {"num_inference_steps": 4, "eval_num_inference_steps": 2}
    if given.get("sde_window"):
        changes["sde_window"] = [min(end, changes["num_inference_steps"]) for end in given["sde_window"]]
    return given | {key: size for key, size in changes.items() if key in given}


def data(given: dict, place: Path, recipe: str) -> dict:
    """A data set of random pictures, as many as an epoch has samples and 32 at least, in the place of the one that the recipe is about, of each kind."""
    for lines in made_by(recipe) if recipe not in ALSO else ():
        words = shlex.split(" ".join(lines))
        if words[0] == "python":
            call([sys.executable, *words[1:]], place / "data.log", place)
    if "dataset_name" not in given:
        return given
    from PIL import Image

    draws, rows, number = random.Random(0), {"pairs": [], "binary": [], "scored": []}, max(32, given.get("num_samples_per_epoch", 0))
    for i in range(number):
        prompt, files = f"a fox on a background of kind {i // 4}", [f"{i}_{side}.png" for side in range(2)]
        for file in files:
            Image.frombytes("RGB", (32, 32), draws.randbytes(32 * 32 * 3)).save(place / file)
        rows["pairs"].append({"prompt": prompt, "image_0": files[0], "image_1": files[1], "label_0": i % 2})
        rows["binary"].append({"prompt": prompt, "image": files[0], "label": bool(i % 2)})
        rows["scored"].append({"prompt": prompt, "image": files[0], "reward": i / number})
    for kind, found in rows.items():
        (place / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    given = given | {"dataset_name": str(place / f"{Path(given['dataset_name']).name}.jsonl")}
    if "outputs" in given:  # which are judged by rewards that know the prompts of the recipe
        (place / "reward.py").write_text(plan.REWARD)
        given |= {"outputs": str(place / "scored.jsonl"), "num_eval_samples": 2, "reward": f"{place / 'reward.py'}:brightness"}
        given = {name: value for name, value in given.items() if name not in ("prompts", "eval_reward", "eval_reward_model")}
    return given


def watch_rewards(parts: Parts) -> None:
    """Rewards that are loaded from now on are measured, whatever they are."""
    load, known = scoring.load_reward, set()

    @functools.wraps(load)
    def loaded(*args, **kwargs):
        reward = load(*args, **kwargs)
        if isinstance(reward, type(loaded)):

            @functools.wraps(reward)
            def measured(*args, **kwargs):
                with parts.timed(REWARD):
                    return reward(*args, **kwargs)

            return measured
        if type(reward) not in known:
            known.add(type(reward))
            parts.wrap(type(reward), "__call__", REWARD)
        return reward

    scoring.load_reward = loaded


def profile(script: str, words: list[str]) -> list[dict[str, float]]:
    """Run a script; what each epoch took but for the first and the last, by part, and `total`."""
    parts, found = Parts(), []
    parts.watch()
    watch_rewards(parts)
    parts.wrap(ValueNetwork, "forward", "learned value")
    original = Run.epochs

    def epochs(run: Run) -> Iterator[int]:
        began = None
        for epoch in original(run):
            if began is not None:
                found.append({**parts.seconds, "total": time.process_time() - began})
            parts.clear()
            began = time.process_time()
            yield epoch

    Run.epochs = epochs
    module = command.module_of(script)
    module.main(words)
    return found[1:]


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """Of each part, with `own` and the peak of the process in MiB."""
    names = dict.fromkeys(name for epoch in found for name in epoch)
    of_all = {name: statistics.median(epoch.get(name, 0.0) for epoch in found) for name in names}
    own = statistics.median(epoch["total"] - sum(value for name, value in epoch.items() if name != "total") for epoch in found)
    return {**of_all, "everything else": own, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def of_recipe(recipe: str, how: str, place: Path) -> dict[str, float]:
    """The medians of a recipe: in its `own` sizes, `small` or `larger`."""
    script, given = settings(recipe)
    if how != "own":
        given = small(given, *((16, 8) if how == "small" else (4, 4)))
    given = data(given, place, recipe)
    if how == "larger":
        given = short(given) | {"pretrained_model_name_or_path": str(plan.larger(given["pretrained_model_name_or_path"], place / "model"))}
    given |= {"output_dir": str(place / "out"), "num_epochs": EPOCHS + 2, **({"cache_dir": str(place / "cache")} if "cache_dir" in given else {})}
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(given))
    return medians(profile(script, ["--config", str(path), *plan.words(EVALUATION)]))


def alone(recipe: str, how: str, place: Path) -> None:
    """In a process of its own: the medians of a recipe to `told.json`, what the script prints to `log.txt`."""
    os.chdir(place)
    with open("log.txt", "w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    Path("told.json").write_text(json.dumps(of_recipe(recipe, how, place)))


def report(recipe: str, how: str) -> str:
    """A row of the table."""
    place = Path(tempfile.mkdtemp(prefix=f"{recipe}-"))
    process = multiprocessing.get_context("fork").Process(target=alone, args=(recipe, how, place))  # what is imported is shared
    process.start()
    process.join()
    if not (place / "told.json").is_file():
        return f"| {recipe} | {(place / 'log.txt').read_text(errors='replace').splitlines()[-1:]} (all of it: {place / 'log.txt'}) |"
    found = json.loads((place / "told.json").read_text())
    own, total = found["everything else"], found["total"]
    shutil.rmtree(place)
    return f"| {recipe} | {total:.2f} | {own:.3f} | {own / total:.1%} | {total / (total - own):.3f} | {found['peak']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RECIPE", help=f"one of {', '.join(recipes())}")
    parser.add_argument("--recipes", action="store_true", help="a row of each, in small sizes")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--own_sizes", action="store_true", help="with --recipes: the sizes of the recipes themselves")
    sizes.add_argument("--larger", action="store_true", help="with --recipes: denoisers of 40 to 65 million weights")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(recipes())):
        parser.error(f"no recipe of an embedded model: {', '.join(unknown)}; --help lists them")
    if not args.recipes and len(args.names) != 1:
        parser.error("name one recipe, or take all with --recipes")
    torch.set_num_threads(1)
    if args.recipes:
        print("| recipe | an epoch, s | own time, s | share | total / parts | peak RSS, MiB |\n|---|---|---|---|---|---|")
        for recipe in args.names or recipes():
            print(report(recipe, "larger" if args.larger else "own" if args.own_sizes else "small"), flush=True)
        return
    (recipe,) = args.names
    found = of_recipe(recipe, "own", Path(tempfile.mkdtemp()))
    peak = found.pop("peak")
    print(f"\n{recipe}, medians of {EPOCHS} epochs, one thread, peak RSS {peak:.0f} MiB\n\n| part | seconds | share |\n|---|---|---|")
    for name, seconds in sorted(found.items(), key=lambda item: -item[1]):
        print(f"| {name} | {seconds:.2f} | {seconds / found['total']:.0%} |")


if __name__ == "__main__":
    main()
