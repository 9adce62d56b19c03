"""How a reward is called, and what its answer may be.

Nothing about the caller reaches a reward: images are float32 or wider and autocast is off, so scores are the same in training, in
evaluation and behind a server; images, prompts and columns are copies, so a reward that changes them changes nothing else. And nothing
of a reward's reaches the caller but numbers and exceptions: `sys.exit` in a reward is an error like any other, and does not end a run with
the status of a success. (`os._exit` ends the process whatever Python code says.)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .registry import reward_name

# Arguments by which ddpo-pytorch's and TRL's reward functions, (images, prompts, metadata) -> (scores, info), get the rest of the data set.
METADATA = ("metadata", "prompt_metadata")
# Arguments by which rewards get what is heard; those that do not declare them are not given them.
SOUND = ("sampling_rate", "audio")


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
        images: (B, 3, H, W) or (B, F, 3, H, W), floats in [0, 1]; or sounds (B, C, T), floats in [-1, 1].
        prompts: B of them.
        columns: the data set's other fields, B entries each. A function with an argument `metadata` or `prompt_metadata`, and no such column,
            gets a dict of the columns for each image there, as in ddpo-pytorch and TRL. `sampling_rate`, a whole number, and `audio`, the sound
            (B, C, T) of videos, are for functions that declare arguments of these names.

    Returns:
        (B,) float32 tensors on the images' device, one of them called `reward`.

    Raises:
        InvalidReward: the reward takes other arguments, judges the other of pictures and sounds, or returned no such numbers.
        RewardError: it called `sys.exit`. What else it raises comes up as it is.
        TypeError: the reward is a name, or the images are no tensor.
        ValueError: the images are no floats, or no batch.
    """
    if isinstance(reward, str):
        raise TypeError(f"A reward is called here, and {reward!r} is a name: load_reward({reward!r}) makes the reward of it.")
    if not isinstance(images, Tensor):
        raise TypeError(
            f"Images are a tensor (B, 3, H, W) of floats in [0, 1], got a {type(images).__name__}. `output_type='pt'` of a pipeline's call makes them."
        )
    if images.ndim not in (3, 4, 5):
        raise ValueError(f"Images are (B, 3, H, W), videos (B, F, 3, H, W), sounds (B, C, T), got the shape {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ValueError(f"Images are floats in [0, 1], got {images.dtype}: `images.float() / 255` of 8-bit ones.")
    check_kind(reward, images, columns)
    arguments = arguments_of(reward, prompts, columns)
    # Their own copy, with the graph; half precision is widened.
    with full_precision(images.device), exits_are_errors(f"Reward {reward_name(reward)!r}"):
        return as_scores(reward, reward(_own(images), list(prompts), **arguments), images)


def parameters_of(reward: Callable) -> Mapping[str, inspect.Parameter]:
    """The arguments that a reward declares, by name; none of one that is written in C."""
    try:
        return inspect.signature(reward.forward if isinstance(reward, nn.Module) else reward).parameters
    except (TypeError, ValueError):
        return {}


def options_of(reward: Callable) -> set[str]:
    """Arguments that a column of the same name does not replace: what `functools.partial` has set, and the built-in rewards' own, whose columns are None by
    default."""
    if isinstance(reward, functools.partial):
        return set(reward.keywords) | options_of(reward.func)
    if not str(getattr(reward, "__module__", "")).startswith(__package__):
        return set()
    return {name for name, parameter in parameters_of(reward).items() if parameter.default not in (parameter.empty, None)}


def check_kind(reward: Callable, images: Tensor, columns: Mapping[str, Any]) -> None:
    """Rewards of sounds declare an argument `sampling_rate`: one that does not is given no sounds; one that cannot do without is given no pictures.

    Raises:
        InvalidReward: it would be.
    """
    declared, name, shape = parameters_of(reward), f"Reward {reward_name(reward)!r}", tuple(images.shape)
    if images.ndim == 3 and "sampling_rate" not in declared:
        raise InvalidReward(
            f"{name} judges pictures, and these are sounds (B, C, T) = {shape}: use a reward of sounds, such as spectral_centroid. One of your own is a "
            "reward of sounds if it declares an argument `sampling_rate`, which it is given."
        )
    needs = {key for key in SOUND if key in declared and declared[key].default is inspect.Parameter.empty}
    if images.ndim != 3 and "sampling_rate" in needs and "audio" not in declared:
        raise InvalidReward(
            f"{name} judges sounds (B, C, T) by their `sampling_rate`, and these are {'videos' if images.ndim == 5 else 'pictures'} {shape}: use a reward of "
            "pictures, or a pipeline that makes sound. A reward hears the sound of videos in an argument `audio`; `sampling_rate=None` is for both kinds."
        )
    if "sampling_rate" in needs and columns.get("sampling_rate") is None and images.ndim == 3:
        raise InvalidReward(f"{name} needs the sampling rate of the sounds: give it as `sampling_rate`, values a second.")
    if "audio" in needs and columns.get("audio") is None:
        what = "these are sounds themselves, its first argument" if images.ndim == 3 else "there is none with these"
        raise InvalidReward(
            f"{name} judges the sound of videos, its argument `audio`, and {what}. Only whole samples of pipelines that make both have it: not "
            "pictures, and neither a reward's gradient nor states on the way, of which the video alone is decoded. `audio=None` goes without."
        )


def arguments_of(reward: Callable, prompts: list[str], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the columns, as the reward's signature wants them, without those that are called like one of its options.

    Raises:
        InvalidReward: it does not take them.
    """
    heard = {name: columns[name] for name in SOUND if name in columns and not isinstance(columns[name], (list, tuple))}
    taken = heard.keys() | options_of(reward)
    columns = {name: values for name, values in columns.items() if name not in taken}
    arguments = copied(columns)
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
    arguments |= {name: _own(value) for name, value in heard.items() if name in signature.parameters}
    if (first := next(iter(signature.parameters), None)) in ("prompt", "prompts"):
        raise InvalidReward(
            f"Reward {reward_name(reward)!r} takes {first!r} first, where it would get the images: rewards are called by position, reward(images, prompts, "
            "**columns)."
        )
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


def _own(value: Any) -> Any:
    """A copy of a tensor, float32 or wider, with its graph."""
    return value.to(torch.promote_types(value.dtype, torch.float32), copy=True) if isinstance(value, Tensor) else value


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
