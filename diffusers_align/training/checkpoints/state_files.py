"""Nested state in a folder, as JSON and safetensors: what is read back can only be data, never code.

`torch.save` and pickle hold instructions that rebuild objects, and whoever may write a checkpoint could have them do anything. Here a state is
a tree of dicts, lists and tuples whose leaves are tensors, numbers, strings, booleans and None: the tree goes to `<name>.json`, its tensors to
`<name>.safetensors` if it has any. Reading gives back the same types, the same order of keys and the same bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

# Floats are written by repr, which reads back as the same bits; NaN and infinities as Python's json names them.
PLAIN = (str, bool, int, float, type(None))


def write_state(folder: Path, name: str, state: Any) -> None:
    """Write `state` into `folder` under `name`.

    Raises:
        TypeError: a leaf that is no tensor, number, string, boolean or None; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encoded(state, tensors, name)
    (folder / f"{name}.json").write_text(json.dumps(tree) + "\n", encoding="utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> Any:
    """What `write_state` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: nothing of that name is there.
    """
    tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    file = folder / f"{name}.safetensors"
    return _decoded(tree, load_file(file) if file.is_file() else {})


def _encoded(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if type(value) in PLAIN:
        return value
    if isinstance(value, Tensor):
        key = f"{len(tensors):05d}"
        # A copy: safetensors refuses tensors that share memory.
        tensors[key] = value.detach().cpu().clone().contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        # Pairs: keys of JSON are strings, those of an optimizer's state are whole numbers.
        return {"dict": [[_key(key, where), _encoded(item, tensors, f"{where}[{key!r}]")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint keeps tensors, numbers, strings, booleans, None, and dicts, lists and tuples of them.")


def _key(key: Any, where: str) -> Any:
    if type(key) not in PLAIN:
        raise TypeError(f"{where} has a {type(key).__name__} as a key; a checkpoint keeps strings and numbers.")
    return key


def _decoded(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decoded(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    items = [_decoded(item, tensors) for item in value]
    return dict(items) if kind == "dict" else tuple(items)
