"""How a reward is called, and what its answer may be.

Nothing about the caller reaches a reward: images are float32 or wider and autocast is off, so scores are the same in training, in
evaluation and behind a server; images, prompts and columns are copies, so a reward that changes them changes nothing else. And nothing
of a reward's reaches the caller but numbers and exceptions: `sys.exit` in a reward is an error like any other, and does not end a run with
the status of a success. (`os._exit` ends the process whatever Python code says.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .registry import reward_name

# Arguments by which ddpo-pytorch's and TRL's reward functions, (images, prompts, metadata) -> (scores, info), get the rest of the data set.
METADATA = ("metadata", "prompt_metadata")


class InvalidReward(ValueError):
    """A reward cannot be called as rewards are, or returned what cannot be trained on: a wrong shape, no `reward` entry, NaN or infinity."""


class RewardError(RuntimeError):
    """A reward failed: it raised, or its server did not answer."""


class RewardTimeout(RewardError):
    """A reward took longer than it may."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast inside, on any device."""
    with ExitStack() as stack:
        for kind in dict.fromkeys(("cpu", "cuda", device.type)):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def exits_are_errors(who: str) -> Iterator[None]:
    """`sys.exit` inside is a RewardError. A subclass of SystemExit is the caller's own way out, such as Ctrl-C's, and passes."""
    try:
        yield
    except SystemExit as error:
        if type(error) is not SystemExit:
            raise
        raise RewardError(
            f"{who} called sys.exit({'' if error.code is None else repr(error.code)}): a reward raises an exception or returns NaN where it cannot score, and "
            "its file does not run a program when it is imported (`if __name__ == '__main__':`)."
        ) from error


def call(reward: Callable, images: Tensor, prompts: list[str], columns: Mapping[str, Any]) -> dict[str, Tensor]:
    """Call a reward and give its answer one form.

    Args:
        images: (B, 3, H, W) or (B, F, 3, H, W), floats in [0, 1].
        prompts: B of them.
        columns: the data set's other fields, B entries each. A function with an argument `metadata` or `prompt_metadata`, and no such column,
            gets a dict of the columns for each image there, as in ddpo-pytorch and TRL.

    Returns:
        (B,) float32 tensors on the images' device, one of them called `reward`.

    Raises:
        InvalidReward: the reward takes other arguments, or returned no such numbers.
        RewardError: it called `sys.exit`. What else it raises comes up as it is.
        ValueError: the images are no floats, or no batch.
    """
    if images.ndim not in (4, 5):
        raise ValueError(f"Images are (B, 3, H, W), videos (B, F, 3, H, W), got the shape {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ValueError(f"Images are floats in [0, 1], got {images.dtype}: `images.float() / 255` of 8-bit ones.")
    arguments = arguments_of(reward, prompts, columns)
    # Their own copy, with the graph; half precision is widened.
    own = images.to(torch.promote_types(images.dtype, torch.float32), copy=True)
    with full_precision(images.device), exits_are_errors(f"Reward {reward_name(reward)!r}"):
        return as_scores(reward, reward(own, list(prompts), **arguments), images)


def arguments_of(reward: Callable, prompts: list[str], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the columns, as the reward's signature wants them.

    Raises:
        InvalidReward: it does not take them.
    """
    arguments = copied(dict(columns))
    try:
        signature = inspect.signature(reward.forward if isinstance(reward, nn.Module) else reward)
    except (TypeError, ValueError):  # written in C
        return arguments
    for name in METADATA:
        wanted = signature.parameters.get(name)
        if name not in columns and wanted is not None and wanted.kind in (wanted.POSITIONAL_OR_KEYWORD, wanted.KEYWORD_ONLY):
            rows = tuple({key: values[i] for key, values in arguments.items()} for i in range(len(prompts)))
            others = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
            arguments = {key: values for key, values in arguments.items() if others or key in signature.parameters} | {name: rows}
    try:
        if "self" in arguments:
            raise TypeError("multiple values for argument 'self'")
        signature.bind(None, prompts, **arguments)
    except TypeError as error:
        having = f"with the columns {', '.join(map(repr, columns))}" if columns else "without columns"
        raise InvalidReward(
            f"Reward {reward_name(reward)!r} cannot be called as reward(images, prompts, **columns) {having}: {error}. Columns are the prompt file's other "
            "fields (`columns=` of a pipeline's call) and come by keyword. Let the reward end its arguments with `**columns`, have no other "
            "ones without a default than columns that are there, and rename a column that is called like one of the first two arguments."
        ) from error
    return arguments


def copied(value: Any) -> Any:
    """Lists and dicts as new ones, at any depth; all else as it is."""
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, list) else value


def as_scores(reward: Callable, result: Any, images: Tensor) -> dict[str, Tensor]:
    """A reward's answer as a dict of (B,) float32 tensors with the key `reward`.

    A pair of scores and a dict of details is ddpo-pytorch's and TRL's form; the details have no fixed meaning and are left out.

    Raises:
        InvalidReward: it has no such form.
    """
    name = f"Reward {reward_name(reward)!r}"
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        result = result[0]
    entries = dict(result) if isinstance(result, Mapping) else {"reward": result}
    if not entries or not all(isinstance(key, str) and key for key in entries):
        raise InvalidReward(f"{name} returned a dict with the names {list(entries)}: names are texts, one of them 'reward', the (B,) tensor to optimise.")
    if "reward" not in entries:
        if len(entries) != 1:
            raise InvalidReward(
                f"{name} returned the entries {sorted(entries)}, none of which is called 'reward': add an entry 'reward', the (B,) tensor to optimise."
            )
        entries = {"reward": next(iter(entries.values()))}
    scores = {}
    for key, value in entries.items():
        try:
            scores[key] = values = numbers(value, images.device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InvalidReward(f"{name} returned a {type(value).__name__} for {key!r}, which is no tensor of numbers: {error}.") from error
        if values.shape != (len(images),):
            raise InvalidReward(
                f"{name} returned the shape {tuple(values.shape)} for {key!r}, for {len(images)} images: expected ({len(images)},), one number per image."
            )
    return scores


def numbers(value: Any, device: torch.device) -> Tensor:
    """float32 numbers of a tensor, an array or a list; True is 1; masked entries of numpy's masked arrays are NaN.

    Raises:
        TypeError, ValueError, RuntimeError, OverflowError: there is something else in it, complex numbers included.
    """
    if isinstance(value, (list, tuple)) and any(isinstance(entry, Tensor) for entry in value):
        value = torch.stack([torch.as_tensor(entry, device=device) for entry in value])  # keeps the graph
    if hasattr(value, "filled"):
        value = value.astype(float).filled(float("nan"))
    values = torch.as_tensor(value, device=device)
    if values.is_complex():
        raise TypeError("complex numbers have no order; return their real part or their absolute value")
    return (values.to_dense() if values.layout != torch.strided else values).float()
