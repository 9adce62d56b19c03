"""Which model, how it is called and in which precision; in diffusers' names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import field_validator, model_validator

from .options import Arguments, Guidance, Pixels, Rank, Steps, option, required
from .recipes import suggestion

EMBEDDED = ("mini-sd", "mini-sd3")
# What every call gets from the package itself.
OWN_CALL_KWARGS = (
    "prompt", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt", "callback",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs",
)  # fmt: skip
EvalScheduler = Literal["stock", "twin"]


class PrecisionArguments(Arguments):
    """compute"""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "dtype of the frozen weights and of autocast")


class ComputeArguments(PrecisionArguments):
    """compute"""

    gradient_checkpointing: bool = option(False, "recompute the denoiser's activations in the backward pass", resume="free")
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere and later", advanced=True, resume="takes effect")


class PipelineArguments(Arguments):
    """model"""

    pretrained_model_name_or_path: str = required(
        "a diffusers pipeline: Hub name, folder, .safetensors file, or an embedded model (mini-sd, mini-sd3)", resume="content"
    )
    single_file_config: str | None = option(None, "of a .safetensors file as the model: a folder or Hub name of a pipeline of its architecture", advanced=True)
    revision: str | None = option(None, "revision of the pipeline on the Hub", advanced=True)
    variant: str | None = option(None, "variant of its files, such as fp16", advanced=True)

    @model_validator(mode="after")
    def _check_name(self):
        name = self.pretrained_model_name_or_path
        if name and name not in EMBEDDED and "/" not in name and not Path(name).is_dir() and (near := suggestion(name, EMBEDDED)):
            raise ValueError(f"--pretrained_model_name_or_path {name} is no folder and no embedded model{near}")
        return self


class SizeArguments(Arguments):
    """model"""

    height: Pixels | None = option(None, "pixels; the pipeline's default if absent")
    width: Pixels | None = option(None, "pixels; the pipeline's default if absent")
    call_kwargs: dict[str, Any] = option({}, "other arguments of the pipeline's call, as JSON: '{\"num_frames\": 33}'")

    @model_validator(mode="after")
    def _check_call_kwargs(self):
        for name in self.call_kwargs:
            if name in type(self).model_fields:
                raise ValueError(f"--call_kwargs holds {name}, which has a flag of its own: use --{name}")
            if name in OWN_CALL_KWARGS:
                raise ValueError(f"--call_kwargs holds {name}, which the script gives the pipeline itself: leave it out")
        return self


class CallArguments(SizeArguments):
    """model"""

    num_inference_steps: Steps | None = option(None, "solver steps; the pipeline's default if absent")
    guidance_scale: Guidance | None = option(None, "classifier-free guidance; the pipeline's default if absent")


class EvalSchedulerArguments(Arguments):
    """model"""

    eval_scheduler: EvalScheduler = option("stock", "evaluate with the pipeline's own solver, or along the SDE twin's ODE", advanced=True, resume="measured")


class DecodingArguments(Arguments):
    """model"""

    vae_slicing: bool = option(False, "decode the samples of a batch one after the other, where the autoencoder can", advanced=True, resume="takes effect")
    vae_tiling: bool = option(False, "decode in tiles, some autoencoders also in some frames at a time: seams may show", advanced=True, resume="takes effect")


class ModelArguments(EvalSchedulerArguments, PipelineArguments, DecodingArguments, CallArguments):
    """model"""

    offload_text_encoders: bool = option(
        False, "text encoders are on the CPU except while they encode; each prompt is encoded by itself, once a run", advanced=True, resume="free"
    )
    base_quantization: Literal["none", "torchao_int8", "bnb_8bit", "bnb_4bit"] = option(
        "none", "frozen denoiser weights in 8 or 4 bits (torchao, bitsandbytes), under a LoRA in float32", advanced=True
    )
    quantize_text_encoders: bool = option(
        False, "quantise the text encoders, too", needs={"base_quantization": ("bnb_4bit", "bnb_8bit", "torchao_int8")}, advanced=True
    )
    shard_denoiser: bool = option(False, "spread the frozen denoiser over the processes (FSDP2); the LoRA stays whole", advanced=True, resume="free")
    compile: bool = option(
        False,
        "torch.compile of the denoiser, of its repeated blocks where it names them: its first calls take minutes; roll-outs hold a call's activations",
        advanced=True,
        resume="takes effect",
    )
    attention_backend: str | None = option(
        None, "diffusers' attention kernels for the denoiser, such as native, flash or xformers; its own if absent", advanced=True, resume="takes effect"
    )
    rank: Rank = option(32, "rank of the LoRA")
    lora_alpha: Annotated[int, Interval(ge=1, le=65536)] | None = option(None, "scale of the LoRA; twice the rank if absent", advanced=True)
    lora_layers: str | None = option(None, "comma-separated modules that get a LoRA; the attention projections if absent", advanced=True)
    num_inference_steps: Steps = option(10, "solver steps of training rollouts")
    eval_num_inference_steps: Steps | None = option(None, "solver steps of evaluation; as in training if absent", advanced=True, resume="measured")
    guidance_scale: Guidance | None = option(None, "classifier-free guidance of rollouts, replays and evaluation; the pipeline's default if absent")
    eval_guidance_scale: Guidance | None = option(None, "guidance of evaluation and pictures; as in training if absent", advanced=True, resume="measured")

    @model_validator(mode="after")
    def _check_compile(self):
        if self.compile and self.shard_denoiser:
            raise ValueError("--compile with --shard_denoiser: the weights that FSDP gathers for each call would break the graph; leave out one of them")
        return self

    @model_validator(mode="after")
    def _check_quantization(self):
        if self.base_quantization == "torchao_int8" and not getattr(self, "gradient_checkpointing", True):
            raise ValueError(
                "--base_quantization torchao_int8 needs --gradient_checkpointing: autograd keeps torchao's weights unpacked, all of them where the "
                "activations are kept, and those of a block at a time where they are computed again"
            )
        if self.base_quantization != "none" and self.shard_denoiser:
            raise ValueError("--shard_denoiser spreads weights of one precision, and --base_quantization packs them into bytes with scales: leave one out")
        if self.base_quantization != "none" and self.pretrained_model_name_or_path.endswith((".safetensors", ".ckpt")):
            raise ValueError("--base_quantization is for a pipeline's folder or repository, which diffusers quantises while it loads: convert the single file")
        if self.quantize_text_encoders and self.offload_text_encoders and self.base_quantization == "bnb_8bit":
            raise ValueError(
                "--offload_text_encoders moves the text encoders, which those of bitsandbytes in 8 bits cannot do: take bnb_4bit, or leave one out"
            )
        return self

    @field_validator("lora_layers")
    @classmethod
    def _check_layers(cls, value):
        layers = [layer.strip() for layer in (value or "").split(",")]
        if value is not None and not all(layers):
            raise ValueError("must be names of layers with a comma between two of them")
        return value and ",".join(layers)
