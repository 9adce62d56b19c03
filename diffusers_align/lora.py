"""LoRA in diffusers' own format, and the pretrained model underneath it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from .ranges import Count, Positive, check

logger = diffusers_logging.get_logger(__name__)

ADAPTER = "default"
WEIGHTS = "pytorch_lora_weights.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def attention_targets(module: nn.Module) -> list[str] | str:
    """The attention projections that exist in a denoiser, in diffusers' naming; every linear layer if it uses other names."""
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    found = [target for target in ATTENTION if any(name.endswith(f".{target}") for name in linear)]
    return found or "all-linear"


def add(denoisers: dict[str, nn.Module], rank: int = 16, alpha: int | None = None, **config) -> list[nn.Parameter]:
    """Add a trainable LoRA, Gaussian A and zero B, in float32, to each denoiser; return its parameters.

    Args:
        alpha: scale; twice the rank if absent, as in Flow-GRPO.
        config: other fields of `peft.LoraConfig`. `lora_dropout` must stay 0: with dropout a replay is not the rollout's policy.

    Raises:
        ValueError: dropout, a rank below 1, a scale that is not positive (nothing would be learned), or there is an adapter already.
    """
    check({"rank": Count, "alpha": Positive | None}, {"rank": rank, "alpha": alpha})
    if config.get("lora_dropout"):
        raise ValueError("lora_dropout must be 0: with dropout, rollout and replay see different policies and their ratio is not 1.")
    parameters = []
    for name, module in denoisers.items():
        if any(isinstance(layer, BaseTunerLayer) for layer in module.modules()):
            raise ValueError(f"The {name} carries an adapter already; unload or fuse it first.")
        targets = config.get("target_modules") or attention_targets(module)
        fields = {"init_lora_weights": "gaussian", **config, "target_modules": targets}
        lora_config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, **fields)
        if hasattr(module, "add_adapter"):
            module.add_adapter(lora_config, ADAPTER)
        else:
            inject_adapter_in_model(lora_config, module, ADAPTER)
            module.peft_config = {ADAPTER: lora_config}
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                parameters.append(parameter)
    return parameters


def save(pipeline, denoisers: dict[str, nn.Module], directory: str | Path) -> None:
    """Write the LoRA so that `type(pipeline).load_lora_weights(directory)` loads it.

    A second denoiser goes into `<directory>/<its name>`. Pipelines without a LoRA loader get peft's keys in the same file,
    which `load` (or `peft.set_peft_model_state_dict`) reads; a warning says so.
    """
    for position, (name, module) in enumerate(denoisers.items()):
        folder = Path(directory) if position == 0 else Path(directory) / name
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.detach().cpu().contiguous() for key, value in get_peft_model_state_dict(module, adapter_name=ADAPTER).items()}
        argument = f"{'transformer' if name.startswith('transformer') else name}_lora_layers"
        if hasattr(type(pipeline), "save_lora_weights"):
            if name == "unet":
                weights = convert_state_dict_to_diffusers(weights)
            metadata = {argument.replace("_lora_layers", "_lora_adapter_metadata"): module.peft_config[ADAPTER].to_dict()}
            type(pipeline).save_lora_weights(folder, **{argument: weights}, **metadata)
        else:
            logger.warning(
                f"{type(pipeline).__name__} has no LoRA loader: {folder / WEIGHTS} holds peft's keys. Load it with "
                "Policy(pipeline).load_lora(directory) or peft.set_peft_model_state_dict."
            )
            config = module.peft_config[ADAPTER]
            save_file(weights, folder / WEIGHTS, {"format": "pt", "r": str(config.r), "lora_alpha": str(config.lora_alpha)})


def load(pipeline, denoisers: dict[str, nn.Module], directory: str | Path) -> None:
    """Load a LoRA: into the adapter that is there, so that training goes on, or as a new frozen one."""
    for position, (name, module) in enumerate(denoisers.items()):
        folder = Path(directory) if position == 0 else Path(directory) / name
        if hasattr(module, "peft_config"):
            _load_into(module, pipeline, folder)
        elif hasattr(type(pipeline), "load_lora_weights"):
            extra = {} if position == 0 else {f"load_into_{name}": True}
            pipeline.load_lora_weights(str(folder), weight_name=WEIGHTS, adapter_name=ADAPTER, **extra)
            module.requires_grad_(False)
        else:
            _inject(module, folder)
        if not any(p.requires_grad for p in module.parameters()):
            module.eval()


def _load_into(module: nn.Module, pipeline, folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    if hasattr(type(pipeline), "lora_state_dict"):
        weights = type(pipeline).lora_state_dict(str(folder), weight_name=WEIGHTS)
        weights = weights[0] if isinstance(weights, tuple) else weights
    weights = {_peft_key(key): value for key, value in weights.items()}
    result = set_peft_model_state_dict(module, weights, adapter_name=ADAPTER)
    if result is not None and result.unexpected_keys:
        raise ValueError(f"{folder / WEIGHTS} does not fit this model: unexpected keys such as {result.unexpected_keys[:3]}.")


def _peft_key(key: str) -> str:
    for prefix in ("unet.", "transformer.", "transformer_2."):
        key = key.removeprefix(prefix)
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def _inject(module: nn.Module, folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        meta = file.metadata()
    weights = load_file(folder / WEIGHTS)
    targets = sorted({key.rsplit(".lora_", 1)[0] for key in weights})
    config = LoraConfig(r=int(meta["r"]), lora_alpha=int(meta["lora_alpha"]), target_modules=targets)
    inject_adapter_in_model(config, module, ADAPTER)
    module.peft_config = {ADAPTER: config}
    module.requires_grad_(False)
    set_peft_model_state_dict(module, weights, adapter_name=ADAPTER)


@contextmanager
def disabled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch every adapter layer off; switch them, and what was trainable, back on at the end."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    trainable = [[p.requires_grad for p in layer.parameters()] for layer in layers]
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, was_off, flags in zip(layers, before, trainable):
            layer.enable_adapters(not was_off)
            for parameter, flag in zip(layer.parameters(), flags):
                parameter.requires_grad_(flag)
