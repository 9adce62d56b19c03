"""Preference data of your own model: sample several images per prompt, score them with any reward, write a data set of each kind.

    accelerate launch training_scripts/make_preferences.py --pretrained_model_name_or_path mini-sd3 --call_kwargs '{"max_sequence_length": 1}' \
        --prompts likes_blue_train --reward background_color --num_images_per_prompt 8 --output_dir my_preferences

Pairs of a foreign generator teach what that generator draws as well as what is preferred; those of the model itself differ by the preference alone.
`images/` holds the images, `pairs`, `binary`, `scored` and `ranked` the data sets (docs/preference_data.md), `contact_sheet.png` a row per prompt, best
image first. An interrupted run goes on where it stopped; with another `--reward` in the same folder, the images are scored anew and not drawn again.
"""

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import PlaceArguments, SeedArguments, SignalArguments
from diffusers_align.training.flags.methods import StrengthArguments
from diffusers_align.training.flags.model import CallArguments, DecodingArguments, PipelineArguments, PrecisionArguments
from diffusers_align.training.flags.options import Count, NonNegative, Probability, Real, option, options_of, parse
from diffusers_align.training.flags.task import InvalidRewardArguments, OneRewardArguments, PromptArguments

NOISY, STRENGTH = {"deterministic": False}, ("sde_type", "noise_level", "eta")


class DrawingArguments(
    PipelineArguments,
    DecodingArguments,
    CallArguments,
    PrecisionArguments,
    StrengthArguments,
    SeedArguments,
    needs={name: NOISY for name in STRENGTH},
    advanced=STRENGTH,
):
    """sampling"""

    lora: str | None = option(None, "of the model to sample from: folder of a run or a checkpoint, .safetensors file, or Hub name")
    batch_size: Count = option(8, "samples at a time, on each process")
    deterministic: bool | None = option(
        None, "the pipeline's own solver, or the SDE twin's noise at each step; its own if absent, unless trajectories are saved"
    )
    same_latent: bool = option(False, "the images of a prompt share their initial noise, as D3PO's pairs do", needs=NOISY)
    save_trajectories: bool = option(False, "keep all states of each image, unrounded, for train_d3po.py --trajectories")

    @model_validator(mode="after")
    def _fill_deterministic(self):
        self.deterministic = not self.save_trajectories if self.deterministic is None else self.deterministic
        if self.deterministic and self.save_trajectories:
            raise ValueError("--save_trajectories: without noise in its steps a trajectory has no log-probabilities; use --no-deterministic")
        return self


class PreferenceArguments(PromptArguments, DrawingArguments, OneRewardArguments, InvalidRewardArguments, SignalArguments, PlaceArguments):
    """reward and data sets"""

    num_prompts: Count | None = option(None, "the first so many; all if absent")
    num_images_per_prompt: Annotated[int, Interval(ge=2, le=10**6)] = option(4, "to compare: two or more")
    pairs: Literal["best_worst", "all"] = option("best_worst", "of the images of a prompt")
    min_margin: NonNegative = option(0.0, "pairs whose rewards differ by less are left out")
    binary_quantile: Probability = option(0.5, "an image is desirable from this quantile of all rewards on", advanced=True)
    binary_threshold: Real | None = option(None, "an image is desirable from this reward on, in the place of the quantile", advanced=True)
    allow_no_signal: bool = option(False, "end with status 0 although no two images of a prompt make a pair", advanced=True)
    num_sheet_prompts: Count = option(32, "rows of the contact sheet", advanced=True)

    @model_validator(mode="after")
    def _check_threshold(self):
        if self.binary_threshold is not None and "binary_quantile" in self.model_fields_set:
            raise ValueError("--binary_threshold takes the place of --binary_quantile: leave out one of them")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(PreferenceArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

import json
import os
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from diffusers_align.data import load_prompts
from diffusers_align.data.augment import to_tensor
from diffusers_align.data.inputs import key_of, sizes_of
from diffusers_align.driving.calls import calls_of
from diffusers_align.driving.stock import stock_images
from diffusers_align.files import lora_finder
from diffusers_align.files.weight_files import digest_of_model
from diffusers_align.policy import Policy, noise_seed
from diffusers_align.schedulers import sde_twin
from diffusers_align.training.flags import common
from diffusers_align.training.offline.made_preferences import data_sets, describe_signal, equal_images, file_name, scored_groups
from diffusers_align.training.online.scoring import Scorer, gather_scores, reward_of_flags
from diffusers_align.training.report.evaluation import Session, find_lora, lora_loaded
from diffusers_align.training.report.pictures import given_pictures, grid, save, to_pil
from diffusers_align.training.run.failures import writing
from diffusers_align.training.run.inputs import batches_by_size, columns_of_the_call, condition_of, inputs_of
from diffusers_align.training.run.model_loading import call_arguments, load_pipeline

# What an image depends on besides its prompt and the LoRA's weights: a folder holds images of one such setting. The flags left out change rounding alone.
SAMPLING = [*(name for name in options_of(DrawingArguments) if name not in ("config", "batch_size", "vae_slicing")), "input_columns"]


def check_settings(args, prompts, lora, folder):
    """Write what the images depend on, the prompts' texts and the weights of the LoRA and of a model's folder included; images of other settings would not be
    comparable.

    Prompts may be added after those that are there.

    Raises:
        ValueError: the folder holds images of other settings.
    """
    settings, texts, file = (
        {name: getattr(args, name) for name in SAMPLING},
        [prompt.text + key_of(prompt.inputs, content=True) for prompt in prompts],
        folder / "sampling.json",
    )
    settings |= {"lora_weights": hash_of(lora) if lora else None, "model_weights": digest_of_model(args.pretrained_model_name_or_path)}
    # of a file that was written before there was such an entry, the weights are taken for today's
    before = {"model_weights": settings["model_weights"], **settings_of(file)} if file.is_file() else {**settings, "prompts": texts}
    defaults = {name: option.default for name, option in options_of(PreferenceArguments).items()}  # of a file that was written before there was such a flag
    then = {name: before.get(name, defaults.get(name)) for name in settings}
    changed = [
        f"the weights in {args.pretrained_model_name_or_path} were others" if name == "model_weights" else f"{name} was {then[name]!r}, now {value!r}"
        for name, value in settings.items()
        if json.dumps(then[name]) != json.dumps(value)
    ]
    changed += [f"prompt {i} was {old!r}, now {new!r}" for i, (old, new) in enumerate(zip(before["prompts"], texts), 1) if old != new]
    if changed:
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise ValueError(f"{folder} holds images of other settings: {listed}. Choose another --output_dir, or repeat the settings to go on.")
    text = json.dumps({**settings, "prompts": max(before["prompts"], texts, key=len)}, indent=1) + "\n"
    replaced(file, lambda path: path.write_text(text, encoding="utf-8"))


def settings_of(file):
    """What the images of a folder were made with."""
    try:
        return {"prompts": [], **json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}), so nothing says what the images in {file.parent} were made with. Choose another --output_dir; or delete the "
            "file, if they are of these settings."
        ) from error


def hash_of(lora):
    """SHA-256 of a LoRA's weights, by which one that was trained again under the same name is another."""
    return lora_finder.digest(lora)


def replaced(path, write):
    """A file that is there is whole: `write(temporary path)`, then its name."""
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with writing(path.parent, lambda: "What is there is whole: free some space, and the same command goes on."):
            write(unfinished)
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def sample(args, policy, accelerator, prompts, jobs, folder):
    """Draw the images of `jobs` that are not there yet; an image appears after its trajectory, so that what is there is complete."""
    missing = [job for job in jobs if not (folder / "images" / f"{file_name(job)}.png").is_file()]
    accelerator.wait_for_everyone()  # all share out the same list: none may draw before the last has made its own
    mine = batches_by_size([prompts[prompt] for prompt, _ in missing], args.batch_size, accelerator.process_index, accelerator.num_processes, even=False)
    bar = tqdm(total=sum(map(len, mine)), desc="sampling", unit="image", disable=not accelerator.is_main_process)
    for batch in mine:
        part = [missing[i] for i in batch]
        step_seeds = [noise_seed(args.seed, "preferences", *job) for job in part]
        seeds = [noise_seed(args.seed, "preferences", prompt) for prompt, _ in part] if args.same_latent else step_seeds
        condition = condition_of(policy, [prompts[prompt] for prompt, _ in part], seeds=seeds, step_seeds=step_seeds)
        if args.deterministic:
            images = stock_images(policy, condition)  # what users of the pipeline see, by its own solver
        else:
            with accelerator.autocast(), torch.no_grad():
                trajectory = policy.rollout(condition)
                images = policy.outcome(trajectory).images
        if images.ndim == 3:
            name = type(policy.pipeline).__name__
            raise ValueError(f"{name} makes sounds, and a preference data set holds pictures: train it by a reward of sounds (docs/guides/sound.md).")
        if not images.isfinite().all():
            names = ", ".join(file_name(job) for job in part)
            raise FloatingPointError(f"Among the images {names} are some that are not finite: sample with another --mixed_precision, bf16 or no.")
        for i, job in enumerate(part):
            if args.save_trajectories:
                replaced(folder / "trajectories" / f"{file_name(job)}.safetensors", trajectory.select([i]).save)
            replaced(folder / "images" / f"{file_name(job)}.png", to_pil(images[i]).save)
        bar.update(len(part))
    accelerator.wait_for_everyone()


def score(args, session, reward, prompts, jobs, folder):
    """The rewards of the images as the files hold them, (N,) of all `jobs`."""
    accelerator = session.accelerator
    asked = [prompts[prompt] for prompt, _ in jobs]
    mine = batches_by_size(asked, args.batch_size, accelerator.process_index, accelerator.num_processes, even=False)
    with Scorer(reward, on_nan=args.invalid_rewards, on_failure=args.invalid_rewards, timeout=args.reward_timeout) as scorer:
        for part in tqdm(mine, desc="scoring", unit="batch", disable=not accelerator.is_main_process):
            images = torch.stack([read(folder / "images" / f"{file_name(jobs[i])}.png") for i in part])
            scorer.submit(part, images.to(accelerator.device), [asked[i] for i in part])
        return gather_scores(session, scorer, asked)["reward"]


def read(path):
    try:
        with Image.open(path) as image:
            return to_tensor(image.convert("RGB"), image.height, image.width)
    except OSError as error:
        raise OSError(f"{path} is damaged ({error}): delete it, and the same command draws it again.") from error


def contact_sheet(args, prompts, jobs, rewards, folder):
    """A row per prompt: the pictures that it came with, then its images, the best first."""
    order = sorted(zip(jobs, rewards.tolist()), key=lambda item: (item[0][0], item[1] != item[1], -item[1]))
    order = order[: args.num_sheet_prompts * args.num_images_per_prompt]
    cells, rows = [], groupby(order, key=lambda item: item[0][0])
    for prompt, row in rows:
        given = given_pictures([prompts[prompt]], 1)
        cells += [(picture, name) for name, (picture,) in given.items()]
        cells += [(read(folder / "images" / f"{file_name(job)}.png"), f"{reward:.3f} {prompts[prompt].text}") for job, reward in row]
    return grid(*map(list, zip(*cells)), columns=args.num_images_per_prompt + len(given))


def write(args, prompts, jobs, rewards, folder):
    """The data sets and the contact sheet, and what the rewards tell apart.

    Raises:
        SystemExit: they make no pair, so there is nothing to learn; the files are written all the same.
    """
    groups = scored_groups(prompts, jobs, rewards.tolist())
    found = data_sets(args, prompts, groups, folder)
    for name, rows in found.items():
        (folder / name).mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replaced(folder / name / "metadata.jsonl", lambda path, text=text: path.write_text(text, encoding="utf-8"))
        print(f"{folder / name}: {len(rows)} rows")
    replaced(folder / "contact_sheet.png", partial(save, contact_sheet(args, prompts, jobs, rewards, folder)))
    valid = rewards[~rewards.isnan()]
    print(f"{args.reward}: {valid.mean():.4f} on average, from {valid.min():.4f} to {valid.max():.4f}. Contact sheet: {folder / 'contact_sheet.png'}")
    if equal := equal_images(folder / "images", jobs):
        print(
            f"{equal} of {len(jobs)} images are the same as an earlier one of their prompt"
            + (": with --same_latent, only noise tells them apart." * args.same_latent)
        )
    told, signal = describe_signal(args, len(prompts), groups, len(found["pairs"]))
    if told:
        print(told)
    if not signal and not args.allow_no_signal:
        raise SystemExit(
            f"No pair: {told}. There is nothing to learn from {folder / 'pairs'}. Choose another --reward, lower --min_margin, raise "
            "--num_images_per_prompt or the noise, or pass --allow_no_signal to end with status 0."
        )


def main(argv=None):
    args = parse_args(argv)
    session = Session(args, Accelerator(mixed_precision=args.mixed_precision))
    accelerator, folder = session.accelerator, Path(common.check_output_dir(args.output_dir))
    prompts = load_prompts(args.prompts, args.prompt_column, inputs_of(args), session.print)[: args.num_prompts]
    if args.save_trajectories and any(size is not None for _, size in sizes_of(prompts[0].inputs)):
        raise ValueError("Trajectories are saved without pictures: leave out --save_trajectories, or the pictures of --input_columns.")
    reward = reward_of_flags(args, accelerator.device)
    lora = find_lora(args.lora) if args.lora else None
    jobs = [(prompt, number) for prompt in range(len(prompts)) for number in range(args.num_images_per_prompt)]

    # 1 sample
    if accelerator.is_main_process:
        check_settings(args, prompts, lora, folder)
        for name in ("images", "trajectories")[: 1 + args.save_trajectories]:
            (folder / name).mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    pipeline = load_pipeline(args).to(accelerator.device)
    sde = {name: getattr(args, name) for name in STRENGTH if getattr(args, name) is not None}
    with lora_loaded(pipeline, lora, "preferences"):
        policy = Policy(pipeline, sde_twin(calls_of(pipeline).main_scheduler, **sde), **call_arguments(args, pipeline))
        for line in columns_of_the_call(prompts[:1], policy):
            session.print(line)
        sample(args, policy, accelerator, prompts, jobs, folder)

    # 2 score
    rewards = score(args, session, reward, prompts, jobs, folder)

    # 3 data sets and contact sheet
    if accelerator.is_main_process:
        write(args, prompts, jobs, rewards, folder)
    accelerator.end_training()


if __name__ == "__main__":
    main()
