"""Which flags make a run fit: tried one after the other, each with a plan of its own, and kept where it takes less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..training.run.division import divide, divisors
from .planner import Plan, Planner
from .steps import samples_of


def fitted(script: str, args: Any, gpu: int | None, as_on_gpu: bool = True) -> Plan:
    """The plan of a run; where the card is too small, with what to change in `advice`: changes add up, in that order, until it fits or none is left.

    Raises:
        ValueError: as the run itself, where its samples do not divide into batches; or what `Planner` raises.
    """
    divide(args, samples_of(args), steps=1, rank=0, world=1)
    planner = Planner(script, args, as_on_gpu)
    first = best = planner.plan(args, gpu)
    said: list[str] = []
    while not best.fits and gpu is not None:
        for changes in options(best):
            own = best.args.model_copy(update=changes)
            if changes.keys() & {"mixed_precision", "base_quantization"}:
                planner = Planner(script, own, as_on_gpu)
            try:
                found = planner.plan(own, gpu)
            except ValueError:  # an autoencoder that decodes in no parts
                continue
            if found.total < 0.99 * best.total:
                best = found
                said.append(f"{' '.join(map(flag, changes, changes.values()))}: {in_units(found.total)}" + (", fits" if found.fits else ""))
                break
        else:
            break
    return replace(first, advice=said)


def options(plan: Plan) -> Iterator[dict[str, Any]]:
    """Changes of flags that may help, cheapest first."""
    args, fields = plan.args, type(plan.args).model_fields
    if not args.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if args.mixed_precision == "no":
        yield {"mixed_precision": "bf16"}
    if "offload_text_encoders" in fields and not args.offload_text_encoders:
        yield {"offload_text_encoders": True}
    largest = max(plan.stages, key=lambda stage: stage.work.peak).work
    if largest.peaks.get("vae", 0) >= largest.peak:
        yield from ({name: True} for name in ("vae_slicing", "vae_tiling") if name in fields and not getattr(args, name))
    if args.train_batch_size > 1:
        sizes = [size for size in divisors(samples_of(args)) if size <= args.train_batch_size / 2]
        accumulation = args.gradient_accumulation_steps
        for size in sizes[-1:]:
            more = {} if accumulation is None else {"gradient_accumulation_steps": accumulation * args.train_batch_size // size}
            yield {"train_batch_size": size, **more}
    if "two_pass" in fields and not args.two_pass:
        yield {"two_pass": True}
    if "base_quantization" in fields and args.base_quantization == "none" and not args.shard_denoiser:
        yield {"base_quantization": "bnb_4bit"}
    if "use_8bit_adam" in fields and not args.use_8bit_adam:
        yield {"use_8bit_adam": True}


def flag(name: str, value: Any) -> str:
    """As on the command line."""
    return f"--{name}" if value is True else f"--{name} {value}"


def in_units(size: float) -> str:
    """Bytes in units of 2^30, which cards are sold in as GB; in 2^20, MB, where there would be nothing to see."""
    if 0 < size < 0.1 * 2**30:
        return f"{size / 2**20:.1f} MB"
    return f"{size / 2**30:.2f} GB" if size < 100 * 2**30 else f"{size / 2**30:.0f} GB"
