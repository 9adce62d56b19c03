"""Evaluation: a pretrained model against LoRAs of it, at equal prompts and seeds.

    accelerate launch training_scripts/evaluate.py --pretrained_model_name_or_path mini-sd3 --call_kwargs '{"max_sequence_length": 1}' \
        --lora runs/a runs/b --prompts likes_blue_heldout --reward background_color scene_score --output_dir eval

Rewards, paired gains, win rates, diversity, the path KL and, with `--pairs`, the implicit accuracy on held-out preferences
go to `evaluation.md` and `evaluation.json`, samples to `evaluation.png`.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffusers_align.data import load_prompts
from diffusers_align.policy import Policy
from diffusers_align.rewards.clip_embedder import CLIPEmbedder
from diffusers_align.rewards.loading import model_option
from diffusers_align.schedulers import sde_twin
from diffusers_align.schedulers.twin import SDE_FIELDS
from diffusers_align.training import arguments
from diffusers_align.training.comparison import describe, table, without_nan
from diffusers_align.training.costs import Cost
from diffusers_align.training.evaluation import Session, diversities, find_lora, load_rewards, lora_loaded, sampled_kl
from diffusers_align.training.held_out_pairs import HeldOutPairs, margins
from diffusers_align.training.loading import call_arguments, load_pipeline
from diffusers_align.training.pictures import comparison, save
from diffusers_align.training.sampling import described_solver, evaluate

BASE = "base"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", help="YAML recipe: its values replace the defaults, flags on the command line replace its values")
    add_models(parser.add_argument_group("models"))
    add_measures(parser.add_argument_group("prompts, rewards and other measures"))
    required = ("pretrained_model_name_or_path", "lora", "prompts", "reward", "output_dir")
    args = arguments.parse_with_recipe(parser, argv, required)
    for name in ("num_inference_steps", "batch_size", "num_samples", "num_grid_images", "pair_timesteps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.kl_samples < 0:
        parser.error(f"--kl_samples must not be negative, got {args.kl_samples}")
    args.lora_names = args.lora_names or [Path(lora).name for lora in args.lora]
    if len(args.lora_names) != len(args.lora):
        parser.error(f"--lora_names has {len(args.lora_names)} names for {len(args.lora)} LoRAs")
    if len({BASE, *args.lora_names}) <= len(args.lora_names):
        parser.error(f"each LoRA needs a name of its own, other than {BASE!r}: got {', '.join(args.lora_names)}; give others with --lora_names")
    if args.lora_scale and len(set(args.lora_scale)) < len(args.lora_scale):
        parser.error(f"--lora_scale names a scale twice: {' '.join(map(str, args.lora_scale))}")
    if args.reward_model and len(args.reward_model) != len(args.reward):
        parser.error(f"--reward_model has {len(args.reward_model)} entries for {len(args.reward)} rewards; write 'default' where a reward keeps its own")
    return args


def add_models(group):
    group.add_argument("--pretrained_model_name_or_path", help="a diffusers pipeline: Hub name, folder, or an embedded model (mini-sd, mini-sd3)")
    group.add_argument("--revision", help="revision of the pipeline on the Hub")
    group.add_argument("--variant", help="variant of its files, such as fp16")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="dtype of the weights and of autocast")
    group.add_argument("--lora", nargs="+", help="folders of runs or checkpoints, .safetensors files, or Hub names; each is compared with the base")
    group.add_argument("--lora_names", nargs="+", help="what to call them; after their folders if absent")
    group.add_argument("--lora_scale", type=float, nargs="+", help="compare each LoRA at these shares of its own strength (DRaFT): 0.5 1; as it is if absent")
    group.add_argument("--num_inference_steps", type=int, help="solver steps; the pipeline's default if absent")
    group.add_argument("--eval_scheduler", choices=["stock", "twin"], default="stock", help="the pipeline's own solver, or the SDE twin's ODE")
    group.add_argument("--guidance_scale", type=float, help="classifier-free guidance; the pipeline's default if absent")
    group.add_argument("--height", type=int, help="pixels; the pipeline's default if absent")
    group.add_argument("--width", type=int, help="pixels; the pipeline's default if absent")
    group.add_argument("--call_kwargs", type=arguments.json_object, default={}, help="other arguments of the pipeline's call, as JSON")
    group.add_argument("--batch_size", type=int, default=8, help="samples at a time, on each process")
    group.add_argument("--seed", type=int, default=42, help="of the noise: the same for every model")


def add_measures(group):
    group.add_argument("--prompts", help="a .txt, .jsonl or .csv file, or a shipped set")
    group.add_argument("--prompt_column", default="prompt", help="field of the prompt in .jsonl and .csv files; rewards get the other fields")
    group.add_argument("--num_samples", type=int, help="images a model, prompt after prompt in turn; two a prompt if absent")
    group.add_argument("--reward", nargs="+", help="built-in rewards, module:function, file.py:function, http://host:port, or sums of them")
    group.add_argument("--reward_model", nargs="+", help="checkpoint of each reward's model, 'default' for its own")
    group.add_argument("--invalid_rewards", choices=["error", "mask"], default="error", help="on a reward that raises: stop, or leave its images out")
    group.add_argument("--reward_timeout", type=float, help="seconds for a batch; none if absent")
    group.add_argument("--diversity", action=argparse.BooleanOptionalAction, default=True, help="distance between samples of the same prompt")
    group.add_argument("--diversity_model", help="a CLIP model, such as mini-clip, for distances of image features beside those of pixels")
    group.add_argument("--kl_samples", type=int, default=16, help="trajectories of the KL to the base, sampled with noise; 0 leaves it out")
    group.add_argument("--sde_type", help="noise of the KL's trajectories, flow matching: flow_grpo, dance_grpo, cps, memoryless, memoryless_em")
    group.add_argument("--noise_level", type=float, help="its strength, flow matching; the scheduler's default if absent")
    group.add_argument("--eta", type=float, help="its strength, diffusion; the scheduler's default if absent")
    group.add_argument("--pairs", help="held-out preferences (docs/preference_data.md), for the implicit accuracy; none if absent")
    group.add_argument("--pairs_split", default="train", help="their split")
    group.add_argument("--pair_timesteps", type=int, default=8, help="draws of noise and timestep for a pair, in equal strata")
    group.add_argument("--num_grid_images", type=int, default=8, help="columns of the picture")
    group.add_argument("--output_dir", help="where the table, the numbers and the picture go")


def load_task(args):
    """The prompts; `--num_samples` becomes two a prompt if absent, and enough for diversity if that is measured."""
    prompts = load_prompts(args.prompts, args.prompt_column)
    args.num_samples = args.num_samples or 2 * len(prompts)
    samples = Counter(prompts[i % len(prompts)].text for i in range(args.num_samples))
    if args.diversity and min(samples.values()) < 2:
        raise ValueError(
            f"Diversity needs at least two samples of each prompt, but --num_samples {args.num_samples} gives {min(samples, key=samples.get)!r} only one. "
            f"Raise it to {2 * len(prompts)}, or pass --no-diversity."
        )
    return prompts


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


def page(args, solver, noise, numbers):
    """The table with what is needed to read it."""
    kl = (
        f"KL: mean of {args.kl_samples} trajectories with noise ({', '.join(f'{k} {v}' for k, v in noise.items() if v is not None)})."
        if args.kl_samples
        else ""
    )
    pairs = f"\nImplicit accuracy: on the pairs of `{args.pairs}`, against the base, whose own is 1/2 by construction; margin in errors." if args.pairs else ""
    return f"""# {args.pretrained_model_name_or_path} and LoRAs of it

{args.num_samples} images a model for the prompts of `{args.prompts}`, at equal seeds (from {args.seed}), by {solver}. Mean ± standard error.
Gain: paired, over the base. Win rate: over the base, ties half, with Wilson's 95 % interval. {kl}{pairs}

{numbers}
![samples](evaluation.png)
"""


def main(argv=None):
    args = parse_args(argv)
    session = Session(args, Accelerator(mixed_precision=args.mixed_precision))
    device = session.accelerator.device

    # 1 whatever can be missing, before the model is loaded
    out = arguments.check_output_dir(args.output_dir)
    loras = load_models(args)
    prompts = load_task(args)
    pairs = HeldOutPairs(session, args.pairs, args.pair_timesteps, args.pairs_split) if args.pairs else []
    rewards = load_rewards(args.reward, args.reward_model, device)
    embedder = CLIPEmbedder(**model_option(args.diversity_model)).to(device) if args.diversity and args.diversity_model else None
    pipeline = load_pipeline(args).to(device)
    sde = {name: getattr(args, name) for name in ("sde_type", "noise_level", "eta") if getattr(args, name) is not None}
    scheduler = sde_twin(pipeline.scheduler, **sde)

    # 2 the base and each LoRA at equal prompts and seeds
    evaluations, models, errors = {}, {}, {}
    total = len(loras) * (args.num_samples + len(pairs)) + (len(loras) - 1) * args.kl_samples
    with tqdm(total=total, unit="sample", disable=not session.accelerator.is_main_process) as bar:
        for name, (lora, scale) in loras.items():
            bar.set_description(name)
            with lora_loaded(pipeline, lora, name, scale):
                policy = Policy(pipeline, scheduler, **call_arguments(args))  # a new one each time: it remembers encoded prompts
                evaluation = evaluate(session, policy, rewards, prompts, args.num_samples, args.num_samples, bar.update)
                kl = {}
                if args.kl_samples:
                    kl = sampled_kl(session, policy, prompts, args.kl_samples, bar.update) if lora else no_kl(args.kl_samples)
                if pairs:
                    errors[name] = pairs.errors(policy, bar.update)
            spread = diversities(evaluation.images, evaluation.prompts, embedder, args.batch_size) if args.diversity else {}
            preferred = margins(errors[name], errors[BASE]) if pairs and lora else None
            models[name] = describe(evaluation, evaluations.get(BASE), spread, kl, Cost.read(lora) if lora else None, preferred)
            evaluations[name] = evaluation
            del evaluation.images[args.num_grid_images :]

    # 3 table, numbers, picture
    if session.accelerator.is_main_process:
        base = evaluations[BASE]
        noise = {name: scheduler.config[name] for name in SDE_FIELDS[type(scheduler).__name__]}
        content = {"settings": vars(args), "solver": base.solver, "kl_noise": noise, "prompts": base.prompts, "seeds": base.seeds, "models": models}
        (out / "evaluation.json").write_text(json.dumps(without_nan(content), indent=1) + "\n")
        (out / "evaluation.md").write_text(page(args, described_solver(args, base.solver), noise, table(models, list(rewards))), encoding="utf-8")
        captions = base.prompts[: len(base.images)]
        save(comparison({name: e.images for name, e in evaluations.items()}, captions, args.num_grid_images), out / "evaluation.png")
        print(table(models, list(rewards)))
        print(f"Table, numbers and picture: {out}")
    session.accelerator.end_training()
    for evaluation in evaluations.values() if args.invalid_rewards == "error" else ():
        evaluation.check_scored(rewards)


if __name__ == "__main__":
    main()
