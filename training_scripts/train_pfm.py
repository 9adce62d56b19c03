"""Preference flow matching: learn a flow from less to more preferred images, to apply to the outputs of any generator.

    accelerate launch training_scripts/train_pfm.py --config training_scripts/recipes/pfm_likes_blue_mini_sd.yaml

The algorithm's page is `diffusers_align/algorithms/preference_flow_matching.py` (https://arxiv.org/abs/2405.19806). No generator is
loaded: only pairs of images, an autoencoder and a text encoder. What comes out is a `PreferenceFlowPipeline`.
"""

import math

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_align import embedded
from diffusers_align.algorithms.preference_flow_matching import COUPLINGS, SOLVERS, couple, interpolate, pfm_loss
from diffusers_align.data import Prompt, batch_of, load_preferences, load_prompts, parse_column_map
from diffusers_align.pipelines.preference_flow import PreferenceFlowPipeline
from diffusers_align.policy import noise_seed
from diffusers_align.rewards import load_reward
from diffusers_align.rewards.base import listed
from diffusers_align.rewards.loading import model_option
from diffusers_align.training import arguments, hub, preference_flow
from diffusers_align.training.loading import DTYPES
from diffusers_align.training.pictures import grid, save
from diffusers_align.training.report import judged_on
from diffusers_align.training.run import Run

REQUIRED = ("data", "reward", "output_dir")


def parse_args(argv=None):
    parser = arguments.run_parser(__doc__.splitlines()[0])
    # Adam as in the official code; the average is what is judged and saved
    parser.set_defaults(learning_rate=1e-3, adam_weight_decay=0.0, train_batch_size=64, gradient_accumulation_steps=1)
    parser.set_defaults(use_ema=True, ema_decay=0.99, ema_interval=1)
    boolean = arguments.argparse.BooleanOptionalAction
    group = parser.add_argument_group("data")
    group.add_argument("--data", help="pairs of images: whatever `load_preferences` reads; rankings and scores become pairs")
    group.add_argument("--data_split", default="train", help="of a Hub set")
    group.add_argument("--column_map", default="", help="prompt=caption,image_0=left,...: where the data's columns have other names")
    group.add_argument("--held_out", type=float, default=0.1, help="share of the prompts whose pairs are not trained on")
    group.add_argument("--outputs", help="fresh outputs of the generator to judge the flow by (prompts and images); the held-out pairs' images if absent")
    group.add_argument("--prompts", help="prompts with the other fields that the reward wants, looked up by prompt")
    group.add_argument("--resolution", type=int, help="resize images to this, squared; as they are if absent")
    group = parser.add_argument_group("reward")
    group.add_argument("--reward", help="judges the flow on held-out prompts; never trained on")
    group.add_argument("--reward_model", help="checkpoint of the reward's model")
    group.add_argument("--eval_reward", help="a second reward")
    group.add_argument("--eval_reward_model", help="checkpoint of the second reward's model")
    group.add_argument("--num_eval_samples", type=int, default=256, help="outputs to judge by, at most")
    group = parser.add_argument_group("vector field")
    group.add_argument("--pretrained_model_name_or_path", help="where the autoencoder and the text encoder come from: a pipeline with `vae`, `text_encoder`")
    group.add_argument("--revision", help="its revision on the Hub")
    group.add_argument("--variant", help="of its files, such as fp16")
    group.add_argument("--pixels", action="store_true", help="a flow of pixels: no autoencoder")
    group.add_argument("--sees_prompt", action=boolean, default=True, help="condition the flow on the prompt, through the text encoder")
    group.add_argument("--block_out_channels", type=int, nargs="+", default=[64, 128, 256], help="widths of the UNet's levels")
    group.add_argument("--layers_per_block", type=int, default=2)
    group.add_argument("--attention_head_dim", type=int, default=8)
    group = parser.add_argument_group("preference flow matching")
    group.add_argument("--coupling", choices=COUPLINGS, default="paired", help="which winner a loser goes to: its own, or another one of its prompt")
    group.add_argument("--sigma", type=float, default=0.0, help="noise on the points between, in units of the winners' std (0.1 in the official code)")
    group.add_argument("--num_inference_steps", type=int, default=10, help="solver steps of a pass, in evaluations")
    group.add_argument("--solver", choices=list(SOLVERS), default="heun")
    group.add_argument("--iterations", type=int, default=1, help="passes, in evaluations")
    group.add_argument("--strength", type=float, default=1.0, help="how far a pass goes, in evaluations")
    args = arguments.parse(parser, argv, REQUIRED)
    if not args.pretrained_model_name_or_path and not (args.pixels and not args.sees_prompt):
        parser.error("--pretrained_model_name_or_path is required, for its autoencoder and its text encoder; or use --pixels and --no-sees_prompt")
    return args


def load_flow(args, device):
    """The pipeline with a fresh vector field, which starts as the flow that moves nothing."""
    name, parts = args.pretrained_model_name_or_path, {}
    source = {"pretrained_model_name_or_path": embedded.path(name) if name in embedded.NAMES else name, "revision": args.revision}
    frozen = {**source, "variant": args.variant, "torch_dtype": DTYPES[args.mixed_precision]}
    if not args.pixels:
        parts["vae"] = AutoencoderKL.from_pretrained(subfolder="vae", **frozen).requires_grad_(False)
        parts["vae"].register_to_config(_name_or_path=name)  # not the path of this machine
    if args.sees_prompt:
        parts["text_encoder"] = CLIPTextModel.from_pretrained(subfolder="text_encoder", **frozen).requires_grad_(False)
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(subfolder="tokenizer", **source)
    widths, channels = args.block_out_channels, 3 if args.pixels else parts["vae"].config.latent_channels
    cross = "CrossAttn" if args.sees_prompt else "Attn"
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
    columns = parse_column_map(args.column_map)
    rows, report = load_preferences(args.data, "pair", column_map=columns, split=args.data_split)
    print(report)
    rows, held_out = preference_flow.split_by_prompt(rows, args.held_out, args.seed)
    fields = {prompt.text: prompt for prompt in load_prompts(args.prompts)} if args.prompts else {}
    if args.outputs:
        outputs, report = load_preferences(args.outputs, "captioned")
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


def draw(run, pairs, batch):
    """The rows of this process's share of a batch, their times (B,) and, if asked for, their noise: the same however it is shared."""
    args, rank, world = run.args, run.accelerator.process_index, run.accelerator.num_processes
    size, generator = args.train_batch_size, torch.Generator().manual_seed(noise_seed(args.seed, "batch", batch))
    share = slice(rank * size, (rank + 1) * size)
    t = torch.rand(size * world, generator=generator)[share]
    noise = torch.randn(size * world, *pairs.y0.shape[1:], generator=generator)[share] if args.sigma > 0 else None
    return batch_of(batch, size, len(pairs), args.seed, rank, world), t, noise


def steps_of_epoch(run, pairs):
    """Optimizer steps of a pass over the pairs; what is over comes first in the next one."""
    args = run.args
    return max(1, len(pairs) // (args.train_batch_size * run.accelerator.num_processes * args.gradient_accumulation_steps))


def train_epoch(run, flow, pairs, epoch):
    """One pass over the pairs. Returns the epoch's metrics."""
    args, accelerator = run.args, run.accelerator
    accumulated, number = args.gradient_accumulation_steps, steps_of_epoch(run, pairs)
    samples = args.train_batch_size * accelerator.num_processes * accumulated

    # 1 couple
    generator = torch.Generator().manual_seed(noise_seed(args.seed, "coupling", epoch))
    target = couple(args.coupling, pairs.y0, pairs.y1, pairs.prompts, generator=generator)
    losses, norms = [], []
    for step in range(epoch * number, (epoch + 1) * number):
        for batch in range(step * accumulated, (step + 1) * accumulated):
            # 2 draw points between losers and winners
            index, t, noise = draw(run, pairs, batch)

            # 3 loss and update
            loss = batch_loss(run, flow, pairs, target, index, t, noise)
            weight = (pairs.weight[index] / pairs.weight.mean()).to(loss)
            accelerator.backward((weight * loss).sum() / samples)
            losses.append(loss.detach())
        norms.append(run.optimizer_step())
    loss = accelerator.gather(torch.cat(losses))
    error = loss.std() / len(loss) ** 0.5
    return {"loss": float(loss.mean()), "loss_se": float(error), "grad_norm": sum(norms) / len(norms), "lr": run.lr_scheduler.get_last_lr()[0]}


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "PFM")
    device = run.accelerator.device
    rewards = {args.reward: load_reward(args.reward, device=device, **model_option(args.reward_model))}
    if args.eval_reward:
        rewards[args.eval_reward] = load_reward(args.eval_reward, device=device, **model_option(args.eval_reward_model))
    rows, held_out, outputs = load_data(args)
    flow = load_flow(args, device)
    pairs, held_out = (preference_flow.encode_pairs(flow, part, args.train_batch_size, args.resolution, device) if part else None for part in (rows, held_out))
    run.train_parameters(list(flow.vector_field.parameters()), lambda folder: flow.vector_field.save_pretrained(folder / "vector_field"))
    run.meter.watch([flow.vector_field])
    run.load_optimizer(args.num_epochs * steps_of_epoch(run, pairs))
    run.resume()
    judged = judged_on((prompt.text for prompt, _ in outputs), {row["prompt"] for row in rows})
    run.print(f"The flow is judged by {len(outputs)} outputs of {judged}.")
    call = {name: getattr(args, name) for name in ("num_inference_steps", "solver", "iterations", "strength")}
    if args.push_to_hub and run.is_main:
        hub.create(run)

    for epoch in run.epochs():
        metrics = train_epoch(run, flow, pairs, epoch)
        if (epoch + 1) % args.validation_epochs == 0:
            with run.averaged(), run.meter.paused():
                metrics |= {"eval_loss": held_out_loss(run, flow, held_out)} if held_out else {}
                shown = preference_flow.transport_outputs(run, flow, outputs[: args.num_validation_images], {}, **call)
            if run.is_main and shown.after:
                (run.output_dir / "samples").mkdir(exist_ok=True)
                save(grid(shown.after, shown.prompts), run.output_dir / "samples" / f"epoch-{epoch + 1:04d}.png")
        run.log(metrics)

    with run.averaged():
        transported = preference_flow.transport_outputs(run, flow, outputs, rewards, **call)
        for name, value in preference_flow.describe(transported, rewards).items():
            run.print(f"{name}: {value}")
        if run.is_main:
            preference_flow.save(run, flow, transported, rewards, judged)
    run.print(f"Pipeline, pictures and model card: {run.output_dir}")
    run.accelerator.end_training()
    transported.check_scored(rewards)


if __name__ == "__main__":
    main()
