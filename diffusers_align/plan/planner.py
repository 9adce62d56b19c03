"""What a run of a script takes, by running one batch of it on models without weights."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..driving.encoders_away import PREFIX
from ..driving.prompt_memory import AT_HAND
from ..policy import Policy
from ..training.run.decoding import PARTS, decode_in_parts
from ..training.run.model_loading import DTYPES, call_arguments, model_source, training_scheduler
from ..training.run.optimizer import bytes_of_moments
from ..training.run.quantized_base import BYTES, LIBRARIES, quantized_names
from ..training.run.single_file import is_single_file
from .fakes import FakeModels
from .meter import Meter, Work
from .models import build, configs_of
from .steps import Bench, Stage, noise_of, stages

# What is left of a card for the driver's context, kernels' workspaces and the allocator's fragments: none of it is computed.
SHARE = 0.9


@dataclass(frozen=True)
class Component:
    """A model of the pipeline: its class, its parameters, and their bytes (buffers with them) in the run's precision, or quantised as the flags say; then
    also the bytes of those weights that are unpacked at a time."""

    kind: str
    parameters: int
    size: int
    unpacked: int = 0


@dataclass(frozen=True)
class Measured:
    """A stage of an epoch: what it takes once, how often it comes, its `peak` with the denoiser's activations kept, and computed again, and the bytes of the
    encoded prompts that are left of it."""

    name: str
    work: Work
    times: float
    has_gradient: bool
    peaks: dict[bool, int]
    prompts: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run takes on one card, in bytes.

    Attributes:
        components: by name.
        trained: the LoRA's parameters.
        state: of them, in float32: weights, gradients, Adam's two moments, and copies of the weights that flags ask for.
        stages: of an epoch.
        gpu: bytes of the card; None where none was named.
    """

    script: str
    args: Any
    components: dict[str, Component]
    trained: int
    state: dict[str, int]
    stages: list[Measured]
    gpu: int | None = None
    advice: list[str] = field(default_factory=list)

    @property
    def frozen(self) -> int:
        """Weights of all components."""
        return sum(component.size for component in self.components.values())

    @property
    def away(self) -> int:
        """Weights of the text encoders where they are on the device only while they encode (`--offload_text_encoders`)."""
        sizes = [component.size for name, component in self.components.items() if name.startswith(PREFIX)]
        return sum(sizes) if self.args.offload_text_encoders else 0

    @property
    def stored(self) -> int:
        """Trajectories and encoded prompts of an epoch."""
        kept = 0
        for stage in self.stages:
            if not stage.has_gradient:  # of encoded prompts, the latest alone are here where the text encoders are not
                elsewhere = stage.prompts * max(stage.times - AT_HAND, 0) if self.away else 0
                kept += stage.work.left * stage.times - elsewhere
        return int(kept)

    @property
    def activations(self) -> int:
        """The largest peak of a stage."""
        return max(stage.work.peak for stage in self.stages)

    @property
    def total(self) -> int:
        """The peak of the run: of an epoch, or of text encoders' visit to the device."""
        whole = self.frozen + sum(self.state.values()) + self.stored
        return max(whole - self.away + self.activations + self.unpacked, whole + self.peak_of(PREFIX) if self.away else 0)

    @property
    def unpacked(self) -> int:
        """Of quantised weights, what is there in the run's precision at a time."""
        return max(component.unpacked for component in self.components.values())

    @property
    def fits(self) -> bool | None:
        """Whether that is within `SHARE` of the card."""
        return None if self.gpu is None else self.total <= SHARE * self.gpu

    @property
    def rows(self) -> tuple[int, int]:
        """Denoiser rows of an epoch: without gradients, with."""
        return tuple(round(sum(stage.work.rows[grad] * stage.times for stage in self.stages)) for grad in (False, True))

    @property
    def flops(self) -> float:
        """Floating-point operations of an epoch, recomputation included."""
        return sum(stage.work.flops * stage.times for stage in self.stages)

    def peak_of(self, kind: str) -> int:
        """The largest peak that was reached within components whose name begins so, activations alone; 0 if none was run."""
        return max((peak for stage in self.stages for name, peak in stage.work.peaks.items() if name.startswith(kind)), default=0)


class Planner:
    """One pipeline of fake weights with a LoRA, on which plans for several flags are made.

    Raises:
        FileNotFoundError: no such model.
        ValueError: no configs of it, a single file, a script or a flag that no plan is known for, or what the pipeline itself refuses.
    """

    def __init__(self, script: str, args: Any, as_on_gpu: bool = True):
        name, self.script, self.meter = args.pretrained_model_name_or_path, script, Meter()
        if is_single_file(name):
            raise ValueError(f"{name} is a file of weights, and a plan is made from configs: name the folder or the Hub repository of its pipeline.")
        source = model_source(name)
        folder = Path(source) if Path(source).is_dir() else None
        self.fakes = FakeModels(self.meter, as_on_gpu)
        self.pipeline = build(self.fakes, configs_of(source, folder), DTYPES[args.mixed_precision], folder)
        parts = {name: part for name, part in self.pipeline.components.items() if hasattr(part, "parameters")}
        quantised = quantized_names(parts, args.quantize_text_encoders)
        self.components = {name: component_of(part, args.base_quantization if name in quantised else "none") for name, part in parts.items()}
        self.policy = Policy(self.pipeline, training_scheduler(self.pipeline, **noise_of(args)), **call_arguments(args, self.pipeline))
        self.fakes.denoisers |= set(self.policy.denoisers)
        config = {"target_modules": args.lora_layers.split(",")} if args.lora_layers else {}
        with self.fakes.making():
            self.policy.add_lora(args.rank, args.lora_alpha, **config)

    def plan(self, args: Any, gpu: int | None = None) -> Plan:
        """For flags that differ in the sizes of batches and in what is computed again or in parts; model, precision and LoRA are the planner's."""
        self.decode_in_parts(args)
        with self.fakes.making():
            bench = Bench(args, self.policy, self.meter)
        found = [self.measured(bench, stage) for stage in self.prepared(bench, args)]
        trained = sum(parameter.numel() for parameter in bench.parameters)
        copies = {"average": bool(getattr(args, "use_ema", False)), "moving reference": bool(getattr(args, "reference_decay", None))}
        moments = bytes_of_moments(args, [parameter.numel() for parameter in bench.parameters])
        state = {"weights": 4 * trained, "gradients": 4 * trained, "Adam": moments, **{name: 4 * trained for name, has in copies.items() if has}}
        return Plan(self.script, args, self.components, trained, state, found, gpu)

    def prepared(self, bench: Bench, args: Any) -> list[Stage]:
        """The stages. What the library finds out by trying, once, is known of those without gradients; of the others it is when the second of two
        measurements is made."""
        self.recompute(args.gradient_checkpointing)
        found = stages(self.script, bench)
        for stage in found:
            if not stage.has_gradient:
                stage.once()
        return found

    def measured(self, bench: Bench, stage: Stage) -> Measured:
        """A stage with the flags' own choice of recomputation, and its peak with the other."""
        chosen, works = bench.args.gradient_checkpointing, {}
        for recompute in [not chosen, chosen] if stage.has_gradient else [chosen]:
            self.recompute(recompute)
            self.policy.prompt_memory.entries.clear()
            self.policy.prompt_memory.features.clear()
            with bench.measured() as works[recompute]:
                stage.once()
        encoded = [x for result, *_ in self.policy.prompt_memory.entries.values() for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        peaks = {recompute: work.peak for recompute, work in works.items()}
        return Measured(stage.name, works[chosen], stage.times, stage.has_gradient, peaks, sum(x.nbytes for x in encoded))

    def recompute(self, on: bool) -> None:
        """The denoisers' activations are computed again on the way back, or not."""
        for module in self.policy.denoisers.values():
            module.enable_gradient_checkpointing(self.fakes.checkpoint) if on else module.disable_gradient_checkpointing()

    def decode_in_parts(self, args: Any) -> None:
        """As `--vae_slicing` and `--vae_tiling` say, and not as a plan before."""
        self.fakes.forget()
        for part in self.pipeline.components.values():
            for method in ("disable_slicing", "disable_tiling"):
                if hasattr(part, "decode") and hasattr(part, method):
                    getattr(part, method)()
        decode_in_parts(self.pipeline, *(flag for flag in PARTS if getattr(args, flag, False)))


def component_of(module: Any, quantization: str = "none") -> Component:
    """What a model is and weighs, its linear layers quantised as `--base_quantization` says."""
    parameters = list(module.parameters())
    size = sum(x.numel() * x.element_size() for x in (*parameters, *module.buffers()))
    if quantization == "none":
        return Component(type(module).__name__, sum(x.numel() for x in parameters), size)
    blocks: Counter[str] = Counter()
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            weight = part.weight
            scales = 0 if quantization == "bnb_4bit" else 4 * len(weight)
            size -= int(weight.numel() * (weight.element_size() - BYTES[quantization])) - scales
            # torchao's are unpacked for the way back, of a block that is computed again; those of bitsandbytes one by one.
            block = re.match(r"(.*?\.\d+|)", name)[0] if LIBRARIES[quantization] == "torchao" else name
            blocks[block] += weight.numel() * weight.element_size()
    return Component(type(module).__name__, sum(x.numel() for x in parameters), size, max(blocks.values(), default=0))
