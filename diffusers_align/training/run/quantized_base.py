"""`--base_quantization`: frozen weights in 8 or 4 bits, by what diffusers has for it. The LoRA on top is in float32."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...driving.encoders_away import PREFIX

# By value of the flag: the library that it takes, and bytes of a quantised weight with its scales (a float32 for 64 weights, or for a row of them).
LIBRARIES = {"torchao_int8": "torchao", "bnb_8bit": "bitsandbytes", "bnb_4bit": "bitsandbytes"}
BYTES = {"torchao_int8": 1.0, "bnb_8bit": 1.0, "bnb_4bit": 0.5 + 4 / 64}
DENOISERS = ("unet", "transformer")


def quantized_names(names: Any, text_encoders: bool) -> list[str]:
    """Which of a pipeline's components are quantised: denoisers, and text encoders if asked for."""
    return [name for name in names if name.startswith((*DENOISERS, *([PREFIX] if text_encoders else [])))]


def check_library(flag: str, value: str) -> None:
    """Raise an ImportError if the library of a value of `--base_quantization` is not installed."""
    if importlib.util.find_spec(LIBRARIES[value]) is None:
        raise ImportError(f"--{flag} {value} takes {LIBRARIES[value]}, which is not installed: run `pip install {LIBRARIES[value]}`, or leave the flag out.")


def quantization(args: Any, source: str, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword argument of `DiffusionPipeline.from_pretrained` for the flags; {} without.

    Raises:
        ImportError: the library is not installed.
        ValueError: bitsandbytes, which diffusers takes on a GPU alone, and there is none; a pipeline without components of the names that are quantised.
    """
    kind = getattr(args, "base_quantization", "none")
    if kind == "none":
        return {}
    check_library("base_quantization", kind)
    if LIBRARIES[kind] == "bitsandbytes" and not torch.cuda.is_available():
        raise ValueError(f"--base_quantization {kind}: diffusers quantises with bitsandbytes on a GPU alone, and there is none. Take torchao_int8 here.")
    index = DiffusionPipeline.load_config(source, revision=args.revision)
    loaded = {name: value[0] for name, value in index.items() if isinstance(value, (list, tuple)) and value[1] is not None}
    names = quantized_names(loaded, args.quantize_text_encoders)
    if not any(name.startswith(DENOISERS) for name in names):
        raise ValueError(f"--base_quantization: {source} has no component called {' or '.join(DENOISERS)}, so nothing says what to quantise: leave it out.")
    from diffusers import PipelineQuantizationConfig

    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={name: _config(kind, loaded[name], dtype) for name in names})}


def _config(kind: str, library: str, dtype: torch.dtype) -> Any:
    """Of a component that `library`, diffusers or transformers, loads."""
    classes = importlib.import_module("diffusers" if library != "transformers" else "transformers")
    if kind == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return classes.TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bnb_8bit":
        return classes.BitsAndBytesConfig(load_in_8bit=True)
    return classes.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
