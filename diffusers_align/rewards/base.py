"""What a reward is, how one is called, added up and found by name.

A reward is any callable. It gets images (B, 3, H, W), or videos (B, F, 3, H, W), in [0, 1], the prompts, and the other fields
of the data set by keyword. One that declares `sampling_rate` gets sounds (B, C, T) in [-1, 1] with their rate; one that declares `audio`, the sound of
videos. It returns (B,) numbers, higher is better, NaN where it could not score; or a dict of such
tensors, of which `reward` is the one to optimise and the others are logged. `calling.py` says what else is understood.

>>> def brightness(images, prompts, **columns):
...     return images.flatten(1).mean(1)
>>> score(brightness, torch.ones(2, 3, 8, 8), ["a cat", "a dog"])
{'reward': tensor([1., 1.])}
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..checks.ranges import check_value
from .calling import InvalidReward, RewardError, RewardTimeout, call, exits_are_errors
from .registry import BUILT_INS, component_name, find_reward, parse_terms, reward_name


class Reward(Protocol):
    """Any callable with this signature; a class, a function or a method."""

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor | dict[str, Tensor]:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], or (B, C, T) in [-1, 1]. Returns (B,), or a dict of (B,) with the key `reward`."""
        ...


def listed(prompts: list[str], shown: int = 3) -> str:
    """The first few different prompts, quoted, for a message."""
    different = list(dict.fromkeys(prompts))
    return ", ".join(map(repr, different[:shown])) + (", ..." if len(different) > shown else "")


def score(reward: Reward, images: Tensor, prompts: list[str], /, *, on_invalid: Literal["error", "mask"] = "error", **columns: Any) -> dict[str, Tensor]:
    """Call a reward and check its answer.

    Args:
        images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], or sounds (B, C, T) in [-1, 1]; far larger values get a warning. The reward gets a copy,
            float32 and outside autocast.
        prompts: B of them.
        on_invalid: what to do where `reward` is NaN or infinite: raise, or put NaN for the caller to leave out.
        columns: the data set's other fields, passed on. `sampling_rate` (a whole number) and `audio` (B, C, T) go to rewards that declare them.

    Returns:
        (B,) float32 tensors on the images' device, with the graph if the reward keeps it; the one to optimise is `reward`.
        Entries beside `reward` may hold NaN: a component that does not apply to an image.

    Raises:
        InvalidReward: a wrong shape, a dict of several entries without `reward`, other arguments; NaN or infinity unless masked.
        RewardError: the reward called `sys.exit`.
    """
    if isinstance(images, Tensor) and images.is_floating_point() and images.numel() and (largest := images.detach().amax()) > 2:
        warnings.warn(
            f"Rewards expect images in [0, 1], and sounds in [-1, 1]: these have values up to {largest:.4g}. `images / 255` of 8-bit ones.", stacklevel=2
        )
    return score_columns(reward, images, prompts, columns, on_invalid)


def score_columns(reward: Reward, images: Tensor, prompts: list[str], columns: Mapping[str, Any], on_invalid: str = "error") -> dict[str, Tensor]:
    """`score` for columns of any name, in a dict: a data set's field may be called `reward` or `on_invalid`."""
    if on_invalid not in ("error", "mask"):
        raise ValueError(f"on_invalid must be 'error' or 'mask', got {on_invalid!r}.")
    if isinstance(prompts, str) or len(images) != len(prompts):
        got = f"the text {prompts!r}" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"As many prompts as images are needed: got {len(images)} images and {got}.")
    for name, values in columns.items():
        if isinstance(values, (list, tuple, Tensor)) and len(values) != len(images):
            raise ValueError(f"The column {name!r} has {len(values)} entries for {len(images)} images: a column has one per image.")
    scores = call(reward, images, prompts, columns)
    valid = torch.isfinite(scores["reward"])
    if valid.all():
        return scores
    if on_invalid == "mask":
        return scores | {"reward": torch.where(valid, scores["reward"], torch.nan)}
    raise InvalidReward(_describe_invalid(reward, scores, valid, prompts))


def _describe_invalid(reward: Reward, scores: dict[str, Tensor], valid: Tensor, prompts: list[str]) -> str:
    invalid = [prompt for prompt, ok in zip(prompts, valid.tolist()) if not ok]
    parts = [name for name in reward.names if not torch.isfinite(scores[name]).all()] if isinstance(reward, WeightedSum) else []
    blame = f" because of {', '.join(map(repr, parts))}" if parts else ""
    known = [(name, only) for name, part in _parts(reward) if (only := getattr(part, "scores_only", None)) and (name in parts or not parts)]
    advice = "".join(f"{name} scores only {only}. " for name, only in known) + ("Give it such ones" if known else "Repair the reward")
    return (
        f"Reward {reward_name(reward)!r} is NaN or infinite for {len(invalid)} of {len(prompts)} images{blame}. Prompts: {listed(invalid)}. "
        f"{advice}, or leave such images out with `--invalid_rewards mask` (`on_invalid='mask'` in Python)."
    )


def _parts(reward: Reward) -> list[tuple[str, Any]]:
    """The rewards of a sum, or the reward itself, by name, without options that were bound to them."""
    named = zip(reward.names, reward.rewards) if isinstance(reward, WeightedSum) else [(reward_name(reward), reward)]
    return [(name, part.func if isinstance(part, functools.partial) else part) for name, part in named]


class WeightedSum:
    """The sum of rewards times weights; every component is returned beside it, unweighted, under its name.

    Args:
        rewards: `{reward: weight}`, or a list of (reward, weight) or (reward, weight, name).

    An image that one component cannot score (NaN) has no sum.
    """

    def __init__(self, rewards: Mapping[Reward, float] | Iterable[tuple[Reward, float] | tuple[Reward, float, str]]):
        terms = list(rewards.items() if isinstance(rewards, Mapping) else rewards)
        for term in terms:
            check_value("weight", term[1], float)
        self.rewards, self.weights = [term[0] for term in terms], [float(term[1]) for term in terms]
        self.names = [term[2] if len(term) > 2 else reward_name(term[0]) for term in terms]
        if not terms:
            raise ValueError("A weighted sum needs at least one reward.")
        if len(set(self.names)) < len(terms) or "reward" in self.names:
            raise ValueError(
                f"The components of a weighted sum need different names, none of them 'reward': got {self.names}. A function goes by its own name: "
                "rename it, or give it another in an attribute, `function.name = ...`."
            )
        self.name = "+".join(f"{name}*{weight:g}" for name, weight in zip(self.names, self.weights))

    def to(self, device: torch.device | str) -> WeightedSum:
        """Move every component that can be moved."""
        self.rewards = [move(reward, device) for reward in self.rewards]
        return self

    def __call__(self, images: Tensor, prompts: list[str], sampling_rate: int | None = None, audio: Tensor | None = None, **columns: Any) -> dict[str, Tensor]:
        """Returns `reward`, `<component>`, and `<component>/<entry>` for what a component returned beside its reward."""
        total, parts = 0.0, {}
        columns |= {name: value for name, value in (("sampling_rate", sampling_rate), ("audio", audio)) if value is not None}
        for reward, weight, name in zip(self.rewards, self.weights, self.names):
            scores = call(reward, images, prompts, columns)
            parts[name] = scores.pop("reward")
            parts |= {f"{name}/{key}": value for key, value in scores.items()}
            total = total + weight * parts[name]
        return {"reward": total, **parts}


def move(reward: Reward, device: torch.device | str | None) -> Reward:
    """`reward.to(device)` where there is such a method and a device."""
    return reward.to(device) if device is not None and callable(getattr(reward, "to", None)) else reward


def load_reward(spec: str | Callable, *, device: torch.device | str | None = None, retries: int | None = None, **options: Any) -> Reward:
    """A reward by name: built in, `module:function`, `path/to/file.py:function`, `http://host:port`, or a sum of them.

    >>> load_reward("jpeg_compressibility")  # doctest: +SKIP
    >>> load_reward("clip_score*1.0 + jpeg_compressibility*0.1", device="cuda")  # doctest: +SKIP
    >>> load_reward("my_rewards.py:brightness")  # doctest: +SKIP

    Args:
        spec: one name, or names with weights joined by `+`. A class is instantiated. A callable is returned as it is.
        device: moved there if the reward has a method `to`; passed on if it has an argument `device`.
        retries: of rewards that ask a server: further attempts after the first; theirs if absent.
        options: arguments of the reward's class or function, such as `model`. In a sum each term gets those that it takes.

    Raises:
        ValueError: nothing is found under the name, it cannot be called, or an option belongs to no term.
        RewardError: the file, or the class when it is made, calls `sys.exit`.
    """
    if callable(spec) and not isinstance(spec, (str, type)):
        return move(spec, device)
    terms = parse_terms(spec)
    found, unused = [], set(options)
    placed = options | {name: value for name, value in (("device", device), ("retries", retries)) if value is not None}
    for name, weight in terms:
        with exits_are_errors(f"Reward {name!r}"):
            reward, used = find_reward(name, placed)
        unused -= used
        found.append((move(reward, device), weight, component_name(name)))
    if unused:
        raise ValueError(f"Reward {spec!r} takes no option {', '.join(sorted(map(repr, unused)))}.")
    if len(terms) == 1 and terms[0][1] is None:
        return found[0][0]
    return WeightedSum([(reward, 1.0 if weight is None else weight, name) for reward, weight, name in found])


__all__ = ["BUILT_INS", "InvalidReward", "Reward", "RewardError", "RewardTimeout", "WeightedSum", "listed", "load_reward", "score", "score_columns"]
