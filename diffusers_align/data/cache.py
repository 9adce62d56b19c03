"""Latents and text embeddings on disk: computed once, safe under several processes and kills."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor
from torch.utils import _pytree as pytree


def key_of(*parts: Any) -> str:
    """A cache's key from what its entry depends on: the image's `content_hash`, the size, the augmentation's `key`; or a prompt."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class TensorCache:
    """Nested tensors (dicts, lists and tuples of tensors, numbers, strings and None) in safetensors files, one an entry.

    A file appears under its name only when it is whole; of two processes that write one entry the last wins. Dtypes are kept.

    Args:
        folder: of the cache; several models can share it.
        model_key: what the tensors were computed with: the model's name and revision, the dtype, the kind of tensor ...
        at_hand: bytes of the latest entries that stay in memory once they are read: opening a file takes longer than a forward pass of a small model.
    """

    def __init__(self, folder: str | Path, model_key: str, at_hand: int = 0):
        self.at_hand, self._kept, self._size = at_hand, OrderedDict[str, Any](), 0
        self.folder = Path(folder) / key_of(model_key)[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_size": 0}  # copies read anew rather than take as much again

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Any:
        """The entry on the CPU, the caller's own, or None. A damaged file counts as absent, with a warning.

        Raises:
            OSError: the file is there but cannot be read.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return _copied(self._kept[key])
        found = self._read(key)
        if found is not None and self.at_hand:
            self._keep(key, found)
            return _copied(found)
        return found

    def _keep(self, key: str, tree: Any) -> None:
        """As the latest entry; the oldest go where there is no room."""
        self._kept[key], self._size = tree, self._size + _bytes(tree)
        while self._size > self.at_hand and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        if (tree := self._kept.pop(key, None)) is not None:
            self._size -= _bytes(tree)

    def _read(self, key: str) -> Any:
        try:
            with safe_open(self._path(key), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                return _unpacked(json.loads(file.metadata()["tree"]), tensors)
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            warnings.warn(f"The cache's file {self._path(key)} is damaged ({error}) and will be computed again.", stacklevel=2)
            return None

    def put(self, key: str, tree: Any) -> None:
        """Store an entry, in place of any that is there.

        Raises:
            TypeError: something in it is neither a tensor nor plain.
        """
        tensors: dict[str, Tensor] = {}
        metadata = {"tree": json.dumps(_packed(tree, tensors))}
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{key}-{uuid.uuid4().hex}.partial")
        try:
            partial.write_bytes(serialised(tensors, metadata))  # not save_file, whose files are for the owner alone
            os.replace(partial, path)
            self._drop(key)
        finally:
            partial.unlink(missing_ok=True)

    def get_or_compute(self, keys: Sequence[str], compute_batch: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
        """The entries of `keys`; `compute_batch` gets the positions of those that are missing and returns one tree for each.

        Raises:
            ValueError: it returns another number of them.
        """
        first = {key: position for position, key in reversed(list(enumerate(keys)))}
        found = {key: self.get(key) for key in first}
        missing = sorted(first[key] for key, tree in found.items() if tree is None)
        computed = compute_batch(missing) if missing else []
        if len(computed) != len(missing):
            raise ValueError(f"compute_batch returned {len(computed)} entries for {len(missing)} positions.")
        for position, tree in zip(missing, computed):
            self.put(keys[position], tree)
            found[keys[position]] = self.get(keys[position])
        return [found[key] for key in keys]

    def size(self) -> tuple[int, int]:
        """Entries and bytes of this model's part of the cache."""
        sizes = [path.stat().st_size for path in self.folder.glob("*/*.safetensors")]
        return len(sizes), sum(sizes)


def _copied(tree: Any) -> Any:
    """With tensors and containers of its own. Entries are small and many: torch's own walk over them takes longer than their bytes."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {name: _copied(part) for name, part in tree.items()}
    return type(tree)(map(_copied, tree)) if isinstance(tree, (list, tuple)) else tree


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _packed(tree: Any, tensors: dict[str, Tensor]) -> dict:
    """The tree as JSON, with its tensors moved to `tensors`."""
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach().cpu().contiguous().clone()  # the file format takes no shared memory
        return {"tensor": name}
    if isinstance(tree, dict):
        if not all(isinstance(name, str) for name in tree):
            raise TypeError(f"The cache takes dicts with string keys, got {list(tree)!r:.80}.")
        return {"dict": {name: _packed(part, tensors) for name, part in tree.items()}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_packed(part, tensors) for part in tree]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return {"plain": tree}
    raise TypeError(f"The cache takes tensors, dicts, lists, tuples, numbers, strings and None, got {type(tree).__name__}.")


def _unpacked(tree: dict, tensors: dict[str, Tensor]) -> Any:
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {name: _unpacked(part, tensors) for name, part in value.items()}
    if kind in ("list", "tuple"):
        parts = [_unpacked(part, tensors) for part in value]
        return parts if kind == "list" else tuple(parts)
    return value
