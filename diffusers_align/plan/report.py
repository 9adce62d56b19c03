"""A plan in words: a table for a terminal, and a row of the documentation's."""

from __future__ import annotations

from typing import Any

from .advice import flag, in_units
from .planner import SHARE, Plan

COLUMNS = (
    "model", "recipe's script", "samples at a time", "weights", "LoRA, its gradient and optimizer", "kept of an epoch", "one gradient step",
    "the same, recomputed", "decoding", "text encoding", "total", "rows an epoch", "of them with gradient", "PFLOP an epoch",
)  # fmt: skip


def report(plan: Plan) -> str:
    """All that is known of it, by lines."""
    args, gradient = plan.args, max((stage for stage in plan.stages if stage.has_gradient), key=lambda stage: max(stage.peaks.values()))
    batch = f"--train_batch_size {args.train_batch_size} --mixed_precision {args.mixed_precision}"
    size = " ".join(flag(name, getattr(args, name)) for name in ("height", "width") if getattr(args, name, None))
    lines = [
        f"{plan.script} on {args.pretrained_model_name_or_path}, {batch} {size}".rstrip(),
        "Computed, not measured: one batch was run on models without weights. GB are 2^30 bytes, MB 2^20.",
        "",
    ]
    for name, component in plan.components.items():
        lines.append(row(name, component.size, f"{component.parameters / 1e6:,.1f} M parameters, {component.kind}"))
    if plan.away:
        lines.append(row("text encoders, away", -plan.away, "they are on the CPU except while they encode"))
    if plan.unpacked:
        lines.append(row("unpacked weights", plan.unpacked, "of those that are quantised, at a time"))
    copies = "".join(f", {name}" for name in plan.state if name not in ("weights", "gradients", "Adam"))
    lines.append(row("LoRA", sum(plan.state.values()), f"{plan.trained / 1e6:,.2f} M parameters: weights, gradients, Adam's moments{copies}, in float32"))
    if plan.stored:
        lines.append(row("kept of an epoch", plan.stored, "trajectories and encoded prompts"))
    for stage in plan.stages:
        lines.append(row(stage.name, stage.work.peak, f"at its peak; {stage.times:,.0f} times an epoch"))
    lines += [
        row("total", plan.total, "weights, LoRA, what is kept, and the largest of these peaks"),
        "",
        row("one gradient step", gradient.peaks[False], "with the denoiser's activations kept"),
        row("", gradient.peaks[True], "with --gradient_checkpointing"),
        *([row("decoding", plan.peak_of("vae"), "at its peak, in the largest stage that decodes")] if plan.peak_of("vae") else []),
        *([row("text encoding", plan.peak_of("text_encoder"), "at its peak")] if plan.peak_of("text_encoder") else []),
        "",
        f"An epoch: {sum(plan.rows):,} rows through the denoiser, {plan.rows[1]:,} of them with gradients; {plan.flops / 1e15:,.4g} PFLOP.",
        f"Not in it: the reward's own model, evaluation at larger sizes, the card's context and fragments{_unseen(args)}.",
        verdict(plan),
    ]
    return "\n".join(lines)


def _unseen(args: Any) -> str:
    """Flags that are given and that no plan looks at."""
    return "".join(f", what --{name} changes" for name in ("shard_denoiser", "compile", "attention_backend") if getattr(args, name, None))


def row(name: str, size: int, text: str) -> str:
    """A line with a size."""
    return f"{name:<28}{in_units(size):>10}  {text}"


def verdict(plan: Plan) -> str:
    """Whether it fits, and what would make it so."""
    if plan.gpu is None:
        return ""
    room = f"{in_units(SHARE * plan.gpu)} of a card of {in_units(plan.gpu)} ({1 - SHARE:.0%} are left to its context and fragments)"
    if plan.fits:
        return f"Fits: {in_units(plan.total)} within {room}."
    lines = [f"Does not fit: {in_units(plan.total)}, and there are {room}."]
    lines += ["With these changes, one after the other:", *(f"  {text}" for text in plan.advice)] if plan.advice else ["No flag makes it smaller."]
    if not (plan.advice and plan.advice[-1].endswith("fits")):
        lines.append(
            f"That is as small as its flags make it. The weights alone are {in_units(plan.frozen)}: take a smaller size of picture or model, a larger card, or "
            "several with --shard_denoiser."
        )
    return "\n".join(lines)


def markdown(plan: Plan) -> str:
    """A row of a table with `COLUMNS`."""
    gradient = max((stage for stage in plan.stages if stage.has_gradient), key=lambda stage: max(stage.peaks.values()))
    sizes = (
        plan.frozen,
        sum(plan.state.values()),
        plan.stored,
        gradient.peaks[False],
        gradient.peaks[True],
        plan.peak_of("vae"),
        plan.peak_of("text_encoder"),
        plan.total,
    )
    without, with_gradient = plan.rows
    cells = [plan.args.pretrained_model_name_or_path, plan.script, str(plan.args.train_batch_size), *map(in_units, sizes)]
    cells += [f"{without + with_gradient:,}", f"{with_gradient:,}", f"{plan.flops / 1e15:,.3g}"]
    return f"| {' | '.join(cells)} |"
