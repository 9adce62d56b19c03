"""Preference flow matching: learn a flow from less to more preferred images, to apply to the outputs of any generator.

    accelerate launch training_scripts/train_pfm.py --config training_scripts/recipes/pfm_likes_blue_mini_sd.yaml

The algorithm's page is `diffusers_align/algorithms/preference_flow_matching.py` (https://arxiv.org/abs/2405.19806). No generator is
loaded: only pairs of images, an autoencoder and a text encoder. What comes out is a `PreferenceFlowPipeline`.
"""

from typing import Annotated, ClassVar, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import RunArguments
from diffusers_align.training.flags.data import SourceArguments
from diffusers_align.training.flags.model import PipelineArguments
from diffusers_align.training.flags.options import Count, Decay, NonNegative, Pixels, Probability, Steps, option, parse
from diffusers_align.training.flags.task import RewardArguments

# Adam as in the official code; the average is what is judged and saved.
DEFAULTS = {
    "learning_rate": 1e-3, "adam_weight_decay": 0.0, "train_batch_size": 64, "gradient_accumulation_steps": 1,
    "use_ema": True, "ema_decay": 0.99, "ema_interval": 1,
}  # fmt: skip
Width = Annotated[int, Interval(ge=1, le=65536)]


class FlowDataArguments(SourceArguments, was={"dataset_name": "data", "dataset_split": "data_split"}):
    """pairs"""

    held_out: Decay = option(0.1, "share of the prompts that is not trained on")
    outputs: str | None = option(
        None, "fresh outputs of the generator to judge the flow by (prompts and images); the held-out pairs' images if absent", resume="measured"
    )
    prompts: str | None = option(None, "prompts with the other fields that the reward wants, looked up by prompt", advanced=True, resume="content")
    resolution: Pixels | None = option(None, "resize images to this, squared; as they are if absent", advanced=True)


class FieldArguments(PipelineArguments):
    """vector field"""

    single_file_config: ClassVar[None] = None  # the parts are read from folders
    pretrained_model_name_or_path: str | None = option(None, "where the autoencoder and the text encoder come from: a pipeline with `vae`, `text_encoder`")
    pixels: bool = option(False, "a flow of pixels: no autoencoder")
    sees_prompt: bool = option(True, "condition the flow on the prompt, through the text encoder")
    block_out_channels: list[Width] = option([64, 128, 256], "widths of the UNet's levels")
    layers_per_block: Annotated[int, Interval(ge=1, le=100)] = option(2, "of each level", advanced=True)
    attention_head_dim: Width = option(8, "of its attention", advanced=True)

    @model_validator(mode="after")
    def _check_parts(self):
        if not self.pretrained_model_name_or_path and not (self.pixels and not self.sees_prompt):
            raise ValueError("--pretrained_model_name_or_path is required, for its autoencoder and its text encoder; or use --pixels and --no-sees_prompt")
        return self


class PFMArguments(FlowDataArguments, RewardArguments, FieldArguments, RunArguments, defaults=DEFAULTS):
    """preference flow matching"""

    shard_denoiser: ClassVar[bool] = False  # of a LoRA's frozen model, and here all is trained

    num_eval_samples: Count = option(256, "outputs to judge by, at most", advanced=True, resume="measured")
    coupling: Literal["paired", "independent", "ot"] = option("paired", "which winner a loser goes to: its own, or another one of its prompt")
    sigma: NonNegative = option(0.0, "noise on the points between, in units of the winners' std (0.1 in the official code)")
    num_inference_steps: Steps = option(10, "solver steps of a pass, in evaluations")
    solver: Literal["euler", "heun", "rk4"] = option("heun", "of a pass, in evaluations", advanced=True, resume="measured")
    iterations: Annotated[int, Interval(ge=1, le=1000)] = option(1, "passes, in evaluations", advanced=True, resume="measured")
    strength: Probability = option(
        1.0, "share of the way that a pass goes, in evaluations; 0 changes nothing, --iterations goes on from where a pass ends", resume="measured"
    )


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(PFMArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

import math

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_align.algorithms.preference_flow_matching import couple, interpolate, pfm_loss
from diffusers_align.checks.given_names import fetched
from diffusers_align.data import Prompt, batch_of, load_preferences, load_prompts, parse_column_map
from diffusers_align.data.conversions import indifferent
from diffusers_align.pipelines.preference_flow import PreferenceFlowPipeline
from diffusers_align.policy import noise_seed
from diffusers_align.rewards.base import listed
from diffusers_align.training.offline import flow_pairs
from diffusers_align.training.online.scoring import reward_of_flags
from diffusers_align.training.report import hub
from diffusers_align.training.report.pictures import grid, save
from diffusers_align.training.report.report import judged_on
from diffusers_align.training.run.division import epoch_batches
from diffusers_align.training.run.failures import resumable
from diffusers_align.training.run.model_loading import DTYPES, model_source
from diffusers_align.training.run.run import Run


def load_parts(args):
    """The frozen parts of a pipeline that the flow stands on: its autoencoder, and its text encoder with tokenizer."""
    name, parts = args.pretrained_model_name_or_path, {}
    source = {"pretrained_model_name_or_path": name and model_source(name), "revision": args.revision}
    frozen = {**source, "variant": args.variant, "torch_dtype": DTYPES[args.mixed_precision]}
    with fetched(str(name)):
        if not args.pixels:
            parts["vae"] = AutoencoderKL.from_pretrained(subfolder="vae", **frozen).requires_grad_(False)
            parts["vae"].register_to_config(_name_or_path=name)  # not the path of this machine
        if args.sees_prompt:
            parts["text_encoder"] = CLIPTextModel.from_pretrained(subfolder="text_encoder", **frozen).requires_grad_(False)
            parts["tokenizer"] = CLIPTokenizer.from_pretrained(subfolder="tokenizer", **source)
    return parts


def load_flow(args, device):
    """The pipeline with a fresh vector field, which starts as the flow that moves nothing."""
    parts, widths = load_parts(args), args.block_out_channels
    channels, cross = 3 if args.pixels else parts["vae"].config.latent_channels, "CrossAttn" if args.sees_prompt else "Attn"
    config = {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": args.layers_per_block,
        "attention_head_dim": args.attention_head_dim,
        "norm_num_groups": math.gcd(32, *widths),
        "down_block_types": ["DownBlock2D", *[f"{cross}DownBlock2D"] * (len(widths) - 1)],
        "up_block_types": [*[f"{cross}UpBlock2D"] * (len(widths) - 1), "UpBlock2D"],
    }
    if args.sees_prompt:
        field = UNet2DConditionModel(cross_attention_dim=parts["text_encoder"].config.hidden_size, **config)
    else:
        field = UNet2DModel(**config)
    torch.nn.init.zeros_(field.conv_out.weight)
    torch.nn.init.zeros_(field.conv_out.bias)
    if args.gradient_checkpointing:
        field.enable_gradient_checkpointing()
    return PreferenceFlowPipeline(field, **parts).to(device)


def load_data(args):
    """Canonical pairs to train on, pairs held out, and outputs to judge by: [(Prompt, image)]."""
    columns = parse_column_map(args.column_map) if args.column_map else None
    rows, report = load_preferences(args.dataset_name, "pair", column_map=columns, split=args.dataset_split, image_root=args.image_root)
    print(report)
    rows = flow_pairs.decided(rows, args.dataset_name)
    rows, held_out = flow_pairs.split_by_prompt(rows, args.held_out, args.seed)
    if reason := indifferent(rows, "pair"):
        raise ValueError(f"{args.dataset_name}: of those to train on, {reason}, so there is nothing to learn. Give other data.")
    fields = {prompt.text: prompt for prompt in load_prompts(args.prompts)} if args.prompts else {}
    if args.outputs:
        outputs, report = load_preferences(args.outputs, "captioned", mappable=False)
        print(report)
        outputs = [(row["prompt"], row["image"]) for row in outputs]
    else:
        outputs = [(row["prompt"], row[name]) for row in held_out or rows for name in ("image_0", "image_1")]
    outputs = outputs[: args.num_eval_samples]
    if unknown := sorted({text for text, _ in outputs} - set(fields)) if args.prompts else []:
        print(f"{len(unknown)} of the outputs' prompts are not in --prompts {args.prompts}, so the reward gets their text alone: {listed(unknown)}")
    return rows, held_out, [(fields.get(text, Prompt(text)), image) for text, image in outputs]


def batch_loss(run, flow, pairs, target, index, t, noise=None):
    """The losses (B,) of the rows `index` at times t (B,)."""
    args, device = run.args, run.accelerator.device
    y0, y1, t = pairs.y0[index].to(device), pairs.y1[target[index]].to(device), t.to(device)
    noise = None if noise is None else noise.to(device)
    with run.accelerator.autocast():
        with torch.no_grad():
            embeds = flow.encode_prompt([pairs.prompts[i] for i in index])
        velocity = flow.velocity(t, interpolate(y0, y1, t, sigma=args.sigma * float(pairs.y1.std()), noise=noise), embeds)
    return pfm_loss(velocity, y0, y1)


@torch.no_grad()
def held_out_loss(run, flow, pairs):
    """The mean loss on held-out pairs as they come, on the lines themselves, at five times."""
    rows, size, losses = torch.arange(len(pairs)), run.args.train_batch_size, []
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        for index in rows.split(size):
            losses.append(batch_loss(run, flow, pairs, rows, index.tolist(), torch.full((len(index),), t)))
    return float(torch.cat(losses).mean())


def draw(run, pairs, epoch, b):
    """The rows of one of this process's batches, their times (B,) and, if asked for, their noise: the same however an epoch is divided."""
    args, first = run.args, epoch * run.division.num_samples
    rows, times, noises = [], [], []
    for position in run.division.batches[b]:
        place = first + position
        generator = torch.Generator().manual_seed(noise_seed(args.seed, "sample", place))
        rows += batch_of(place, 1, len(pairs), args.seed)
        times.append(torch.rand((), generator=generator))
        noises.append(torch.randn(pairs.y0.shape[1:], generator=generator) if args.sigma > 0 else torch.zeros(()))
    return rows, torch.stack(times), torch.stack(noises) if args.sigma > 0 else None


def samples_of_epoch(args, pairs):
    """A pass over the pairs in whole optimizer steps; what is over comes first in the next one."""
    size = args.train_batch_size * args.gradient_accumulation_steps
    return size * max(1, len(pairs) // size)


def train_epoch(run, flow, pairs, epoch):
    """One pass over the pairs. Returns the epoch's metrics."""
    args, accelerator = run.args, run.accelerator

    # 1 couple
    generator = torch.Generator().manual_seed(noise_seed(args.seed, "coupling", epoch))
    target = couple(args.coupling, pairs.y0, pairs.y1, pairs.prompts, generator=generator)
    losses, norms = [], []
    for batches, share in epoch_batches(run):
        for b in batches:
            # 2 draw points between losers and winners
            index, t, noise = draw(run, pairs, epoch, b)

            # 3 loss and update
            loss = batch_loss(run, flow, pairs, target, index, t, noise)
            weight = (pairs.weight[index] / pairs.weight.mean()).to(loss)
            accelerator.backward((weight * loss).sum() * share)
            losses.append(loss.detach())
        norms.append(run.optimizer_step())
    loss = accelerator.gather(torch.cat(losses))
    error = loss.std() / len(loss) ** 0.5
    return run.epoch_metrics(None, [], norms, {"loss": [float(loss.mean())], "loss_se": [float(error)]})


def validate(run, flow, held_out, outputs, epoch, **call):
    """Every `--validation_epochs`, the loss on held-out pairs and a picture of transported outputs. Returns what is to be logged."""
    if (epoch + 1) % run.args.validation_epochs:
        return {}
    with run.averaged(), run.meter.paused():
        metrics = {"eval_loss": held_out_loss(run, flow, held_out)} if held_out else {}
        shown = flow_pairs.transport_outputs(run, flow, outputs[: run.args.num_validation_images], {}, **call)
    if run.is_main and shown.after:
        with resumable(run):
            (run.output_dir / "samples").mkdir(exist_ok=True)
            save(grid(shown.after, shown.prompts), run.output_dir / "samples" / f"epoch-{epoch + 1:04d}.png")
    return metrics


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "PFM")
    device = run.accelerator.device
    rewards = {args.reward: reward_of_flags(args, device)}
    if args.eval_reward:
        rewards[args.eval_reward] = reward_of_flags(args, device, "eval_")
    rows, held_out, outputs = load_data(args)
    flow = load_flow(args, device)
    pairs, held_out = (flow_pairs.encode_pairs(flow, part, args.train_batch_size, args.resolution, device) if part else None for part in (rows, held_out))
    run.train_parameters(list(flow.vector_field.parameters()), lambda folder: flow.vector_field.save_pretrained(folder / "vector_field"))
    run.meter.watch([flow.vector_field])
    run.batches(samples_of_epoch(args, pairs))
    run.load_optimizer(args.num_epochs * run.division.num_steps)
    run.resume()
    judged = judged_on((prompt.text for prompt, _ in outputs), {row["prompt"] for row in rows})
    run.print(f"The flow is judged by {len(outputs)} outputs of {judged}.")
    call = {name: getattr(args, name) for name in ("num_inference_steps", "solver", "iterations", "strength")}

    for epoch in run.epochs():
        metrics = train_epoch(run, flow, pairs, epoch)
        run.log(metrics | validate(run, flow, held_out, outputs, epoch, **call))

    with run.averaged():
        transported = flow_pairs.transport_outputs(run, flow, outputs, rewards, **call)
        for name, value in flow_pairs.describe(transported, rewards).items():
            run.print(f"{name}: {value}")
        if run.is_main:
            with resumable(run):
                flow_pairs.save(run, flow, transported, rewards, judged)
    run.print(f"Pipeline, pictures and model card: {run.output_dir}")
    transported.check_scored(rewards)
    if args.push_to_hub and not run.health.failed:  # last: what was found is not lost with the network
        run.print(f"Pushed to {run.on_main(lambda: hub.push(run))}.")
    run.end()


if __name__ == "__main__":
    main()
