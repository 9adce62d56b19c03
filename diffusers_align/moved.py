"""Old module names, accepted for one version: `import diffusers_align.differentiable` is `diffusers_align.gradients.rollout`, and says so.

Nothing of it runs, and nothing is imported, before such a name is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]


def _to(folder: str, *same: str, old: str = "", **renamed: str) -> dict[str, str]:
    """Modules of the folder `old` that went into `folder`, under the same name or another."""
    names = {name: name for name in same} | renamed
    return {f"{old}.{before}".lstrip("."): f"{folder}.{now}" for before, now in names.items()}


# Old name to new one, inside the package.
MOVED = {
    **_to("driving", "initial_noise", "latent_layout", "noise", "pipeline_state", "prediction", "prompt_memory", "reproducibility", "safety_checker"),
    **_to("driving", "stock", "tape", "wrappers", calls="driver", driver="scheduler_hook"),
    **_to("gradients", "decoding", differentiable="rollout", gradient_check="check"),
    **_to("checks", "given_names", "ranges"),
    **_to("files", "weight_files", lora_files="lora_finder", front_doors="paths"),
    **_to("rl", old="rl", preferences="pair_losses"),
    **_to("rewards", old="rewards", loading="registry"),
    **_to("data", old="data", loading="read"),
    **_to("training.flags", "option_types", "options", "recipes", old="training", arguments="common", data_arguments="data", method_arguments="methods"),
    **_to("training.run", "costs", "division", "early_stop", "endings", "failures", "health", "inputs", "metrics", "sharding", "single_file", old="training"),
    **_to("training.run", "symptoms", old="training", averages="weight_copies", loading="model_loading"),
    **_to("training.checkpoints", "folder_lock", "state_files", old="training", resumable="state_adapters", resuming="allowed_changes"),
    **_to("training.online", "sampling", "scoring", "trust_region", old="training", advantages="group_advantages", candidates="step_candidates"),
    **_to("training.online", old="training", credit="step_rewards", views="captions", noising="forward_samples", preferences="stored_trajectories"),
    **_to("training.offline", "held_out_pairs", "made_preferences", old="training", noised_images="data_latents"),
    **_to("training.offline", old="training", preference_flow="flow_pairs", reward_learning="reward_fitting"),
    **_to("training.gradient", "adjoints", "bound_rewards", "pretraining", old="training", reward_gradients="loop", renoised_samples="renoised"),
    **_to("training.report", "comparison", "evaluation", "hub", "lettering", "model_card", "pictures", "statistics", old="training"),
}
# Modules that became several: where else their names are, beside the module of `MOVED`.
SPLIT = {
    "calls": ("driving.arguments",),
    "decoding": ("driving.replacements",),
    "differentiable": ("gradients.walk",),
    "driver": ("driving.prompt_memory",),
    "wrappers": ("driving.replacements",),
    "training.arguments": ("training.flags.model", "training.flags.task"),
    "training.noised_images": ("training.offline.noised_latents",),
    "training.preferences": ("training.online.sampling",),
    "training.resuming": ("rewards.contents",),
    "training.reward_gradients": tuple(f"training.gradient.{name}" for name in ("reward_check", "losses", "epoch_log", "adjoints", "renoised")),
}
# Modules in whose place stands a folder of that name, which hands on what they had.
INTO_FOLDERS = {
    "training.run": ("training.run.run",),
    "training.checkpoints": ("training.checkpoints.checkpoints",),
    "training.report": ("training.report.report",),
    "training.offline": tuple(f"training.offline.{module}" for module in ("pairs_and_batches", "rows", "descent", "noised_latents", "loop")),
}


def _said(old: str, new: str) -> None:
    message = f"{PACKAGE}.{old} is {PACKAGE}.{new} now; the old name goes with version 0.2.0."
    # Seen wherever it comes from: a reward's own file is not the main module, where alone deprecations are shown.
    warnings.warn(message, FutureWarning, stacklevel=3)


class OldNames:
    """Finds what no other finder does: modules by their old names. Both names stand for one module."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        known = name.startswith(f"{PACKAGE}.") and name.removeprefix(f"{PACKAGE}.") in MOVED
        return importlib.util.spec_from_loader(name, OldNames) if known else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        old = module.__name__.removeprefix(f"{PACKAGE}.")
        _said(old, MOVED[old])
        if old in SPLIT:
            module.__getattr__ = _from(module.__name__, (MOVED[old], *SPLIT[old]))
        else:
            sys.modules[module.__name__] = importlib.import_module(f"{PACKAGE}.{MOVED[old]}")


def _from(name: str, modules: tuple[str, ...]) -> Callable[[str], Any]:
    """`__getattr__` of the module `name`: what the first of `modules` has that has it."""

    def __getattr__(wanted: str) -> Any:
        for module in () if wanted.startswith("__") else modules:
            if hasattr(found := importlib.import_module(f"{PACKAGE}.{module}"), wanted):
                return getattr(found, wanted)
        raise AttributeError(f"module {name!r} has no attribute {wanted!r}: it became {', '.join(modules)}")

    return __getattr__


def as_before(folder: str) -> Callable[[str], Any]:
    """`__getattr__` of a folder in the place of a module: what the module had, from where it is now.

    Args:
        folder: its full name, `__name__` there.
    """
    old = folder.removeprefix(f"{PACKAGE}.")

    def __getattr__(name: str) -> Any:
        # A module of the folder is no name of what was there before; and without one, nothing heavy is imported to find that out.
        maybe = not name.startswith("_") and importlib.util.find_spec(f"{folder}.{name}") is None
        for module in INTO_FOLDERS[old] if maybe else ():
            if hasattr(found := importlib.import_module(f"{PACKAGE}.{module}"), name):
                _said(f"{old}.{name}", f"{module}.{name}")
                return getattr(found, name)
        raise AttributeError(f"module {folder!r} has no attribute {name!r}")

    return __getattr__


def accept_old_names() -> None:
    """From now on; after all other finders, so that no other import is slower."""
    if OldNames not in sys.meta_path:
        sys.meta_path.append(OldNames)
