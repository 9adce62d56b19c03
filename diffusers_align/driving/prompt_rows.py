"""What a pipeline makes of several prompts and what it makes of each: joined, and picked. Two examples, for one prompt and for two, show how it has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class NotByRows(Exception):
    """A batch's result is not made of its prompts' results."""


def joined(parts: list, single: Any, both: Any) -> Any:
    """The result for all rows from those for each; `single` and `both` show how the pipeline has it for one row and for two."""
    first = parts[0]
    if isinstance(both, Tensor):
        if any(part.shape != first.shape for part in parts):
            raise NotByRows
        if both.shape != single.shape:
            return torch.cat(parts)
        if all(torch.equal(part, first) for part in parts):  # of no row in particular, as positions are
            return first
    elif isinstance(both, list) and len(both) == 2 * len(single):
        return [item for part in parts for item in part]
    elif isinstance(both, (list, tuple)) and len(both) == len(single):
        return type(both)(joined(list(items), *pair) for items, *pair in zip(zip(*parts), single, both))
    elif isinstance(both, dict) and both.keys() == single.keys():
        return {name: joined([part[name] for part in parts], single[name], both[name]) for name in both}
    elif both == single and all(part == first for part in parts):
        return first
    raise NotByRows


def picked(result: Any, index: list[int], number: int, single: Any, both: Any) -> Any:
    """The rows `index` of a result for `number` prompts; `single` and `both` as for `joined`.

    Raises:
        NotByRows: the result is made otherwise than those two show (a mask that is there for prompts of different lengths alone, say).
    """
    if type(result) is not type(both):
        raise NotByRows
    if isinstance(both, (Tensor, list)) and len(both) == 2 * len(single) and len(result) == number * len(single):
        rows = [i * len(single) + j for i in index for j in range(len(single))]
        return result[rows] if isinstance(result, Tensor) else [result[row] for row in rows]
    if isinstance(both, Tensor) and both.shape == single.shape == result.shape:
        return result
    if isinstance(both, (list, tuple)) and len(both) == len(single) == len(result):
        return type(both)(picked(items, index, number, *pair) for items, *pair in zip(result, single, both))
    if isinstance(both, dict) and both.keys() == single.keys() == result.keys():
        return {name: picked(result[name], index, number, single[name], both[name]) for name in both}
    if isinstance(both, (Tensor, list, tuple, dict)):
        raise NotByRows
    return result


def is_by_rows(single: list, both: Any) -> bool:
    """Whether joining two rows gives what the pipeline makes of both."""
    try:
        leaves = pytree.tree_leaves(joined(single, single[0], both))
    except NotByRows:
        return False
    return all(_close(leaf, target) for leaf, target in zip(leaves, pytree.tree_leaves(both)) if isinstance(target, Tensor))


def _close(leaf: Tensor, target: Tensor) -> bool:
    """Equal up to rounding: kernels round differently for another batch, half precision to 1e-2."""
    tolerance = 1e-3 if target.dtype in (torch.float32, torch.float64) else 2e-2
    return leaf.shape == target.shape and bool((leaf.double() - target.double()).norm() <= tolerance * target.double().norm())
