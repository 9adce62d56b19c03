"""A pipeline around any stock pipeline, classic or modular: is called as that one is, gives its output and rewards; loads any classic checkpoint.

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
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from ..checks.ranges import check_call
from ..condition import Condition, is_embedding
from ..driving.arguments import check_known, check_number, checked_prompts, own_levels, unknown_prompts
from ..driving.calls import Calls, calls_of
from ..driving.chains import SEVERAL_CHAINS, Chains, Finals, Recorder, put_state
from ..driving.outcome import Outcome, by_sample, outcome
from ..driving.parts import parts_of
from ..driving.portions import refuse_portions
from ..driving.prompt_memory import PromptMemory
from ..driving.safety_checker import unchecked
from ..driving.scheduler_hook import Step, drive
from ..gradients.decoding import light_decoding
from ..policy import Policy
from ..rewards import load_reward
from .callbacks import check_last_step, watched
from .draws import Generators, copied
from .judge import Judge
from .rows import with_own_rows

logger = logging.get_logger(__name__)
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
        pipeline: any loaded diffusers pipeline, classic or modular. Its components are shared, not copied, and keep device and dtype.
        reward: a name (`diffusers_align.rewards`) or a callable (images, prompts, **columns) -> (B,); calls may give another.

    Attributes:
        pipeline: the stock pipeline inside, which any attribute that is not found here is looked up on.
        prompt_memory: the encoded prompts of the latest call.
    """

    def __init__(self, pipeline: DiffusionPipeline | ModularPipeline | None = None, reward=None, **components: Any):
        if isinstance(pipeline, _Blueprint):
            pipeline = pipeline.build(components)
        elif not isinstance(pipeline, (DiffusionPipeline, ModularPipeline)):
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
    def from_pipe(cls, pipeline: DiffusionPipeline | ModularPipeline, **kwargs: Any) -> WrappedPipeline:
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
        """As of any pipeline. Those that call other pipelines configure theirs, and modular ones their blocks': neither has one to ask for."""
        configured = (pipeline for pipeline in (self.pipeline, *parts_of(self.pipeline)) if hasattr(pipeline, "_progress_bar_config"))
        return DiffusionPipeline.progress_bar(next(configured, self), iterable, total)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Of this pipeline and of the one inside."""
        self.pipeline.set_progress_bar_config(**kwargs)
        self.__dict__["_progress_bar_config"] = kwargs

    @property
    def calls(self) -> Calls:
        """How the pipeline inside is called."""
        return calls_of(self.pipeline)

    # --- calls of the stock pipeline -------------------------------------------------------------------------------

    def asked(self, prompt: str | list[str] | None, arguments: dict[str, Any]) -> tuple[Condition, dict[str, Any]]:
        """The stock call's prompts with what goes with them (shared, and `per_sample` in `arguments`), and its arguments of single outputs
        (generator, number of copies, initial latents) and of the output's form.

        Raises:
            ValueError: no prompt, or an argument that the stock call lacks.
        """
        accepted = self.calls.parameters
        arguments, own = {**arguments}, {**(arguments.get("per_sample") or {})}
        arguments.pop("per_sample", None)
        check_known(type(self).__name__, type(self.pipeline).__name__, {*arguments, *own}, accepted)
        check_call({**arguments, **own})
        check_number({*arguments, *own}, accepted)
        rest = {name: arguments.pop(name) for name in ("generator", "output_type", "return_dict", "latents", *_PER_PROMPT) if name in arguments}
        if prompt is None and any(map(is_embedding, {**arguments, **own})):
            prompt = unknown_prompts(type(self.pipeline).__name__, accepted, arguments, own, None)
            logger.warning("Embeddings stand in the place of prompts: rewards judge images against empty ones. Give prompt as well where they read it.")
        if callable(callback := arguments.get("callback_on_step_end")):
            arguments["callback_on_step_end"] = watched(callback)
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
        if "generator" not in self.calls.parameters:
            raise ValueError(f"{self.calls.name}'s call takes no generator, so its samples have no seeds: none are drawn to choose from or to steer.")
        asked, rest = self.asked(prompt, arguments)
        asked, copies = with_own_rows(self, asked), max(copies_asked(rest).values(), default=1)
        rows = [i for i in range(len(asked)) for _ in range(copies)]
        generator, latents = rest.get("generator"), rest.get("latents")
        if isinstance(generator, list) and len(generator) != len(rows):
            raise ValueError(f"{len(rows)} outputs need as many generators, got {len(generator)}.")
        condition = asked.select(rows)
        return condition if latents is None else replace(condition, kwargs={**condition.kwargs, "latents": latents}), generator

    def drive(self, condition: Condition, generator: Generators, on_step, *, gradients: bool = False, needs_denoiser=None, global_seed=None, **overrides: Any):
        """Call the stock pipeline for the rows of `condition` and hand each scheduler step to `on_step` (`diffusers_align.driving.scheduler_hook`)."""
        call = {**condition.arguments(self.calls.parameters), "generator": generator, **overrides}
        with light_decoding(self.pipeline) if gradients else nullcontext():
            return drive(self.pipeline, on_step, call, gradients=gradients, needs_denoiser=needs_denoiser, memory=self.prompt_memory, global_seed=global_seed)

    @torch.no_grad()
    def sample(self, condition: Condition, generator: Generators, copies: dict[str, int] | None = None, **overrides: Any) -> Finals:
        """The stock pipeline's own samples: the final states (B, *D) of each chain of its scheduler and of the copies it makes.

        Args:
            copies: the argument that asks for several outputs of each prompt, if the call has one.

        Raises:
            ValueError: no scheduler took a step, or the steps are of another number of samples.
        """
        record = Recorder(len(condition) * max((copies or {}).values(), default=1))
        # Open gates learn what a later call with closed ones must return.
        self.drive(condition, generator, record, needs_denoiser=lambda k: True, output_type="latent", **(copies or {}), **overrides)
        return record.finals

    def finish(self, final: Finals | list[Tensor], condition: Condition, generator: Generators, **overrides: Any):
        """The stock pipeline's output for the final states (B, *D), by its own tail; no denoiser is called.

        Args:
            final: of each chain, or a list of each scheduler's, which has one.
            generator: in the state that it had when the samples were drawn: some pipelines draw masks or noise beside them.
            overrides: such as `output_type`.

        Raises:
            ValueError: the call has more chains, or a step callback has changed the latents after the last step.
        """
        check_last_step(condition.kwargs)
        chains, portions, before = Chains(), {0}, copied(generator)

        def put(step: Step) -> Tensor:
            if isinstance(final, dict):
                return put_state(chains, step, final, "searches over noise")
            portions.add(step.portion)
            if chains.of(step)[1] > step.portion:
                raise ValueError(SEVERAL_CHAINS.format("particles and searches over noise"))
            step.skip()
            return step.like(final[step.child])

        quiet = {name: None for name in ("callback_on_step_end", "callback") if name in condition.kwargs}
        closed = {"needs_denoiser": lambda k: False, **quiet}
        output = self.drive(condition, generator, put, gradients=torch.is_grad_enabled(), **closed, **overrides)
        if len(portions) > 1 and isinstance(final, list):
            again = {**closed, "global_seed": 0, "output_type": "pt"}
            refuse_portions(
                self.pipeline, lambda on_step: self.drive(condition, copied(before), on_step, **again), "choose the best of n, which looks at whole samples"
            )
        return output

    def decode(self, final: Finals | list[Tensor], condition: Condition, generator: Generators) -> Outcome:
        """What rewards judge, which no safety checker has seen; differentiable if autograd is on."""
        with unchecked(self.pipeline):  # what is handed out comes from `finish`, and passes it
            return by_sample(outcome(self.pipeline, self.finish(final, condition, generator, output_type="pt")), len(condition))

    @contextmanager
    def as_policy(self, scheduler=None, condition: Condition | None = None) -> Iterator[Policy]:
        """The pipeline inside as a `Policy`, with its scheduler, for a while: its own, its gradient flags and training modes come back afterwards.

        Args:
            condition: of the call to come: with a schedule of its own (`timesteps`, `sigmas`) the twin follows the levels of the pipeline's scheduler.

        Raises:
            ValueError: what `Policy` raises; a schedule of one's own that no twin follows.
        """
        modules = [m for component in self.pipeline.components.values() if isinstance(component, nn.Module) for m in component.modules()]
        flags = {p: p.requires_grad for m in modules for p in m.parameters(recurse=False)}
        modes = {m: m.training for m in modules}
        try:
            policy = Policy(self.pipeline, scheduler, **({} if condition is None else own_levels(condition.kwargs)))
            policy.prompt_memory = self.prompt_memory
            with policy.schedulers_in_place():
                yield policy
        finally:
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

    def judge(self, reward, condition: Condition, columns: dict[str, list] | None = None, on_invalid: str = "error") -> Judge:
        """What gives images their rewards: the call's, or the pipeline's.

        Args:
            columns: other arguments of the reward, a list for each with an entry per prompt.
            on_invalid: where the reward is NaN: "error", or "mask" to let it be.

        Raises:
            ValueError: there is no reward, or a column of another length.
        """
        return Judge.of(self.reward_of_call(reward), condition, columns, on_invalid, self.pipeline)

    @staticmethod
    def extended(output, **extra: Any):
        """The stock output with more entries; a tuple ends with them."""
        if isinstance(output, tuple):
            return (*output, *extra.values())
        for name, value in extra.items():
            output[name] = value
        return output


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
