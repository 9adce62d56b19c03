"""Find a reward by name: what stands behind `load_reward`."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

BUILT_INS = {
    "aesthetic": "diffusers_align.rewards.aesthetic:AestheticScore",
    "background_color": "diffusers_align.rewards.background:background_color",
    "clip_score": "diffusers_align.rewards.clip_score:CLIPScore",
    "edit_direction": "diffusers_align.rewards.editing:EditDirection",
    "edit_preservation": "diffusers_align.rewards.editing:edit_preservation",
    "hps_v2": "diffusers_align.rewards.hps_v2:HPSv2",
    "image_reward": "diffusers_align.rewards.image_reward:ImageReward",
    "jpeg_compressibility": "diffusers_align.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "diffusers_align.rewards.jpeg:jpeg_incompressibility",
    "ocr": "diffusers_align.rewards.ocr:OCRScore",
    "pick_score": "diffusers_align.rewards.pick_score:PickScore",
    "scene_judge": "diffusers_align.rewards.scene:SceneJudgement",
    "scene_score": "diffusers_align.rewards.scene:SceneScore",
    "spectral_centroid": "diffusers_align.rewards.spectral_centroid:spectral_centroid",
    "vlm_judge": "diffusers_align.rewards.vlm_judge:VLMJudge",
}

TERM = r"\s*([^*+]+?)\s*(?:\*\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*)?"


def reward_name(reward: Any) -> str:
    """The attribute `name`, the function's name, or the class's."""
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    return getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__


def parse_terms(spec: str) -> list[tuple[str, float | None]]:
    """`"a*1.0 + b*-0.1"` as [("a", 1.0), ("b", -0.1)]; a term without a weight has None.

    Raises:
        ValueError: the text is no such sum.
    """
    if not re.fullmatch(rf"{TERM}(?:\+{TERM})*", spec):
        raise ValueError(f"Cannot read the reward {spec!r}: write one name, or a sum such as 'clip_score*1.0+jpeg_compressibility*0.1'.")
    return [(name, float(weight) if weight else None) for name, weight in re.findall(rf"{TERM}(?:\+|$)", spec)]


def is_url(name: str) -> bool:
    """Is the reward behind HTTP?"""
    return name.startswith(("http://", "https://"))


def component_name(name: str) -> str:
    """How a term of a sum is called in the metrics: the function's or class's name, or the server's address."""
    return name.partition("//")[2].rstrip("/") if is_url(name) else name.rpartition(":")[2]


def model_option(name: str | None) -> dict[str, str]:
    """The option `model` for a checkpoint by name, embedded ones included; none for None."""
    from .. import embedded

    return {} if not name else {"model": embedded.path(name) if name in embedded.NAMES else name}


def checkpoint_file(checkpoint: str | os.PathLike, filename: str) -> Path:
    """The file `checkpoint`, or `filename` in the folder or the Hub repository `checkpoint`.

    Raises:
        FileNotFoundError: there is no such file, and the Hub does not give it.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        path = path / filename
    if path.is_file():
        return path
    if path.is_absolute() or path.suffix in (".pt", ".pth"):
        raise FileNotFoundError(f"There is no checkpoint {path}: give a file, or a folder or a Hub repository that holds {filename}.")
    from huggingface_hub import hf_hub_download

    from ..checks.given_names import fetched

    with fetched(str(checkpoint), "checkpoint"):
        return Path(hf_hub_download(str(checkpoint), filename))


def load_weights(module: Any, state: dict[str, Any], origin: Any, *, strict: bool = True) -> None:
    """`module.load_state_dict(state)`, with a sentence.

    Args:
        strict: weights that have no place are an error; else they are left out, and named in a warning.

    Raises:
        ValueError: a weight is missing, which would leave random numbers, or has another shape; or has no place.
    """
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if missing := [name for name in shapes if name not in state]:
        raise ValueError(f"{origin} lacks {shown(missing)} of {type(module).__name__}: without them the reward would be random numbers.")
    if other := [f"{name} {tuple(state[name].shape)} for {shape}" for name, shape in shapes.items() if tuple(state[name].shape) != shape]:
        raise ValueError(f"{origin} has weights of another shape than {type(module).__name__}: {shown(other)}.")
    unknown = [name for name in state if name not in shapes]
    if unknown and strict:
        raise ValueError(f"{origin} has weights that have no place in {type(module).__name__}: {shown(unknown)}.")
    say_left_out(unknown, origin)
    module.load_state_dict({name: value for name, value in state.items() if name in shapes})


def say_left_out(names: list[str], origin: Any) -> None:
    """A warning that names a checkpoint's weights that the reward does not need."""
    if names:
        warnings.warn(f"{origin}: left out, as the official loader leaves it out: {shown(names)}.", stacklevel=3)


def shown(names: list[str], number: int = 5) -> str:
    """The first few of some names."""
    return ", ".join(names[:number]) + (f" and {len(names) - number} more" if len(names) > number else "")


def find_reward(name: str, options: dict[str, Any]) -> tuple[Callable, set[str]]:
    """The reward of that name with those of the options that it takes, and their names."""
    spec = "diffusers_align.rewards.remote:RemoteReward" if is_url(name) else BUILT_INS.get(name, name)
    options = options | {"url": name} if is_url(name) else options
    if ((folder := Path(name).expanduser()) / "learned_reward.json").is_file():
        spec, options = "diffusers_align.rewards.learned:LearnedReward", options | {"folder": str(folder)}
    module_name, colon, attribute = spec.rpartition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(_unknown(name))
    target = load_callable(module_name, attribute, f"Reward {name!r}")
    taken = {key: value for key, value in options.items() if key in _parameters(target)}
    if isinstance(target, type):
        target = target(**taken)
        if not callable(target):
            raise ValueError(f"Reward {name!r}: objects of that class cannot be called, write its `__call__(self, images, prompts, **columns)`.")
    elif taken:
        target = functools.partial(target, **taken)
    return target, set(taken)


def load_callable(source: str, attribute: str, who: str) -> Callable:
    """What `attribute` names in `source`, a module or the path of a `.py` file.

    Args:
        who: what it is loaded for, the beginning of error messages.

    Raises:
        ValueError: there is no such file, module or attribute, or it cannot be called.
    """
    module = _load_file(Path(source), who) if source.endswith(".py") else _import(source, who)
    try:
        target = functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        guess = difflib.get_close_matches(attribute, [key for key, value in vars(module).items() if callable(value)], 1)
        hint = f" Did you mean {guess[0]!r}?" if guess else ""
        raise ValueError(f"{who}: {source!r} has no {attribute!r}.{hint}") from error
    if not callable(target):
        raise ValueError(f"{who} is a {type(target).__name__}: a function or a class is needed.")
    return target


def _parameters(target: Callable) -> set[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in inspect.signature(target).parameters.values() if p.kind in named} - {"images", "prompts"}


def _unknown(name: str) -> str:
    guess = difflib.get_close_matches(name, BUILT_INS, 1)
    hint = f" Did you mean {guess[0]!r}?" if guess else ""
    return (
        f"There is no reward {name!r}.{hint} Built in: {', '.join(BUILT_INS)}. A reward of your own is named 'module:function' "
        "or 'path/to/file.py:function', a callable (images, prompts, **columns) -> (B,) tensor; one on a server, 'http://host:port'; "
        "one that train_reward.py learned, by its folder."
    )


def _load_file(path: Path, who: str) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{who}: there is no file {path}.")
    written = hashlib.sha256(path.read_bytes()).hexdigest()[:16]  # an edited file is another module, in a notebook's next cell
    key = f"diffusers_align_user_{path.stem}_{abs(hash(path)):x}_{written}"
    if key in sys.modules:
        return sys.modules[key]
    importable(path.parent)  # modules beside it, as of a script
    spec = importlib.util.spec_from_file_location(key, path)
    module = sys.modules[key] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def importable(folder: str | Path) -> None:
    """Modules of the folder can be imported, last of all."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _import(module_name: str, who: str) -> ModuleType:
    """Import from the usual places, then from the current folder."""
    importable(os.getcwd())  # which `sys.path` lacks under a launcher
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but one that it imports is not
        raise ValueError(
            f"{who}: there is no module {error.name!r}, neither installed nor in {os.getcwd()}. Write 'module:function' or 'path/to/file.py:function'."
        ) from error
