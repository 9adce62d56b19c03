"""LoRA in diffusers' own format, and the pretrained model underneath it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import isclose
from pathlib import Path

from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from .checks.given_names import did_you_mean
from .checks.ranges import Count, Positive, check
from .driving.denoisers import denoisers as denoisers_of
from .driving.module_tree import layers_of
from .driving.replacements import held
from .driving.wrappers import bare, unwrapped
from .files import lora_finder, weight_files
from .files.lora_finder import METADATA, WEIGHTS

logger = diffusers_logging.get_logger(__name__)

ADAPTER = "default"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_NO_MATRIX = (".alpha", "dora_scale", "lora_magnitude_vector")


def is_ours(module: nn.Module) -> bool:
    """Whether `add` or `load` gave it an adapter."""
    return any(ADAPTER in layer.lora_A for layer in layers_of(module) if hasattr(layer, "lora_A"))


def attention_targets(module: nn.Module) -> list[str] | str:
    """The attention projections that exist in a denoiser, in diffusers' naming; every linear layer if it uses other names."""
    adapted = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    own = {name: layer for name, layer in module.named_modules() if not any(name.startswith(f"{other}.") for other in adapted)}
    linear = [name for name, layer in own.items() if isinstance(layer.get_base_layer() if name in adapted else layer, nn.Linear)]
    found = [target for target in ATTENTION if any(name.endswith(f".{target}") for name in linear)]
    return found or (linear if adapted else "all-linear")


def add(denoisers: dict[str, nn.Module], rank: int = 16, alpha: int | None = None, **config) -> list[nn.Parameter]:
    """Add a trainable LoRA, Gaussian A and zero B, in float32, to each denoiser; return its parameters.

    Adapters of others that are active stay so, frozen: what is trained learns beside them, and they belong to the reference. The saved file
    holds what is trained alone.

    Args:
        alpha: scale; twice the rank if absent, as in Flow-GRPO.
        config: other fields of `peft.LoraConfig`. `lora_dropout` must stay 0: with dropout a replay is not the rollout's policy.

    Raises:
        ValueError: dropout, `target_modules` that a denoiser does not have, a rank below 1, a scale that is not positive (nothing would be learned),
            there is a LoRA to train already, or one that is fused but still there.
    """
    check({"rank": Count, "alpha": Positive | None}, {"rank": rank, "alpha": alpha})
    if config.get("lora_dropout"):
        raise ValueError("lora_dropout must be 0: with dropout, rollout and replay see different policies and their ratio is not 1.")
    _check_targets(denoisers, config.get("target_modules"))
    parameters = []
    for name, denoiser in denoisers.items():
        with bare(denoiser) as module, _beside_others(name, module):
            if ADAPTER in getattr(module, "peft_config", {}):
                raise ValueError(f"The {name} carries an adapter {ADAPTER!r} already: pipe.unload_lora_weights() takes it off, or load the pipeline anew.")
            fields = {"init_lora_weights": "gaussian", **config, "target_modules": config.get("target_modules") or attention_targets(module)}
            _inject(module, LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, **fields))
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                parameter.of_diffusers_align = True  # handed out to be trained: see `Policy`
                parameters.append(parameter)
    return parameters


def _check_targets(denoisers: dict[str, nn.Module], targets: Iterable[str] | str | None) -> None:
    """A name that no layer has would be left out in silence; a text is a regular expression, or PEFT's own "all-linear"."""
    for target in [] if targets is None or isinstance(targets, str) else targets:
        for name, denoiser in denoisers.items():
            layers = [layer for layer, _ in denoiser.named_modules()]
            if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
                near = did_you_mean(target, {layer.rpartition(".")[2] for layer in layers if not layer.rpartition(".")[2].isdigit()})
                raise ValueError(f"The {name} has no layer {target!r} for a LoRA.{near} A name stands for all layers whose path ends with it, such as to_q.")


def _inject(module: nn.Module, config: LoraConfig) -> None:
    if hasattr(module, "add_adapter"):
        module.add_adapter(config, ADAPTER)
    else:
        inject_adapter_in_model(config, module, ADAPTER)
        module.peft_config = {**getattr(module, "peft_config", {}), ADAPTER: config}


@contextmanager
def _beside_others(name: str, module: nn.Module) -> Iterator[None]:
    """Context: whatever is added within, the adapters that were active stay so, at their scales, and what was frozen stays frozen."""
    before = {layer: [] if layer.disable_adapters else list(layer.active_adapters) for layer in layers_of(module)}
    if any(layer.merged for layer in before):
        raise ValueError(f"A LoRA is fused into the {name} but still there, which would hide another one: call pipe.unload_lora_weights() after fuse_lora().")
    trainable = {parameter: parameter.requires_grad for layer in before for parameter in layer.parameters()}
    yield
    for layer, others in before.items():
        layer.set_adapter([*(other for other in others if other != ADAPTER), *([ADAPTER] if ADAPTER in getattr(layer, "lora_A", ()) else [])])
        layer.enable_adapters(True)
    for parameter, flag in trainable.items():
        parameter.requires_grad_(flag)


# --- files -------------------------------------------------------------------------------------------------------------


def _has_loader(pipeline, name: str, module: nn.Module) -> bool:
    """Whether the stock loader reaches the denoiser, finds there what it needs and can write its LoRA: some are inherited, and made for others."""
    cls, modules = type(pipeline), getattr(type(pipeline), "_lora_loadable_modules", ())
    # A loader made for another pipeline reads text encoders that this one does not have.
    if any(other.startswith("text_encoder") and not hasattr(pipeline, other) for other in modules):
        return False
    try:  # it may read a field of another denoiser's config, whatever the file has in it
        getattr(cls, "_maybe_expand_t2v_lora_for_i2v", lambda *_: None)(module, {})
    except AttributeError:
        return False
    reached = name in modules and hasattr(cls, "save_lora_weights") and hasattr(module, "load_lora_adapter")
    return reached and f"{_part(name)}_lora_layers" in inspect.signature(cls.save_lora_weights).parameters


def _part(name: str) -> str:
    return "transformer" if name.startswith("transformer") else name


def save(pipeline, denoisers: dict[str, nn.Module], directory: str | Path) -> None:
    """Write the LoRA so that `type(pipeline).load_lora_weights(directory)` loads it.

    A second denoiser goes into `<directory>/<its name>`; `stock_lines` says how stock diffusers loads it, and `load` loads all. Pipelines
    without a LoRA loader get peft's keys in the same file, which `load` (or `peft.set_peft_model_state_dict`) reads; a warning says so.
    Equal weights make files of equal bytes.

    Raises:
        ValueError: a denoiser has no LoRA.
    """
    for position, (name, denoiser) in enumerate(denoisers.items()):
        folder = Path(directory) if position == 0 else Path(directory) / name
        folder.mkdir(parents=True, exist_ok=True)
        with bare(denoiser) as module:
            if not is_ours(module):
                raise ValueError(f"The {name} has no LoRA to save: call policy.add_lora() first.")
            state = get_peft_model_state_dict(module, adapter_name=ADAPTER)
            weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            config = _plain(module.peft_config[ADAPTER])
        if _has_loader(pipeline, name, module):
            # Older names, which other tools read. There are none for some layers (add_k_proj), and of a file in two formats a part would be loaded.
            older, part = convert_state_dict_to_diffusers(weights) if name == "unet" else weights, _part(name)
            weights = weights if any(".lora_A." in key for key in older) else older
            type(pipeline).save_lora_weights(folder, **{f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": config})
            weight_files.settle(folder / WEIGHTS)
        else:
            logger.warning(
                f"{type(pipeline).__name__} has no LoRA loader for its {name}: {folder / WEIGHTS} holds peft's keys. Load it with "
                "diffusers_align.load_lora(pipeline, directory) or peft.set_peft_model_state_dict."
            )
            weight_files.save(weights, folder / WEIGHTS, {METADATA: json.dumps(config, indent=2, sort_keys=True)})


def _plain(config: LoraConfig) -> dict:
    """As JSON, without the order in which a set happens to give its entries."""
    return {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in config.to_dict().items()}


def stock_lines(pipeline, denoisers: dict[str, nn.Module], name: str, on_hub: bool = False) -> list[str]:
    """The lines that load what `save` wrote into a stock pipeline `pipe`; `load_lora` where stock diffusers has no way.

    Args:
        name: a folder, which may lie elsewhere when the lines are read, or a repository.
        on_hub: which of the two.
    """
    modules = {component: unwrapped(module) for component, module in denoisers.items()}
    if not all(_has_loader(pipeline, *item) for item in modules.items()):
        return [f'diffusers_align.load_lora(pipe, "{name}")']
    lines = [f'pipe.load_lora_weights("{name}", weight_name="{WEIGHTS}")']
    for component in list(modules)[1:]:
        # Of a local folder diffusers takes the file of that name in it before one in the subfolder.
        where = f'"{name}", subfolder="{component}"' if on_hub else f'"{name}/{component}"'
        lines.append(f'pipe.load_lora_weights({where}, weight_name="{WEIGHTS}", load_into_{component}=True)')
    return lines


def load(pipeline, denoisers: dict[str, nn.Module], path: str | Path) -> None:
    """Load a LoRA: into the adapter that is there, so that training goes on, or as a new frozen one. In both cases the adapter is the file's then.

    Args:
        path: what `save` wrote, a `.safetensors` file, or a folder with one, in any format that the pipeline's `load_lora_weights` reads. The
            files of further denoisers are found beside it; one that is not there is left out, and that is said.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: tensors of the file found no place in the model, or the adapter that is there has other layers, another rank or another scale.
    """
    found = lora_finder.files(path, denoisers)
    if left_out := [name for name in denoisers if name not in found]:
        first = found[next(iter(denoisers))]
        logger.warning(
            f"{first} is the LoRA of the {next(iter(denoisers))} alone; left out: {', '.join(left_out)}, for which there is no "
            f"{' and no '.join(str(first.parent / name / WEIGHTS) for name in left_out)}."
        )
    for position, (name, file) in enumerate(found.items()):
        denoiser, before = denoisers[name], _num_loaded(pipeline)
        fresh = not is_ours(denoiser)
        with bare(denoiser) as module, _beside_others(name, module):
            if not fresh:
                _load_into(module, pipeline, file)
            elif _has_loader(pipeline, name, module):
                extra = {} if position == 0 else {f"load_into_{name}": True}
                pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER, **extra)
            else:
                _load_beside(module, file)
        if fresh:
            for layer in layers_of(module):
                layer.requires_grad_(False)
            _check_all_found(pipeline, file, _num_loaded(pipeline) - before)
        if not any(p.requires_grad for p in module.parameters()):
            module.eval()


def load_lora(pipeline, name: str | Path) -> None:
    """Load a LoRA into every denoiser of a stock pipeline, in one call: what a training run left, a `.safetensors` file, or a Hub repository.

    Raises:
        FileNotFoundError: it is none of these.
        ValueError: it was made for another model.
    """
    load(pipeline, denoisers_of(pipeline), lora_finder.find(name))


def _read(pipeline, file: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The file's tensors in diffusers' keys, whoever wrote it, and the alphas that it states among them, by layer with `.alpha`."""
    if not hasattr(type(pipeline), "lora_state_dict"):
        return load_file(file), {}
    found = type(pipeline).lora_state_dict(str(file.parent), weight_name=file.name)
    weights, alphas = found if isinstance(found, tuple) else (found, None)
    return weights, {name: float(alpha) for name, alpha in (alphas or {}).items()}


def _num_loaded(pipeline) -> int:
    """Matrices of our adapter in all components."""
    layers = [layer for module in pipeline.components.values() if isinstance(module, nn.Module) for layer in layers_of(module)]
    halves = [getattr(layer, half) for layer in layers for half in ("lora_A", "lora_B")]
    return sum(len(list(half[ADAPTER].parameters())) for half in halves if ADAPTER in half)


def _check_all_found(pipeline, file: Path, loaded: int) -> None:
    """Stock diffusers skips what does not fit with a warning at most."""
    stored = sum(not key.endswith(_NO_MATRIX) for key in _read(pipeline, file)[0])
    if loaded == 0 or loaded < stored:
        unload(pipeline)
        raise ValueError(
            f"{file} is not of this {type(pipeline).__name__}: {loaded} of its {stored} tensors found a place. Name the model that it was made for."
        )


def _load_into(module: nn.Module, pipeline, file: Path) -> None:
    """The file's weights in the adapter that is there, which is the file's then: of what the file lacks, or has at another scale, nothing may stay."""
    weights, alphas = _read(pipeline, file)
    for name in ("unet.", "transformer.", "transformer_2."):
        weights, alphas = ({key.removeprefix(name): value for key, value in found.items()} for found in (weights, alphas))
    if not any("lora_A" in key for key in weights):
        weights = convert_unet_state_dict_to_peft(weights)
    own, layers = get_peft_model_state_dict(module, adapter_name=ADAPTER), dict(module.named_modules())
    what_to_do = "Take that one out first, diffusers_align.lora.unload(pipeline), and load the file then."
    if key := min(set(own) ^ set(weights), default=None):
        raise ValueError(f"{file} {'lacks layers of' if key in own else 'has layers beside those of'} the LoRA that is there, such as {key}. {what_to_do}")
    for key, value in own.items():
        if value.shape != weights[key].shape:
            raise ValueError(f"{file} does not fit the LoRA that is there: {key} is {tuple(weights[key].shape)} in it, {tuple(value.shape)} here. {what_to_do}")
    for name, scale in lora_finder.scales(file, weights, alphas).items():
        if not isclose(scale, here := layers[name].scaling[ADAPTER], rel_tol=1e-6):
            raise ValueError(f"{file} would act at another scale in the LoRA that is there: {name} has {scale:g} in the file, {here:g} here. {what_to_do}")
    set_peft_model_state_dict(module, weights, adapter_name=ADAPTER)


def _load_beside(module: nn.Module, file: Path) -> None:
    """A new adapter from peft's keys, for pipelines that have no loader."""
    weights, fields = load_file(file), lora_finder.configuration(file)
    if not fields:
        raise ValueError(f"{file} says nothing of its rank and alpha (metadata {METADATA!r}), and this pipeline has no LoRA loader that would guess them.")
    targets = sorted({key.rsplit(".lora_", 1)[0] for key in weights})
    known = {key: value for key, value in fields.items() if key in LoraConfig.__dataclass_fields__}
    _inject(module, LoraConfig(**{**known, "target_modules": targets}))
    set_peft_model_state_dict(module, weights, adapter_name=ADAPTER)


def unload(pipeline) -> None:
    """Take the adapter of `add` or `load` out of every component; those of others stay."""
    for component in pipeline.components.values():
        if not isinstance(component, nn.Module) or not is_ours(component):
            continue
        with bare(component) as module:
            if {name for layer in layers_of(module) for name in getattr(layer, "lora_A", ["another"])} == {ADAPTER}:
                recurse_remove_peft_layers(module)
                module._hf_peft_config_loaded = False
                module.__dict__.pop("peft_config", None)
            else:
                for layer in layers_of(module):
                    layer.delete_adapter(ADAPTER)
                module.peft_config.pop(ADAPTER, None)


# --- the reference -----------------------------------------------------------------------------------------------------


@contextmanager
def disabled(modules: Iterable[nn.Module], adapter: str | None = None) -> Iterator[None]:
    """Switch adapters off; switch them back on at the end.

    Args:
        adapter: this one alone, so that others that are active go on; all if absent.

    Raises:
        ValueError: one of them is fused, and the weights would have to be changed.
    """
    layers = [layer for module in modules for layer in layers_of(module) if not layer.disable_adapters]
    layers = [layer for layer in layers if adapter is None or adapter in layer.active_adapters]
    if any(set(layer.merged_adapters) & ({adapter} if adapter else set(layer.merged_adapters)) for layer in layers):
        raise ValueError("A LoRA is fused into the weights, so it cannot be switched off: call pipe.unfuse_lora().")
    with ExitStack() as stack:
        for layer in layers:
            others = [name for name in layer.active_adapters if adapter and name != adapter]
            # PEFT's own methods switch off the gradients of each weight, too, which takes most of their time.
            stack.enter_context(held(layer, "_active_adapter", others) if others else held(layer, "_disable_adapters", True))
        yield
