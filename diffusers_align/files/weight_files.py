"""Safetensors files of which equal contents make equal bytes, and that those may read whom the umask lets."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import torch as safetensors_torch
from torch import Tensor


def save(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors, from any device, to a safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    Path(path).write_bytes(_in_order(safetensors_torch.save(plain, {"format": "pt", **(metadata or {})})))


def settle(path: str | Path) -> None:
    """Rewrite a safetensors file that the library wrote: with its metadata in the order of a hash table, and for the owner alone."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(_in_order(path.read_bytes()))
    beside.replace(path)


def settle_all(folder: str | Path) -> None:
    """`settle` every safetensors file below `folder`."""
    for path in sorted(Path(folder).rglob("*.safetensors")):
        settle(path)


def _in_order(content: bytes) -> bytes:
    """A file's content with its metadata sorted."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if "__metadata__" in header:
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]
