"""Safetensors files of which equal contents make equal bytes, and that those may read whom the umask lets."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from safetensors import torch as safetensors_torch
from torch import Tensor

SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt")
# Of each file, so many pieces of so many bytes: training, or fusing a LoRA, changes most of what is in it.
PIECES, BYTES = 64, 4096


def digest_of_model(name: str) -> str | None:
    """What tells the weights that a model's folder holds from others that it has held: a hash of its weight files' names and sizes and of pieces of them, where
    it has an index of its components alone. None of what is no folder."""
    folder, digest = Path(name).expanduser(), hashlib.sha256()
    if not folder.is_dir():
        return None
    for path in sorted(path for path in _own_files(folder) if path.suffix in SUFFIXES and path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        take_pieces(digest, path)
    return digest.hexdigest()


def _own_files(folder: Path) -> list[Path]:
    """Without what runs have left in it: checkpoints, or an output folder."""
    index = next((file for file in (folder / "model_index.json", folder / "modular_model_index.json") if file.is_file()), None)
    if index is None:
        return list(folder.rglob("*"))
    parts = [folder / name for name in json.loads(index.read_text(encoding="utf-8")) if (folder / name).is_dir()]
    return [*folder.iterdir(), *(file for part in parts for file in part.rglob("*"))]


def take_pieces(digest, path: Path) -> None:
    """Add pieces of a large file to a hash, the first and the last among them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for piece in range(PIECES):
            file.seek(max(0, size - BYTES) * piece // (PIECES - 1))
            digest.update(file.read(BYTES))


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
