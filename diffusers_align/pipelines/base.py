"""A pipeline around any stock pipeline: loads any checkpoint, is called like the stock class, gives its output and rewards.

diffusers asks a custom pipeline for its components before it has loaded them. A class that wraps any pipeline has none of its
own: it reads the checkpoint's class from `model_index.json`, lets diffusers load what that one takes, and builds it inside.
What `DiffusionPipeline` does to itself (moving, offloading, saving, LoRA) is done to the pipeline inside.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from ..checks.ranges import check_call, check_value
from ..condition import Condition, is_embedding
from ..driving.arguments import checked_prompts, unknown_prompts
from ..driving.calls import calls_of
from ..driving.driver import images_of
from ..driving.parts import parts_of
from ..driving.prompt_memory import PromptMemory
from ..driving.safety_checker import unchecked
from ..driving.scheduler_hook import Step, drive
from ..gradients.decoding import light_decoding
from ..policy import Policy
from ..rewards import load_reward
from ..rewards.base import score_columns
from .outputs import by_scheduler

logger = logging.get_logger(__name__)
Generators = torch.Generator | list[torch.Generator] | None
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


@dataclass
class _Blueprint:
    """A stock pipeline that is yet to be built: its class, and what is not loaded from files."""

    cls: type[DiffusionPipeline]
    given: dict[str, Any]

    def build(self, components: dict[str, Any]) -> DiffusionPipeline:
        parts, expected = {**components, **self.given}, self.cls._get_signature_keys(self.cls)[0]
        if missing := sorted(set(expected) - set(parts) - set(self.cls._optional_components)):
            raise ValueError(f"The checkpoint has no {', '.join(missing)}, which {self.cls.__name__} needs; pass them to from_pretrained.")
        return self.cls(**{**dict.fromkeys(expected), **parts})


class WrappedPipeline(DiffusionPipeline):
    """Wraps a stock pipeline. Subclasses write `__call__`.

    Args:
        pipeline: any loaded diffusers pipeline. Its components are shared, not copied, and keep device and dtype.
        reward: a name (`diffusers_align.rewards`) or a callable (images, prompts, **columns) -> (B,); calls may give another.

    Attributes:
        pipeline: the stock pipeline inside, which any attribute that is not found here is looked up on.
        prompt_memory: the encoded prompts of the latest call.
    """

    def __init__(self, pipeline: DiffusionPipeline | None = None, reward=None, **components: Any):
        if isinstance(pipeline, _Blueprint):
            pipeline = pipeline.build(components)
        elif not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(
                f"{type(self).__name__} wraps a loaded pipeline: {type(self).__name__}(pipe), or {type(self).__name__}.from_pretrained(...); "
                f"got a {type(pipeline).__name__}."
            )
        elif components:
            raise TypeError(f"{type(self).__name__}(pipe) takes no components, got {', '.join(sorted(components))}; give them to the pipeline.")
        own = {"pipeline": pipeline.pipeline if isinstance(pipeline, WrappedPipeline) else pipeline, "reward": reward, "prompt_memory": PromptMemory()}
        self.__dict__.update(own)

    # What diffusers counts as arguments: none that it could take for a component.
    __init__.__signature__ = inspect.Signature(
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("pipeline", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
            inspect.Parameter("reward", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
        ]
    )

    # --- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """What the checkpoint's own class takes: files to load by name, and a blueprint of the rest."""
        stock = _stock_class(config_dict)
        found, unused, hidden = stock.extract_init_dict(config_dict, **kwargs)
        expected, _ = stock._get_signature_keys(stock)
        given = {name: value for name, value in found.items() if name in kwargs or name not in expected}
        files = {name: value for name, value in found.items() if name not in given}
        return {"pipeline": _Blueprint(stock, given), **files}, unused, hidden

    @classmethod
    def _get_signature_types(cls):
        return defaultdict(lambda: (inspect.Signature.empty,))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> WrappedPipeline:
        """Wrap a loaded pipeline: the same as calling the class. Components keep their dtype."""
        return cls(pipeline, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if "pipeline" not in self.__dict__:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(self.__dict__["pipeline"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or name not in self.pipeline.components:
            object.__setattr__(self, name, value)
        else:
            setattr(self.pipeline, name, value)

    def progress_bar(self, iterable=None, total=None):
        """As of any pipeline. Those that call other pipelines configure theirs, and return none."""
        configured = (pipeline for pipeline in (self.pipeline, *parts_of(self.pipeline)) if hasattr(pipeline, "_progress_bar_config"))
        return DiffusionPipeline.progress_bar(next(configured, self.pipeline), iterable, total)

    # --- calls of the stock pipeline -------------------------------------------------------------------------------

    def asked(self, prompt: str | list[str] | None, arguments: dict[str, Any]) -> tuple[Condition, dict[str, Any]]:
        """The stock call's prompts with what goes with them (shared, and `per_sample` in `arguments`), and its arguments of single outputs
        (generator, number of copies, initial latents) and of the output's form.

        Raises:
            ValueError: no prompt, or an argument that the stock call lacks.
        """
        accepted = inspect.signature(type(self.pipeline).__call__).parameters
        arguments, own = {**arguments}, {**(arguments.get("per_sample") or {})}
        arguments.pop("per_sample", None)
        if unknown := sorted({*arguments, *own} - set(accepted)):
            raise ValueError(f"Neither {type(self).__name__} nor {type(self.pipeline).__name__} takes {', '.join(unknown)}.")
        check_call({**arguments, **own})
        rest = {name: arguments.pop(name) for name in ("generator", "output_type", "return_dict", "latents", *_PER_PROMPT) if name in arguments}
        if prompt is None and any(map(is_embedding, {**arguments, **own})):
            prompt = unknown_prompts(type(self.pipeline).__name__, accepted, arguments, own, None)
            logger.warning("Embeddings stand in the place of prompts: rewards judge images against empty ones. Give prompt as well where they read it.")
        if prompt is None or prompt == []:
            raise ValueError("Give prompt: rewards judge images against it; or prompt_embeds in its place, for rewards that read no prompt.")
        return Condition(checked_prompts(prompt), arguments, per_sample=own), rest

    def condition(self, prompt: str | list[str] | None, arguments: dict[str, Any]) -> tuple[Condition, Generators]:
        """The stock call's arguments, a row for each of its outputs, and its generators. A call begins with it, and remembers its own encoded
        prompts alone: text encoders may have changed since the last (LoRA, training).

        Raises:
            ValueError: no prompt, or an argument that the stock call lacks.
        """
        self.__dict__["prompt_memory"] = PromptMemory()
        asked, rest = self.asked(prompt, arguments)
        if "generator" not in inspect.signature(type(self.pipeline).__call__).parameters:
            raise ValueError(f"{type(self.pipeline).__name__}'s call takes no generator, so its samples have no seeds.")
        copies = max(copies_asked(rest).values(), default=1)
        rows = [i for i in range(len(asked)) for _ in range(copies)]
        generator, latents = rest.get("generator"), rest.get("latents")
        if isinstance(generator, list) and len(generator) != len(rows):
            raise ValueError(f"{len(rows)} outputs need as many generators, got {len(generator)}.")
        condition = asked.select(rows)
        return condition if latents is None else replace(condition, kwargs={**condition.kwargs, "latents": latents}), generator

    def drive(self, condition: Condition, generator: Generators, on_step, *, gradients: bool = False, needs_denoiser=None, global_seed=None, **overrides: Any):
        """Call the stock pipeline for the rows of `condition` and hand each scheduler step to `on_step` (`diffusers_align.driving.scheduler_hook`)."""
        call = {**condition.arguments(inspect.signature(type(self.pipeline).__call__).parameters), "generator": generator, **overrides}
        with light_decoding(self.pipeline) if gradients else nullcontext():
            return drive(self.pipeline, on_step, call, gradients=gradients, needs_denoiser=needs_denoiser, memory=self.prompt_memory, global_seed=global_seed)

    @torch.no_grad()
    def sample(self, condition: Condition, generator: Generators, **overrides: Any) -> list[Tensor]:
        """The stock pipeline's own samples: the final states (B, *D) of its scheduler and of the copies it makes; (B, 0) of one that takes no step."""
        final: dict[int, Tensor] = {}

        def keep(step: Step) -> None:
            final[step.child] = step.run().prev_sample

        # Open gates learn what a later call with closed ones must return.
        self.drive(condition, generator, keep, needs_denoiser=lambda k: True, output_type="latent", **overrides)
        return by_scheduler(final)

    def finish(self, final: list[Tensor], condition: Condition, generator: Generators, **overrides: Any):
        """The stock pipeline's output for the final states (B, *D), by its own tail; no denoiser is called.

        Args:
            generator: in the state that it had when the samples were drawn: some pipelines draw masks or noise beside them.
            overrides: such as `output_type`.
        """

        def put(step: Step) -> Tensor:
            step.skip()
            return step.like(final[step.child])

        quiet = {name: None for name in ("callback_on_step_end", "callback") if name in condition.kwargs}
        return self.drive(condition, generator, put, gradients=torch.is_grad_enabled(), needs_denoiser=lambda k: False, **quiet, **overrides)

    def decode(self, final: list[Tensor], condition: Condition, generator: Generators) -> Tensor:
        """Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] that no safety checker has seen; differentiable if autograd is on."""
        with unchecked(self.pipeline):  # what is handed out comes from `finish`, and passes it
            return images_of(self.finish(final, condition, generator, output_type="pt"))

    @contextmanager
    def as_policy(self, scheduler=None, **call_kwargs: Any) -> Iterator[Policy]:
        """The pipeline inside as a `Policy`, for a while: its scheduler, gradient flags and training modes come back afterwards."""
        modules = [m for component in self.pipeline.components.values() if isinstance(component, nn.Module) for m in component.modules()]
        flags = {p: p.requires_grad for m in modules for p in m.parameters(recurse=False)}
        modes, stock = {m: m.training for m in modules}, calls_of(self.pipeline).main_scheduler
        try:
            yield Policy(self.pipeline, scheduler, **call_kwargs)
        finally:
            self.pipeline.scheduler = stock
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            for module, mode in modes.items():
                module.training = mode

    # --- rewards ---------------------------------------------------------------------------------------------------

    def reward_of_call(self, reward):
        """The call's reward, or the pipeline's.

        Raises:
            ValueError: neither has one.
        """
        reward = self.reward if reward is None else reward
        if reward is None:
            raise ValueError(f'Give a reward: {type(self).__name__}(pipe, reward="clip_score"), or reward= in the call; a name or a callable.')
        return load_reward(reward, device=self.pipeline.device)

    @staticmethod
    def score(reward, images: Tensor, condition: Condition, columns: dict[str, list] | None, on_invalid: str) -> Tensor:
        """(B,) float32 rewards, NaN where there is none and `on_invalid` is "mask".

        Args:
            columns: other arguments of the reward, a list for each with an entry for each of the B rows.
        """
        return score_columns(reward, images, condition.prompts, columns or {}, on_invalid)["reward"]

    def judge(self, reward, condition: Condition, columns: dict[str, list] | None = None, on_invalid: str = "error") -> Judge:
        """What gives images their rewards: the call's, or the pipeline's.

        Args:
            columns: other arguments of the reward, a list for each with an entry per prompt.
            on_invalid: where the reward is NaN: "error", or "mask" to let it be.

        Raises:
            ValueError: there is no reward, or a column of another length.
        """
        reward, rows = self.reward_of_call(reward), {}
        check_value("on_invalid", on_invalid, Literal["error", "mask"])
        if not isinstance(columns, dict | None):
            raise ValueError(f"columns are the reward's other arguments by name, {{'name': [one per prompt]}}, got a {type(columns).__name__}.")
        for name, values in (columns or {}).items():
            if isinstance(values, str) or not hasattr(values, "__len__"):
                raise ValueError(f"The column {name!r} must be a list with an entry per prompt, got {values!r}.")
            if len(values) == 0 or len(condition) % len(values):
                raise ValueError(f"The column {name!r} has {len(values)} entries, which do not go with {len(condition)} outputs: give one per prompt.")
            rows[name] = [value for value in values for _ in range(len(condition) // len(values))]
        return Judge(reward, condition, rows, on_invalid)

    @staticmethod
    def extended(output, **extra: Any):
        """The stock output with more entries; a tuple ends with them."""
        if isinstance(output, tuple):
            return (*output, *extra.values())
        for name, value in extra.items():
            output[name] = value
        return output


@dataclass(frozen=True)
class Judge:
    """A reward, and what it judges the outputs of a call against."""

    reward: Any
    condition: Condition
    columns: dict[str, list]
    on_invalid: str

    def __call__(self, images: Tensor, rows: list[int]) -> Tensor:
        """(B,) float32 rewards of images (B, 3, H, W) or (B, F, 3, H, W) in [0, 1] that are of these rows of the call's outputs."""
        return WrappedPipeline.score(self.reward, images.float(), self.condition.select(rows), repeated(self.columns, rows), self.on_invalid)


def _stock_class(config: dict[str, Any]) -> type[DiffusionPipeline]:
    name = config.get("_class_name")
    stock = getattr(diffusers, name, None) if isinstance(name, str) else None
    if stock is None:
        raise ValueError(f"The checkpoint is of {name!r}, which is no pipeline of diffusers {diffusers.__version__}; load it and wrap the loaded pipeline.")
    return stock


def _inside(name: str, member):
    """The member of the pipeline inside in the place of the wrapper's own."""
    if isinstance(member, property):
        return property(lambda self: getattr(self.pipeline, name), doc=member.__doc__)

    @functools.wraps(member)
    def forward(self, *args, **kwargs):
        result = getattr(self.pipeline, name)(*args, **kwargs)
        return self if result is self.pipeline else result

    return forward


# Whatever diffusers does to a pipeline is done to the one inside.
for _cls in DiffusionPipeline.__mro__[-2::-1]:
    for _name, _member in vars(_cls).items():
        _of_an_instance = inspect.isfunction(_member) or isinstance(_member, property)
        if _of_an_instance and not _name.startswith("__") and _name not in vars(WrappedPipeline):
            setattr(WrappedPipeline, _name, _inside(_name, _member))


def copies_asked(arguments: dict[str, Any]) -> dict[str, int]:
    """The argument of a stock call that asks for several outputs of each prompt, if it has one."""
    return {name: arguments[name] for name in _PER_PROMPT if arguments.get(name)}


def copied(generator: Generators) -> Generators:
    """Generators in the same state, for a second pass over the same draws."""
    if isinstance(generator, list):
        return [copied(g) for g in generator]
    return generator if generator is None else torch.Generator(generator.device).set_state(generator.get_state())


def repeated(columns: dict[str, list] | None, rows: list[int]) -> dict[str, list] | None:
    """The reward's columns for rows that stand for others."""
    return columns and {name: [values[i] for i in rows] for name, values in columns.items()}
