"""The arguments of a pipeline's call: what belongs to its samples one by one, and what all of them share.

A list may be one value per sample (negative prompts) or one value for all of them (layers to skip, a size, a schedule), and its length does
not tell which. So an argument belongs to samples because it was declared so: by the caller in `per_sample`, or by its name where stock
diffusers itself defines one value per prompt (`belongs_to_samples`). Everything else is shared.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import Tensor

# What stock pipelines take one of a prompt: further prompts, embeddings with their masks, classes, initial latents.
_OF_PROMPTS = re.compile(
    r"(negative_)?(prompt(_\d+)?|prompt(_embeds)?(_attention)?_mask(_\d+)?|(pooled_|generated_)?prompt_embeds(?!_scale)(_\w+)?|prompt_embeds_pooled)|latents|class_labels"
)
# The samples' dimension where it is not the first: one pipeline stacks the hidden states of a text encoder's layers before its prompts.
_SAMPLE_DIM = {"prompt_embeds_llama3": 1, "negative_prompt_embeds_llama3": 1}


def belongs_to_samples(name: str) -> bool:
    """Whether stock diffusers defines the argument `name` as one value per prompt: `prompt_2`, `negative_prompt`, `prompt_embeds`,
    `pooled_prompt_embeds`, `prompt_attention_mask`, `latents` and their like."""
    return _OF_PROMPTS.fullmatch(name) is not None


@dataclass(frozen=True)
class Condition:
    """The arguments of a pipeline call for B samples, one prompt each.

    Attributes:
        prompts: B strings. Where `prompt_embeds` are given, the pipeline gets those, and prompts are what rewards read ("" if unknown).
        kwargs: the call's arguments that all samples share.
        seeds: B integers; each fixes its sample's initial noise, whatever the batch.
        step_seeds: B integers for the noise of the steps; derived from `seeds` if absent.
        per_sample: the call's arguments of which each sample has its own: a list of B values or a tensor of B rows by name. A string
            stands for B equal ones. Lists and tensors among `kwargs` that stock diffusers defines as one per prompt (`belongs_to_samples`) are
            moved here; a string there goes to the pipeline as it is, and as often as there are samples where the pipeline refuses that.

    Raises:
        ValueError: prompts that are no list of strings, seeds or a per-sample argument of another number than B, pictures of different sizes,
            seeds that are no whole numbers from 0 on, an argument in both `kwargs` and `per_sample`.
    """

    prompts: list[str]
    kwargs: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] | None = None
    step_seeds: list[int] | None = None
    per_sample: dict[str, Any] = field(default_factory=dict)
    made_by: ClassVar[str] = "policy.condition(prompts, seeds=[...]) makes one"

    def __post_init__(self):
        if isinstance(self.prompts, str) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"prompts are a list of strings, got {self.prompts!r}.")
        if twice := sorted(set(self.kwargs) & set(self.per_sample)):
            raise ValueError(f"{', '.join(twice)}: given as shared and as per_sample. Give it once.")
        declared = {name: value for name, value in self.kwargs.items() if not isinstance(value, (str, NoneType)) and belongs_to_samples(name)}
        own = {name: _rows_of(name, value, len(self.prompts)) for name, value in {**declared, **self.per_sample}.items()}
        object.__setattr__(self, "kwargs", {name: value for name, value in self.kwargs.items() if name not in declared})
        object.__setattr__(self, "per_sample", own)
        for name in ("seeds", "step_seeds"):
            object.__setattr__(self, name, _checked_seeds(name, getattr(self, name), len(self.prompts)))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def embedded(self) -> bool:
        """Whether the pipeline gets embeddings in the place of the prompts."""
        return any(map(is_embedding, self.per_sample))

    def arguments(self, accepted: Collection[str]) -> dict[str, Any]:
        """The call's keyword arguments. `accepted` are the names that the pipeline's call takes: some take no prompt, but the number of samples."""
        own = {name: _as_the_call_takes(name, value) for name, value in self.per_sample.items()}
        prompt = {"prompt": list(self.prompts)} if "prompt" in accepted and not self.embedded else {}
        # All in one pass: where a call without prompts takes pictures in batches, one after the other, there would be several chains of states.
        number = {"batch_size": len(self)} if "batch_size" in accepted and "prompt" not in accepted else {}
        return {**number, **self.kwargs, **own, **prompt}

    def of_samples(self, number: int, what: str) -> Condition:
        """Itself.

        Raises:
            ValueError: it is of another number of samples than `what` there are.
        """
        if len(self) != number:
            raise ValueError(f"The condition is of {len(self)} samples, the {what} of {number}: give a condition with one prompt for each of them.")
        return self

    def select(self, index: list[int]) -> Condition:
        """The condition of the samples `index`, in that order; a sample may come more than once."""
        index = positions(index)
        own = {name: _picked(name, value, index) for name, value in self.per_sample.items()}
        seeds = {name: None if getattr(self, name) is None else [getattr(self, name)[i] for i in index] for name in ("seeds", "step_seeds")}
        return replace(self, prompts=[self.prompts[i] for i in index], per_sample=own, **seeds)

    @staticmethod
    def cat(parts: list[Condition]) -> Condition:
        """The condition of all samples of `parts`.

        Raises:
            ValueError: the shared arguments differ, or a part has per-sample arguments or seeds that another lacks.
        """
        first = parts[0]
        for part in parts[1:]:
            if differing := sorted(n for n in {*first.kwargs, *part.kwargs} if not _same(first.kwargs.get(n), part.kwargs.get(n))):
                raise ValueError(f"Trajectories made with different {', '.join(differing)} cannot be joined.")
            if lacking := sorted(set(first.per_sample) ^ set(part.per_sample)):
                raise ValueError(f"Trajectories cannot be joined: {', '.join(lacking)} belongs to the samples of some of them only.")
            if lacking := [n for n in ("seeds", "step_seeds") if (getattr(first, n) is None) != (getattr(part, n) is None)]:
                raise ValueError(f"Trajectories cannot be joined: some of them have {lacking[0]}, others have none.")
        own = {name: _joined(name, [part.per_sample[name] for part in parts]) for name in first.per_sample}
        seeds = {n: None if getattr(first, n) is None else [s for part in parts for s in getattr(part, n)] for n in ("seeds", "step_seeds")}
        return replace(first, prompts=[prompt for part in parts for prompt in part.prompts], per_sample=own, **seeds)


def counts_samples(accepted: Collection[str]) -> bool:
    """Whether a call is told how many samples to make by its argument `batch_size`: nothing else says so. Elsewhere it is the size of parts of a sample."""
    return "batch_size" in accepted and not {"prompt", "image"} & set(accepted)


def number_of_samples(per_sample: dict[str, Any], seeds: list[int] | None = None) -> int | None:
    """How many samples a call without prompts has: the rows of its first per-sample argument, or the number of its seeds."""
    for name, value in per_sample.items():
        if not isinstance(value, str) and hasattr(value, "__len__"):
            return value.shape[_SAMPLE_DIM.get(name, 0)] if isinstance(value, Tensor) else len(value)
    return None if seeds is None else len(seeds)


def positions(index) -> list[int]:
    """Positions of samples as whole numbers.

    Raises:
        TypeError: something else, such as a mask of booleans, which would be read as positions 0 and 1.
    """
    index = index.tolist() if isinstance(index, Tensor) else list(index)
    if any(isinstance(i, bool) or (isinstance(i, Tensor) and i.dtype == torch.bool) for i in index):
        raise TypeError("Samples are selected by their positions, not by a mask: mask.nonzero().flatten().tolist() gives them.")
    return [operator.index(i) for i in index]


def is_embedding(name: str) -> bool:
    """Whether the argument stands in the place of the prompts."""
    return name.startswith("prompt_embeds") and "mask" not in name and belongs_to_samples(name)


def _checked_seeds(name: str, seeds, number: int) -> list[int] | None:
    if seeds is None:
        return None
    if not hasattr(seeds, "__len__") or isinstance(seeds, str):
        raise ValueError(f"{name} must be a list of one whole number per sample, got {seeds!r}.")
    values = seeds.tolist() if isinstance(seeds, Tensor) else list(seeds)
    if len(values) != number:
        raise ValueError(f"{number} prompts need as many {name}, got {len(values)}.")
    for value in values:
        # What has __index__ is a whole number: Python's and NumPy's, no float and no None; but truth values have it too.
        if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= operator.index(value) < 2**64:
            raise ValueError(f"{name} are whole numbers from 0 to 2**64 - 1, got {value!r}.")
    return [operator.index(value) for value in values]


def _rows_of(name: str, value: Any, number: int) -> Any:
    """The value as a list of B values or a tensor of B rows."""
    if isinstance(value, str):
        return [value] * number
    if not hasattr(value, "__len__") or isinstance(value, dict) or (isinstance(value, Tensor) and value.ndim == 0):
        raise ValueError(f"{name} belongs to the samples one by one: give a list of {number}, or a tensor of as many rows; got a {type(value).__name__}.")
    value = list(value) if isinstance(value, tuple) else value
    found = number_of_samples({name: value})
    if found != number:
        raise ValueError(
            f"{name} belongs to the samples one by one: {number} prompts need as many, got {found}. What all samples share goes into the call's other "
            "arguments, unless stock diffusers itself takes one per prompt."
        )
    sizes = {_size(item) for item in value} if isinstance(value, list) and not belongs_to_samples(name) else set()
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: pictures of different sizes in one call, {', '.join(map(str, sorted(sizes, key=str)))}. Pipelines resize all to the first one's, so that "
            "a sample would depend on its neighbours: resize them, or make one call for each size."
        )
    return value


def _size(item: Any) -> Any:
    """Width and height of a picture, the shape of a tensor or array, those of the parts of a list; None of anything else."""
    if isinstance(item, (list, tuple)) and not all(isinstance(part, (int, float)) for part in item):
        return tuple(_size(part) for part in item)
    return tuple(item.shape) if hasattr(item, "shape") else getattr(item, "size", None)


def _picked(name: str, value: Any, index: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(_SAMPLE_DIM.get(name, 0), torch.tensor(index, dtype=torch.long, device=value.device))
    return [value[i] for i in index] if isinstance(value, list) else value[index]


def _joined(name: str, values: list) -> Any:
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        raise ValueError(f"Trajectories cannot be joined: their {name} are of different types ({', '.join(sorted(kind.__name__ for kind in kinds))}).")
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    dim = _SAMPLE_DIM.get(name, 0)
    shapes = {(*value.shape[:dim], *value.shape[dim + 1 :]) for value in values}
    if len(shapes) > 1:
        raise ValueError(f"Trajectories cannot be joined: their {name} have different shapes, {', '.join(map(str, sorted(shapes)))} a sample.")
    if isinstance(values[0], Tensor):
        return torch.cat(values, dim)
    return [row for value in values for row in value]


def _same(a: Any, b: Any) -> bool:
    """Equal, where == of tensors and arrays is one answer an element."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if hasattr(a, "shape") and hasattr(b, "shape"):
        return a.shape == b.shape and bool((a == b).all())
    return a is b or bool(a == b)


def _as_the_call_takes(name: str, value: Any) -> Any:
    """A per-sample argument as pipelines lay it out: embeddings of image prompts are a list of one tensor an adapter."""
    if not name.endswith("ip_adapter_image_embeds"):
        return list(value) if isinstance(value, list) else value
    samples = [own if isinstance(own, (list, tuple)) else [own] for own in value]
    # With guidance each sample has two rows, and the call takes the negative rows of all of them before the others.
    return [torch.stack(of_adapter, 1).flatten(0, 1) for of_adapter in zip(*samples)]
