"""Whether what encodes a pipeline's prompts is what it was: its networks, their weights, and what LoRAs do to them.

What was encoded is of use as long as this stays. Weights that move to another device stay the same, those that are written to do not. What goes past
torch's count of writes (`weight.data` itself) is not seen.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .denoisers import denoisers
from .module_tree import carries_adapters, modules_of
from .parts import components_of


class EncoderState(NamedTuple):
    """Equal as long as equal prompts are encoded alike.

    Attributes:
        weights: a number for each network, which changes for good with its modules or weights.
        adapters: what its LoRA layers do, which may come back; empty where there are none.
    """

    weights: tuple[int, ...]
    adapters: tuple


class _Seen(NamedTuple):
    """A network as it was when its number was given. What it holds of the network's parts keeps their identities from being given away."""

    number: int
    parts: list[dict[str, nn.Module | None]]
    children: list[nn.Module | None]
    weights: list[dict[str, Tensor | None]]
    tensors: list[Tensor | None]
    versions: list[int]
    layers: list[BaseTunerLayer]


# Values of each tensor that a digest looks at: training, fusing a LoRA or quantising changes nearly all of them.
SAMPLED = 64
_SEEN: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()
_NUMBERS = itertools.count()


def encoder_state(pipeline) -> EncoderState:
    """Of all networks of the pipeline but its denoisers."""
    seen = [_seen(network) for network in _encoders(pipeline).values()]
    return EncoderState(tuple(known.number for known in seen), tuple(_acting(layer) for known in seen for layer in known.layers))


def _encoders(pipeline) -> dict[str, nn.Module]:
    """All networks of the pipeline but its denoisers, by name."""
    networks = {name: part for name, part in components_of(pipeline).items() if isinstance(part, nn.Module)}
    ours = set(denoisers(pipeline).values()) if networks else ()
    return {name: network for name, network in networks.items() if network not in ours}


def encoder_digest(pipeline) -> str:
    """What tells the pipeline's networks but its denoisers from others, also in another process: a hash of their configs, of their tensors' names, shapes and
    precisions, and of up to `SAMPLED` values of each. Of packed weights (quantised ones) and those that are elsewhere, no values."""
    digest = hashlib.sha256()
    for name, network in sorted(_encoders(pipeline).items()):
        config = getattr(network, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, Mapping) else {"config": str(config)}
        digest.update(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True, default=str).encode())
        for key, tensor in itertools.chain(network.named_parameters(), network.named_buffers()):
            digest.update(f"{name}.{key} {type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
                values = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLED)][:SAMPLED]
                digest.update(values.cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _seen(network: nn.Module) -> _Seen:
    """What is known of it, if that holds still. Models have thousands of modules, of which nothing is asked that need not be."""
    known = _SEEN.get(network)
    if known is not None and _same(known.parts, known.children) and _same(known.weights, known.tensors) and _versions(known.tensors) == known.versions:
        return known
    modules = modules_of(network)
    parts, layers = [module._modules for module in modules], [module for module in modules if carries_adapters(type(module))]
    weights = [module._parameters for module in modules if not _comes_and_goes(module)]
    tensors = _values(weights)
    _SEEN[network] = _Seen(next(_NUMBERS), parts, _values(parts), weights, tensors, _versions(tensors), layers)
    return _SEEN[network]


def _values(dicts: list[dict]) -> list:
    return list(itertools.chain.from_iterable(map(dict.values, dicts)))


def _same(dicts: list[dict], before: list) -> bool:
    values = _values(dicts)
    return len(values) == len(before) and all(map(operator.is_, values, before))


def _versions(tensors: list[Tensor | None]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors if tensor is not None]
    except RuntimeError:  # inference tensors do not count
        return []


def _comes_and_goes(module: nn.Module) -> bool:
    """Whether accelerate gives the module other parameters for each call, which hold the same weights."""
    hook = module.__dict__.get("_hf_hook")
    return any(getattr(own, "offload", False) for own in getattr(hook, "hooks", [hook]))


def _acting(layer: BaseTunerLayer) -> tuple[Any, ...]:
    return layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters), tuple(getattr(layer, "scaling", {}).items())
