"""What a pipeline's `encode_prompt` returned, remembered in memory and, given a store, beyond the process.

In memory a batch's result is one entry, whatever its arguments are; in training, prompts that come more than once in a batch (those of a group, the two
sides of a pair) are encoded once. A store keeps an entry per prompt, so that batches made up anew, as in each epoch, are put together from prompts that were
encoded before. How a pipeline's result for several prompts is made of the results for each is found by a comparison, once; where it cannot be
(sequences padded to the batch's longest), the batch is encoded at each use and not stored: batches that are made up anew would fill the store and
never be met again.

Text encoders may be off the device meanwhile (`encoders_away`). What is encoded when they come is then not the batch's prompts alone but all that were
announced.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import prompt_form
from .calls import OneForAll, calls_of
from .encoder_state import EncoderState, encoder_state
from .encoders_away import EncodersAway, KeptOnCPU
from .module_tree import ModuleTree, walks_spared
from .pipeline_state import restored_if_abandoned
from .prompt_rows import NotByRows, is_by_rows, joined, picked

# Two prompts by which a pipeline shows how it joins rows: of different meaning, and one token each in any vocabulary.
PROBE = ("dog", "cat")
# Results that are put together anew from a store in a moment, and so need not be many on the device, where its room counts.
AT_HAND = 2
# Vectors of prompts, of some kilobytes each.
FEATURES = 4096
Call = tuple[list, dict[str, Any]]


class Store(Protocol):
    """Keeps nested tensors by name, on the CPU."""

    def get(self, key: str) -> Any:
        """The entry, or None."""
        ...

    def put(self, key: str, tree: Any) -> None:
        """Keep an entry."""
        ...


class PromptMemory:
    """Remembers what `encode_prompt` returned, so that replays cost no text encoding. What other encoders made, or the same ones with other weights or
    LoRAs, is no answer (`encoder_state`).

    Args:
        size: results of the latest batches that are kept in memory.
        store: for what is encoded from plain arguments (strings, numbers, None, lists of them); calls with tensors, images or other
            objects do not go there. It belongs to one model, revision and dtype: what changed encoders make is kept in memory.
        once_each: encode a prompt that comes more than once in a batch once: the same up to the rounding of another batch size.
        encoders: of the pipeline, where they are on the device only while they encode; it needs a store.

    Attributes:
        expected: prompts that will be asked for. With a store they are encoded together with the first of them that is.
    """

    def __init__(self, size: int = 32, store: Store | None = None, once_each: bool = False, encoders: EncodersAway | None = None):
        self.size, self.store, self.once_each, self.encoders, self.entries = size, store, once_each, encoders, OrderedDict()
        self.examples: dict[str, tuple[Any, Any] | None] = {}
        self.expected: list[str] = []
        self.features: OrderedDict[tuple, Tensor] = OrderedDict()
        self._given: tuple[Store, EncoderState] | None = None
        self._now, self._mark = store, ""

    def __reduce__(self):
        # Keys are identities of objects, which copies do not share: a copy remembers nothing.
        return PromptMemory, (self.size, self.store, self.once_each, self.encoders)

    @contextmanager
    def installed(self, pipeline) -> Iterator[None]:
        """Context: what encodes the pipeline's prompts, `encode_prompt` or a block, remembers; nothing where there is no such thing."""

        def remembered(encode: Callable, *args: Any, **kwargs: Any):
            return self.recall(pipeline, encode, args, kwargs)

        with calls_of(pipeline).encoding(remembered):
            yield

    def recall(self, pipeline, encode: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """`encode(*args, **kwargs)`, or what it returned before."""
        state = encoder_state(pipeline)
        key = (_key((args, kwargs)), pipeline.dtype, pipeline.device, state)
        if key not in self.entries:
            self._turn_to(state)
            with torch.no_grad(), self.encoders.called(encode) if self.encoders else nullcontext(encode) as encode:
                # The arguments are kept as well: keys of tensors and images are their identities.
                self.entries[key] = (*self._encoded(encode, (list(args), kwargs), pipeline._execution_device), args, kwargs)
            self._forget()
        self.entries.move_to_end(key)
        return self.entries[key][0]

    def _turn_to(self, state: EncoderState) -> None:
        """From now on entries are of these encoders alone: those of the store if they are as they were at its first use, and without LoRA."""
        if self.store is not None and (self._given is None or self._given[0] is not self.store):
            self._given = self.store, state
        as_given = self.store is None or (state == self._given[1] and not state.adapters)
        self._mark = "" if as_given else repr(state)
        if as_given or isinstance(self.store, KeptOnCPU):
            self._now = self.store
        elif not isinstance(self._now, KeptOnCPU):
            self._now = KeptOnCPU()

    def feature(self, arguments: dict[str, Any], compute: Callable[[], Tensor], *place: Any) -> Tensor:
        """`compute()`, the vector of a prompt in a call with these arguments. Where prompts are encoded once (`once_each`), what it returned for equal
        arguments at this `place`, unless there are more of them than texts, numbers and switches."""
        plain = _plain(arguments) if self.once_each else None
        if plain is None:
            return compute()
        key = (json.dumps(plain), *place)
        self.features[key] = self.features.pop(key) if key in self.features else compute()
        while len(self.features) > FEATURES:
            self.features.popitem(last=False)
        return self.features[key]

    def _forget(self) -> None:
        while len(self.entries) > self.size:
            self.entries.popitem(last=False)
        for key in [key for key, entry in self.entries.items() if entry[1]][:-AT_HAND] if self.encoders else ():
            del self.entries[key]

    def _encoded(self, encode: Callable, call: Call, device: torch.device) -> tuple[Any, bool]:
        """The result, and whether it can be had again without encoding."""
        if _plain(call) is None:
            result = encode(*call[0], **call[1])
            self._explain("what encodes the prompts is given more than texts (pictures, embeddings)")
            return result, False
        if self._now is None:
            return (self._once_each(encode, call) if self.once_each else encode(*call[0], **call[1])), False
        device = next((value for value in (*call[0], *call[1].values()) if isinstance(value, torch.device)), device)
        result, by_rows = self._by_rows(encode, call)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), result), by_rows

    def _explain(self, why: str) -> None:
        if self.encoders is not None:
            self.encoders.explain(why)

    def _once_each(self, encode: Callable, call: Call) -> Any:
        """The result with each different prompt encoded once, where the pipeline's allow it."""
        rows = [self._name(row) for row in _rows(call)]
        different = list(dict.fromkeys(rows))
        if len(different) < len(rows) and (example := self._example(encode, call)) is not None:
            first = [rows.index(row) for row in different]
            result = encode(*(part := _with_texts(call, lambda texts: [texts[i] for i in first]))[0], **part[1])
            try:
                return picked(result, [different.index(row) for row in rows], len(different), *example)
            except NotByRows:
                pass
        return encode(*call[0], **call[1])

    def _by_rows(self, encode: Callable, call: Call) -> tuple[Any, bool]:
        """The stored result, put together from those of the prompts where the pipeline's allow it; and whether it was."""
        rows = _rows(call)
        names = [self._name(row) for row in rows]
        stored = {name: self._now.get(name) for name in dict.fromkeys(names)}
        if None in stored.values():
            self._ahead(encode, rows)
        if len(rows) > 1 and (example := self._example(encode, call)) is not None:
            try:
                # A prompt that comes again is read again, so that rows share no tensor.
                parts = [self._entry(encode, row) if (tree := stored.pop(name, None)) is None else tree for name, row in zip(names, rows)]
                return joined(parts, *example), True
            except NotByRows:  # of different lengths
                pass
        if any(_texts(value) and len(value) > 1 for value in (*call[0], *call[1].values())):
            result = self._once_each(encode, call) if self.once_each else encode(*call[0], **call[1])
            self._explain("what is made of several prompts is not put together from what is made of each (they are padded to the longest, say)")
            return result, False
        return self._entry(encode, call), True

    def _ahead(self, encode: Callable, rows: list[Call]) -> None:
        """Encode what is expected, with the other arguments of these calls, while the encoders are there."""
        own, expected = [_only_text(row) for row in rows], dict.fromkeys(self.expected)
        if self.encoders is not None and all(text in expected for text in own):
            for text in expected:
                self._entry(encode, _with_texts(rows[0], lambda texts, text=text: texts if isinstance(texts[0], OneForAll) else [text]))

    def _example(self, encode: Callable, call: Call) -> tuple[Any, Any] | None:
        """What the pipeline makes of one text and of two, with the call's other arguments; None if it does not do so by rows."""
        both = _with_texts(call, lambda texts: list(PROBE))
        if (key := self._name(both)) not in self.examples:
            single = [self._entry(encode, _with_texts(call, lambda texts, text=text: [text])) for text in PROBE]
            example = single[0], self._entry(encode, both)
            self.examples[key] = example if is_by_rows(single, example[1]) else None
        return self.examples[key]

    def _entry(self, encode: Callable, call: Call) -> Any:
        if self._now is None:
            return encode(*call[0], **call[1])
        if (tree := self._now.get(self._name(call))) is None:
            self._now.put(self._name(call), encode(*call[0], **call[1]))
            tree = self._now.get(self._name(call))  # so that the first use has what later ones have
        return tree

    def _name(self, call: Call) -> str:
        """Of the call's entry in a store."""
        return hashlib.sha256((json.dumps(_plain(call)) + self._mark).encode()).hexdigest()


class _Encoded(BaseException):
    """Carries an encoded prompt out of a call that need not go on."""


def encoded_prompt(pipeline, call: dict[str, Any], memory: PromptMemory | None = None) -> Any:
    """What the first `encode_prompt` of `pipeline(**call)`, or the first block that encodes prompts, returns; the call ends there.

    Args:
        memory: that recalls it.

    Raises:
        ValueError: the pipeline has nothing of the kind, or its call does not use it.
    """
    calls, tree = calls_of(pipeline), ModuleTree.of(pipeline)
    if not calls.encodes:
        raise ValueError(f"{calls.name} has no encode_prompt, so its prompts have no features for a learned value: choose another --advantage.")

    def encode_and_leave(encode: Callable, *args: Any, **kwargs: Any):
        raise _Encoded(encode(*args, **kwargs) if memory is None else memory.recall(pipeline, encode, args, kwargs))

    try:
        with restored_if_abandoned(pipeline, tree), walks_spared(pipeline, tree), calls.encoding(encode_and_leave), torch.no_grad():
            prompt_form.run(calls, call)
    except _Encoded as encoded:
        return encoded.args[0]
    raise ValueError(f"{calls.name}'s call does not use its encode_prompt, so its prompts have no features for a learned value: choose another --advantage.")


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _with_texts(call: Call, change: Callable[[list[str]], list[str]]) -> Call:
    """The call with its lists of texts changed, and their number where the call is told it."""
    args, kwargs = call
    found = next((value for value in (*args, *kwargs.values()) if _texts(value)), [])
    changed = {name: change(v) if _texts(v) else v for name, v in kwargs.items()}
    if found and kwargs.get("batch_size") == len(found):
        changed["batch_size"] = len(change(found))
    return [change(v) if _texts(v) else v for v in args], changed


def _rows(call: Call) -> list[Call]:
    """The call for each of its prompts, if its lists (prompts, negative prompts) are all of texts and of one length; otherwise none."""
    args, kwargs = call
    lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple)) and len(value) > 0]
    lengths = {len(value) for value in lists}
    number = lengths.pop() if len(lengths) == 1 and all(map(_texts, lists)) else 0
    places, names = {i for i, v in enumerate(args) if _texts(v)}, {name for name, v in kwargs.items() if _texts(v)}  # looked for once, not for each row
    one = {"batch_size": 1} if kwargs.get("batch_size") == number else {}
    return [
        ([[v[i]] if place in places else v for place, v in enumerate(args)], {name: [v[i]] if name in names else v for name, v in kwargs.items()} | one)
        for i in range(number)
    ]


def _only_text(call: Call) -> str | None:
    """The text of a call for one prompt that is given nothing else of its own (a negative prompt)."""
    found = [value[0] for value in (*call[0], *call[1].values()) if _texts(value) and not isinstance(value[0], OneForAll)]
    return found[0] if len(found) == 1 else None


def _plain(value: Any) -> Any:
    """Arguments as JSON has them, by which a store knows them: where the result is to be does not count. None if there are others."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return ["plain", value]
    if isinstance(value, torch.device):
        return ["device"]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value)]
    if isinstance(value, (list, tuple)):
        parts = [_plain(part) for part in value]
        return None if None in parts else ["list", *parts]
    if isinstance(value, dict):
        parts = {str(name): _plain(part) for name, part in sorted(value.items())}
        return None if None in parts.values() else parts
    return None


def _key(value):
    if isinstance(value, (str, int, float, bool, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in value.items())
    return type(value).__name__, id(value), getattr(value, "_version", 0)
