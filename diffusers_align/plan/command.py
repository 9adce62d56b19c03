"""`diffusers-align plan`: a recipe, or flags, to a plan."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ..files.levels import script_of
from ..files.paths import find_recipe, front_door
from ..training.flags.options import Arguments, options_of
from ..training.flags.recipes import read_recipe
from .advice import fitted
from .planner import Plan
from .steps import check_known

# What a script must be told and a plan does not look at.
_UNREAD = ("output_dir", "prompts", "reward", "dataset_name")
_UNITS = {"GB": 2**30, "GIB": 2**30, "MB": 2**20, "MIB": 2**20}


def plan(config: str | None = None, gpu: str | None = None, script: str | None = None, **flags: Any) -> Plan:
    """What a run takes, without weights, network or GPU.

    >>> print(report(plan("flow_grpo_mini_sd3", gpu="24GB", train_batch_size=16)))  # doctest: +SKIP

    Args:
        config: a recipe, as `--config` has it.
        gpu: the card's memory, such as "24GB"; a gigabyte is 2^30 bytes, as cards are sold.
        script: which one, such as "train_dpo"; by the recipe's name if absent.
        flags: of the script, over the recipe's.

    Raises:
        ValueError: a size that is none, no script, a model without configs, or what no plan is known for.
        FileNotFoundError: no such recipe or model.
    """
    words = [word for name, value in flags.items() for word in _words(name, value)]
    return planned(words if config is None else ["--config", config, *words], gpu, script)


def planned(argv: list[str], gpu: str | None = None, script: str | None = None, as_on_gpu: bool = True) -> Plan:
    """The same for words of a command line; exits as the script does where one makes no sense.

    Args:
        as_on_gpu: as `FakeModels` has it.
    """
    size = None if gpu is None else memory(gpu)
    script = (script or _script(argv)).removesuffix(".py")
    module = module_of(script)
    check_known(script)
    with _quiet():
        return fitted(script, module.parse_args([*argv, *_unread(module, argv)]), size, as_on_gpu)


@contextmanager
def _quiet() -> Iterator[None]:
    """Context: the libraries say nothing of models that are none, and of prompts that nobody gave."""
    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, before):
            library.set_verbosity(level)


def memory(text: str) -> int:
    """Bytes of "24GB", "80 GiB" or "8192MB"; a gigabyte is 2^30 of them.

    Raises:
        ValueError: it is no such text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"A card's memory is a number and a unit, such as 24GB or 80GB, got {text!r}.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]


def _recipes(argv: list[str]) -> list[str]:
    """What `--config` is given."""
    places = [i for i, word in enumerate(argv) if word.partition("=")[0] == "--config"]
    if any("=" not in argv[i] and i + 1 == len(argv) for i in places):
        raise ValueError("--config needs the name or the file of a recipe: diffusers-align list recipes shows those that are there.")
    return [argv[i].partition("=")[2] if "=" in argv[i] else argv[i + 1] for i in places]


def _script(argv: list[str]) -> str:
    given = _recipes(argv)
    if not given:
        raise ValueError("A plan is of a recipe, --config RECIPE, or of a script with its flags: --script train_dpo ...")
    try:
        return script_of(find_recipe(given[-1]).stem)
    except ValueError as error:
        raise ValueError(f"{error} Say which script the recipe is of: --script train_dpo, say.") from error


def module_of(script: str) -> Any:
    """A training script as a module."""
    path = front_door("training_scripts", script)
    name = f"planned_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def _unread(module: Any, argv: list[str]) -> list[str]:
    """What stands in for flags that are required, not given, and not looked at."""
    own = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Arguments) and value.__module__ == module.__name__]
    options = options_of(own[-1])
    given = {word.partition("=")[0].removeprefix("--") for word in argv}
    for recipe in _recipes(argv):
        given |= set(read_recipe(recipe, {name: name for option in options.values() for name in (option.name, *option.was)}))
    return [word for name in _UNREAD if name in options and options[name].is_required and name not in given for word in (f"--{name}", "unread")]
