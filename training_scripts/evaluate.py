"""Evaluation: a pretrained model against LoRAs of it, at equal prompts and seeds.

    accelerate launch training_scripts/evaluate.py --pretrained_model_name_or_path mini-sd3 --call_kwargs '{"max_sequence_length": 1}' \
        --lora runs/a runs/b --prompts likes_blue_heldout --reward background_color scene_score --output_dir eval

Rewards, paired gains, win rates, diversity, the path KL and, with `--eval_dataset_name`, the implicit accuracy on held-out preferences
go to `evaluation.md` and `evaluation.json`, samples to `evaluation.png`, of sounds also to `sounds/`.
"""

import os
from typing import Annotated

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import PlaceArguments, SeedArguments
from diffusers_align.training.flags.data import ColumnArguments, HeldOutArguments
from diffusers_align.training.flags.methods import StrengthArguments
from diffusers_align.training.flags.model import CallArguments, DecodingArguments, EvalSchedulerArguments, PipelineArguments, PrecisionArguments
from diffusers_align.training.flags.options import Count, option, parse, required
from diffusers_align.training.flags.task import InvalidRewardArguments, PromptArguments, RetryArguments

BASE = "base"
OF_PAIRS, SAMPLED, STRENGTH = {"eval_dataset_name": True}, {"kl_samples": True}, ("sde_type", "noise_level", "eta")


class ComparisonArguments(EvalSchedulerArguments, PipelineArguments, DecodingArguments, CallArguments, PrecisionArguments, SeedArguments):
    """comparison"""

    lora: list[str] = required("folders of runs or checkpoints, .safetensors files, or Hub names; each is compared with the base")
    lora_names: list[str] | None = option(None, "what to call them; after their folders if absent")
    lora_scale: list[Annotated[float, Interval(ge=0, le=100)]] | None = option(
        None, "compare each LoRA at these shares of its own strength (DRaFT): 0.5 1; as it is if absent"
    )
    batch_size: Count = option(8, "samples at a time, on each process")

    @model_validator(mode="after")
    def _check_loras(self):
        self.lora_names = self.lora_names or [os.path.basename(os.path.abspath(lora)) for lora in self.lora]
        if len(self.lora_names) != len(self.lora):
            raise ValueError(f"--lora_names has {len(self.lora_names)} names for {len(self.lora)} LoRAs")
        if len({BASE, *self.lora_names}) <= len(self.lora_names):
            raise ValueError(f"each LoRA needs a name of its own, other than {BASE!r}: got {', '.join(self.lora_names)}; give others with --lora_names")
        if self.lora_scale and len(set(self.lora_scale)) < len(self.lora_scale):
            raise ValueError(f"--lora_scale names a scale twice: {' '.join(map(str, self.lora_scale))}")
        return self


class EvaluationArguments(
    PromptArguments,
    ComparisonArguments,
    StrengthArguments,
    HeldOutArguments,
    ColumnArguments,
    RetryArguments,
    InvalidRewardArguments,
    PlaceArguments,
    needs={**{name: SAMPLED for name in STRENGTH}, "column_map": OF_PAIRS},
    advanced={*STRENGTH, "column_map"},
    basic={"eval_dataset_name", "eval_scheduler"},
    was={"eval_dataset_name": "pairs", "eval_dataset_split": "pairs_split"},
):
    """rewards and other measures"""

    num_samples: Count | None = option(None, "images per model, prompt after prompt in turn; two per prompt if absent")
    reward: list[str] = required("built-in rewards, module:function, file.py:function, http://host:port, or sums of them")
    reward_model: list[str] | None = option(None, "checkpoint of each reward's model, 'default' for its own", advanced=True, of="reward")
    diversity: bool = option(True, "distance between samples of the same prompt")
    diversity_model: str | None = option(
        None, "a CLIP model, such as mini-clip, for distances of image features beside those of pixels", needs={"diversity": True}, advanced=True
    )
    kl_samples: Annotated[int, Interval(ge=0, le=10**9)] = option(16, "trajectories of the KL to the base, sampled with noise; 0 leaves it out")
    pair_timesteps: Annotated[int, Interval(ge=1, le=1000)] = option(
        8, "draws of noise and timestep for a pair, in equal strata", needs=OF_PAIRS, advanced=True
    )
    image_root: str | None = option(None, "folder of relative image paths; the file's own if absent", needs=OF_PAIRS, advanced=True)
    num_grid_images: Annotated[int, Interval(ge=1, le=10**4)] = option(8, "columns of the picture", advanced=True)

    @model_validator(mode="after")
    def _check_reward_models(self):
        if self.reward_model and len(self.reward_model) != len(self.reward):
            raise ValueError(
                f"--reward_model has {len(self.reward_model)} entries for {len(self.reward)} rewards; write 'default' where a reward keeps its own"
            )
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(EvaluationArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

import json
from collections import Counter

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffusers_align.data import load_prompts, parse_column_map
from diffusers_align.driving.calls import calls_of
from diffusers_align.policy import Policy
from diffusers_align.rewards.clip_embedder import CLIPEmbedder
from diffusers_align.rewards.registry import model_option
from diffusers_align.schedulers import sde_twin
from diffusers_align.schedulers.twin import SDE_FIELDS
from diffusers_align.training.checkpoints.checkpoints import set_results_aside
from diffusers_align.training.flags import common
from diffusers_align.training.offline.held_out_pairs import HeldOutPairs, margins
from diffusers_align.training.online.sampling import described_solver, evaluate
from diffusers_align.training.report.comparison import describe, table, without_nan
from diffusers_align.training.report.evaluation import Session, diversities, find_lora, load_rewards, lora_loaded, sampled_kl
from diffusers_align.training.report.pictures import comparison, given_pictures, save
from diffusers_align.training.report.sounds import captions_of, noun, write_sounds
from diffusers_align.training.run.costs import Cost
from diffusers_align.training.run.failures import writing
from diffusers_align.training.run.inputs import check_one_size, columns_of_the_call, inputs_of
from diffusers_align.training.run.model_loading import call_arguments, load_pipeline


def load_task(args, say=None):
    """The prompts; `--num_samples` becomes two per prompt if absent, and enough for diversity if that is measured."""
    prompts = load_prompts(args.prompts, args.prompt_column, inputs_of(args), say)
    if args.diversity:
        check_one_size(prompts, args.prompts, "Diversity (--no-diversity leaves it out)")
    args.num_samples = args.num_samples or 2 * len(prompts)
    asked = asked_of(args, prompts)
    samples = Counter(prompt.key for prompt in asked)
    if args.diversity and (lonely := next((prompt.text for prompt in asked if samples[prompt.key] < 2), None)) is not None:
        raise ValueError(
            f"Diversity needs at least two samples of each prompt, but --num_samples {args.num_samples} gives {lonely!r} only one. "
            f"Raise it to {2 * len(prompts)}, or pass --no-diversity."
        )
    return prompts


def asked_of(args, prompts):
    """What each of a model's samples is asked for, in their order."""
    return [prompts[i % len(prompts)] for i in range(args.num_samples)]


def load_pairs(args, session):
    """The held-out pairs."""
    reading = {"column_map": parse_column_map(args.column_map) if args.column_map else None, "image_root": args.image_root, "inputs": inputs_of(args)}
    return HeldOutPairs(session, args.eval_dataset_name, args.pair_timesteps, args.eval_dataset_split, **reading)


def load_models(args):
    """The base and each LoRA at each scale, by the name in the table: the LoRA's path (None for the base) and the scale."""
    models = {BASE: (None, 1.0)}
    for name, lora in zip(args.lora_names, args.lora):
        path = find_lora(lora)
        models |= {name if args.lora_scale is None else f"{name} @ {scale:g}": (path, scale) for scale in args.lora_scale or [1.0]}
    return models


def no_kl(number):
    """The base's distance from itself."""
    return {"nats": torch.zeros(number), "nats_per_dimension": torch.zeros(number)}


def page(args, base, noise, numbers):
    """The table with what is needed to read it."""
    kl = (
        f"KL: mean of {args.kl_samples} trajectories with noise ({', '.join(f'{k} {v}' for k, v in noise.items() if v is not None)})."
        if args.kl_samples
        else ""
    )
    pairs = (
        f"\nImplicit accuracy: on the pairs of `{args.eval_dataset_name}`, against the base, whose own is 1/2 by construction; margin in errors."
        if args.eval_dataset_name
        else ""
    )
    return f"""# {args.pretrained_model_name_or_path} and LoRAs of it

{args.num_samples} {noun(base)} a model for the prompts of `{args.prompts}`, at equal seeds (from {args.seed}),
by {described_solver(args, base.solver)}. Mean ± standard error.
Gain: paired, over the base. Win rate: over the base, ties half, with Wilson's 95 % interval. {kl}{pairs}

{numbers}
![samples](evaluation.png)
"""


def compare(args, session, pipeline, scheduler, loras, prompts, rewards, embedder, pairs):
    """The base and each LoRA at equal prompts and seeds: what was sampled, by name, and the numbers of each."""
    evaluations, models, errors = {}, {}, {}
    total = len(loras) * (args.num_samples + len(pairs)) + (len(loras) - 1) * args.kl_samples
    with tqdm(total=total, unit="sample", disable=not session.accelerator.is_main_process) as bar:
        for name, (lora, scale) in loras.items():
            bar.set_description(name)
            with lora_loaded(pipeline, lora, name, scale):
                policy = Policy(pipeline, scheduler, **call_arguments(args, pipeline))  # a new one each time: it remembers encoded prompts
                for line in columns_of_the_call(prompts[:1], policy) if lora is None else ():
                    session.print(line)
                evaluation = evaluate(session, policy, rewards, prompts, args.num_samples, args.num_samples, bar.update)
                kl = {}
                if args.kl_samples:
                    kl = sampled_kl(session, policy, prompts, args.kl_samples, bar.update) if lora else no_kl(args.kl_samples)
                if pairs:
                    errors[name] = pairs.errors(policy, bar.update)
            tasks = [prompt.key for prompt in asked_of(args, prompts)]
            spread = diversities(evaluation.images, tasks, embedder, args.batch_size) if args.diversity else {}
            preferred = margins(errors[name], errors[BASE]) if pairs and lora else None
            models[name] = describe(evaluation, evaluations.get(BASE), spread, kl, Cost.read(lora) if lora else None, preferred)
            evaluations[name] = evaluation
            evaluation.keep(args.num_grid_images)
    return evaluations, models


def write(args, out, evaluations, models, prompts, rewards, noise):
    """All files, in the place of those that an earlier comparison left, which are set aside."""
    base = evaluations[BASE]
    set_results_aside(out, ("evaluation.json", "evaluation.md", "evaluation.png", "sounds"))
    content = {"settings": vars(args), "solver": base.solver, "kl_noise": noise, "prompts": base.prompts, "seeds": base.seeds, "models": models}
    (out / "evaluation.json").write_text(json.dumps(without_nan(content), indent=1) + "\n")
    (out / "evaluation.md").write_text(page(args, base, noise, table(models, rewards)), encoding="utf-8")
    rows = given_pictures(prompts, len(base.images)) | {name: e.images for name, e in evaluations.items()}
    save(comparison(rows, captions_of(base), args.num_grid_images), out / "evaluation.png")
    for name, evaluation in evaluations.items():
        write_sounds(out / "sounds" / name.replace("/", "_"), evaluation)


def main(argv=None):
    args = parse_args(argv)
    session = Session(args, Accelerator(mixed_precision=args.mixed_precision))
    device = session.accelerator.device

    # 1 whatever can be missing, before the model is loaded
    out = common.check_output_dir(args.output_dir)
    loras = load_models(args)
    prompts = load_task(args, session.print)
    pairs = load_pairs(args, session) if args.eval_dataset_name else []
    rewards = load_rewards(args.reward, args.reward_model, device, args.reward_retries)
    embedder = CLIPEmbedder(**model_option(args.diversity_model)).to(device) if args.diversity and args.diversity_model else None
    pipeline = load_pipeline(args).to(device)
    for name, (lora, _) in loras.items():
        with lora_loaded(pipeline, lora, name):  # of another model, the last one would take all numbers of the others with it
            pass
    sde = {name: getattr(args, name) for name in STRENGTH if getattr(args, name) is not None}
    scheduler = sde_twin(calls_of(pipeline).main_scheduler, **sde)

    # 2 the base and each LoRA at equal prompts and seeds
    evaluations, models = compare(args, session, pipeline, scheduler, loras, prompts, rewards, embedder, pairs)

    # 3 table, numbers, picture
    if session.accelerator.is_main_process:
        print(table(models, list(rewards)))  # before a full disk can take it
        noise = {name: scheduler.config[name] for name in SDE_FIELDS[type(scheduler).__name__]}
        with writing(out, lambda: "The table above has the numbers; free some space for the rest."):
            write(args, out, evaluations, models, prompts, list(rewards), noise)
        print(f"Table, numbers and picture: {out}")
    session.accelerator.end_training()
    for evaluation in evaluations.values() if args.invalid_rewards == "error" else ():
        evaluation.check_scored(rewards)


if __name__ == "__main__":
    main()
