"""Text encoders off the device: they come for the time that they encode, and what was made of each prompt is kept on the CPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn
from torch.utils import _pytree as pytree

logger = logging.get_logger(__name__)

# How diffusers' pipelines call them.
PREFIX = "text_encoder"


class KeptOnCPU:
    """A store of encoded prompts in the host's memory: the latest ones, up to a size. What an entry has in common with the one before it, as the
    negative prompt's half is, takes no room again.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int = 8 * 2**30):
        self.limit, self.size = limit, 0
        self.entries: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def __reduce__(self):
        return KeptOnCPU, (self.limit,)  # copies encode anew rather than take as much again

    def get(self, key: str) -> Any:
        """The entry, or None."""
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][0]

    def put(self, key: str, tree: Any) -> None:
        """Keep an entry; the oldest go where there is no room."""
        leaves, spec = pytree.tree_flatten(tree)
        before = pytree.tree_leaves(next(reversed(self.entries.values()))[0]) if self.entries else []
        kept, size = [], 0
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                own = leaf.detach().cpu()
                if i < len(before) and _same(own, before[i]):
                    own = before[i]
                else:
                    own = own.clone()
                    size += own.nbytes
                leaf = own
            kept.append(leaf)
        self.entries[key] = pytree.tree_unflatten(kept, spec), size
        self.size += size
        while self.size > self.limit and len(self.entries) > 1:
            self.size -= self.entries.popitem(last=False)[1][1]


def _same(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


class EncodersAway:
    """A pipeline's text encoders on the CPU, from which they come to `device` when a prompt is encoded.

    Args:
        pipeline: classic or modular.
        device: where its calls run.

    Raises:
        ValueError: it has no text encoder, or one whose weights cannot be moved.
    """

    def __init__(self, pipeline, device: torch.device):
        found = {name: part for name, part in pipeline.components.items() if name.startswith(PREFIX) and isinstance(part, nn.Module)}
        if not found:
            raise ValueError(f"This {type(pipeline).__name__} has no text encoder that could leave the device: leave out --offload_text_encoders.")
        self.name, self.encoders, self.device = type(pipeline).__name__, found, device
        self.depth, self.here, self.visits = 0, True, 0
        self._said: set[str] = set()
        for name, encoder in found.items():
            for part in encoder.modules():
                part.register_forward_pre_hook(_Called(self, name))
        self._leave()

    @contextmanager
    def called(self, encode: Callable) -> Iterator[Callable]:
        """Context: a function that encodes as `encode` does, with the encoders there. They leave at the end."""

        def encoded(*args: Any, **kwargs: Any):
            # Pipelines ask an encoder where it is before they call it. Embeddings in the place of texts may need none: then a call of one brings them.
            if any(_has_text(value) for value in (*args, *kwargs.values())):
                self._come()
            return encode(*args, **kwargs)

        self.depth += 1
        try:
            yield encoded
        finally:
            self.depth -= 1
            if self.depth == 0 and self.here:
                self._leave()

    def explain(self, why: str) -> None:
        """Say, once, why they come again and again; nothing if they did not come."""
        if self.here and why not in self._said:
            self._said.add(why)
            logger.warning(
                f"--offload_text_encoders: {why}, so that the text encoders of this {self.name} come to the device for each such batch, which takes time."
            )

    def on_call(self, name: str) -> None:
        """One of their modules is about to run.

        Raises:
            ValueError: outside of the encoding of prompts, where nobody has seen to it that its inputs are where it is.
        """
        if self.here:
            return
        if self.depth == 0:
            raise ValueError(
                f"{self.name} runs its {name} also where it encodes no prompt (to rewrite one, say), and with --offload_text_encoders it is on the CPU then: "
                "leave the flag out, or switch that part of the call off with --call_kwargs."
            )
        self._come()

    def _come(self) -> None:
        if not self.here:
            self._to(self.device)
            self.here, self.visits = True, self.visits + 1

    def _leave(self) -> None:
        self._to(torch.device("cpu"))
        self.here = False

    def _to(self, device: torch.device) -> None:
        for encoder in self.encoders.values():
            encoder.to(device)


class _Called:
    """Tells of a module's calls. An object, which copies of the module take along."""

    def __init__(self, away: EncodersAway, name: str):
        self.away, self.name = away, name

    def __call__(self, *_: Any) -> None:
        self.away.on_call(self.name)


def _has_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and any(isinstance(item, str) for item in value))
