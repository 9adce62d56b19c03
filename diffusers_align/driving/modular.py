"""The calls of a modular pipeline: blocks that declare what they take, and hand a state on to each other.

A call runs copies of the blocks (`driving/blocks.py`), so that nothing of what is changed here is seen by another pipeline or another thread. What
comes after the last block that steps a scheduler is the pipeline's tail: it decodes, and a call that wants latents leaves it out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ConditionalPipelineBlocks, LoopSequentialPipelineBlocks, ModelMixin, ModularPipeline, ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines import PipelineState
from diffusers.utils import logging
from torch import Tensor, nn

from .blocks import leaves, own_blocks, undecorated
from .calls import Calls, one_a_prompt
from .guiders import guided, guider_parameters, state_of
from .replacements import held, reads_global, with_globals

logger = logging.get_logger(__name__)
# What every call is given, whatever it reads.
_OF_ALL_CALLS = {"prompt", "generator", "latents", "output_type", "return_dict"}
_LOOKED_AT: WeakKeyDictionary[ModularPipeline, set[frozenset[str]]] = WeakKeyDictionary()


class Output(PipelineState):
    """A modular pipeline's state after a call, whose entry 0 is what the call was for: images, videos or sounds, or final latents.

    Attributes:
        main: the name of entry 0.
        made: what the blocks hand out; other values are what they were given, or hand on to each other.
    """

    main: str | None = None
    made: tuple[str, ...] = ()

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return self.values[index]
        if index != 0:
            raise IndexError("A modular pipeline's output has one entry; the others go by their names.")
        return self.values.get(self.main)

    def __setitem__(self, name: str, value: Any) -> None:
        self.set(name, value)

    def __iter__(self) -> Iterator[str]:
        """The names of what blocks hand out, and of what was added."""
        return iter(self.values)


class ModularCalls(Calls):
    """See `Calls`."""

    @property
    def blocks(self) -> ModularPipelineBlocks:
        return self.pipeline._blocks

    @property
    def functions(self) -> list[FunctionType]:
        return [inspect.unwrap(type(block).__call__) for block in leaves(self.blocks)]

    @property
    def schedulers(self) -> dict[str, Any]:
        """The component called `scheduler` is the main one, or else the first that is a scheduler; others are those of further modalities."""
        found = {name: c for name, c in self.pipeline.components.items() if hasattr(c, "step") and hasattr(c, "set_timesteps")}
        return {name: found[name] for name in sorted(found, key=lambda name: name != "scheduler")}

    @property
    def whats_missing(self) -> str:
        empty = self.pipeline.null_component_names
        return f"{', '.join(empty)} have not been loaded: call load_components() first" if empty else "its blocks take no steps that could be a policy's"

    @property
    def own_parameters(self) -> dict[str, inspect.Parameter]:
        found = {p.name or p.kwargs_type: (p.default, p.type_hint) for p in self.blocks.inputs if p.name or p.kwargs_type}
        found = {"output_type": ("pil", str), "return_dict": (True, bool)} | found
        return {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind) for name, (value, kind) in found.items()}

    def spread(self, call: dict[str, Any]) -> dict[str, Any]:
        return call  # `run` does so itself, once it has seen which arguments differ from their defaults

    def run(self, call: dict[str, Any]) -> Any:
        whole, own = self.own_parameters, guider_parameters(self.pipeline)
        if unknown := sorted(set(call) - set(whole) - set(own)):
            raise TypeError(f"The blocks of this {self.name} take no {', '.join(unknown)}. They take {', '.join(whole | own)}.")
        self._say_unread(call, whole)
        settings = {name: value for name, value in call.items() if name in own and name not in whole}
        graph, wants_latents = torch.is_grad_enabled(), call.get("output_type") == "latent"

        def with_graph(run: Callable, *args: Any, **kwargs: Any):
            with torch.set_grad_enabled(graph):  # the pipeline's own call switches it off
                return run(*args, **kwargs)

        blocks = own_blocks(self._without_tail() if wants_latents else self.blocks, around=lambda block: with_graph)
        taken = {p.name or p.kwargs_type for p in blocks.inputs}
        with held(self.pipeline, "_blocks", blocks), guided(self.pipeline, settings):
            given = {name: value for name, value in one_a_prompt(call).items() if name in taken and value is not None}
            state = undecorated(type(self.pipeline).__call__)(self.pipeline, **given)
        output = Output(state.values, state.kwargs_mapping)
        output.main = "latents" if wants_latents else self._main_output(state)
        output.made = tuple(own.name for own in self.blocks.outputs)
        return output if call.get("return_dict", True) else (output[0],)

    def _say_unread(self, call: dict[str, Any], whole: dict[str, inspect.Parameter]) -> None:
        """Once for a pipeline and the same arguments, which of them, other than their defaults, no block reads that such a call chooses."""
        names = [name for name in call if name in whole and name not in _OF_ALL_CALLS and call[name] is not None]
        given = frozenset(name for name in names if not (isinstance(call[name], (int, float, str)) and call[name] == whole[name].default))
        said = _LOOKED_AT.setdefault(self.pipeline, set())
        if given in said:
            return
        said.add(given)
        read = self.of_a_call(call)
        if read and (unread := sorted(given - read)):
            logger.warning(
                f"This call of {self.name} has no use for {', '.join(unread)}: its blocks are chosen by what is given (an image, a mask), and those of this "
                "call do not read it. Leave it out, or give what it goes with."
            )

    def _without_tail(self) -> ModularPipelineBlocks:
        """The blocks up to the last one that steps a scheduler."""
        names, parts = set(self.schedulers), list(self.blocks.sub_blocks.items())
        last = max((i for i, (_, part) in enumerate(parts) if names & {spec.name for spec in part.expected_components}), default=len(parts) - 1)
        if isinstance(self.blocks, LoopSequentialPipelineBlocks) or last == len(parts) - 1:
            return self.blocks
        cut = own_blocks(self.blocks)
        for name, _ in parts[last + 1 :]:
            del cut.sub_blocks[name]
        return cut

    def _main_output(self, state: PipelineState) -> str | None:
        return next((output.name for output in self.blocks.outputs if state.get(output.name) is not None), None)

    def clean_up(self) -> None:
        """Nothing: blocks leave no hooks behind."""

    @property
    def encodes(self) -> bool:
        return any(self._is_encoder(block) for block in leaves(self.blocks))

    def _is_encoder(self, block: ModularPipelineBlocks) -> bool:
        """Whether a block reads prompts by a network of another library, with nothing drawn."""
        parts = [getattr(self.pipeline, spec.name, None) for spec in block.expected_components]
        reads = any(isinstance(part, nn.Module) and not isinstance(part, ModelMixin) for part in parts)
        return reads and not block.sub_blocks and "generator" not in block.input_names

    @contextmanager
    def encoding(self, encode: Callable[..., Any]) -> Iterator[None]:
        def around(block: ModularPipelineBlocks) -> Callable | None:
            return self._encoded(block, encode) if self._is_encoder(block) else None

        with held(self.pipeline, "_blocks", own_blocks(self.blocks, around=around)):
            yield

    def _encoded(self, block: ModularPipelineBlocks, encode: Callable[..., Any]) -> Callable:
        """In the place of a block: what it leaves in the state is what `encode` returns for what it reads there."""
        kinds = {p.name: p.kwargs_type for p in (*block.inputs, *block.intermediate_outputs)}

        def call(run: Callable, components: Any, state: PipelineState):
            def original(guiders: dict, **read: Any) -> dict[str, Any]:
                before = {**state.values, **read}  # one prompt of several, perhaps
                after = PipelineState(dict(before), dict(state.kwargs_mapping))
                run(components, after)
                found = {name: value for name, value in after.values.items() if name not in before or before[name] is not value}
                return dict(sorted(found.items(), key=lambda item: not item[0].startswith("prompt_embeds")))

            read = {name: state.get(name) for name in block.input_names if name}
            for name, value in encode(original, guiders=state_of(self.pipeline), **read).items():
                state.set(name, value, kinds.get(name))
            return components, state

        return call

    @contextmanager
    def initial_noise(self, put: Callable[[Tensor], Tensor]) -> Iterator[None]:
        seen: list[bool] = []

        def drawing(draw: Callable) -> Callable:
            def drawn(*args: Any, **kwargs: Any) -> Tensor:
                noise = draw(*args, **kwargs)
                seen.append(True)
                return put(noise) if len(seen) == 1 else noise

            return drawn

        def names(module: dict[str, Any]) -> dict[str, Any]:
            if "randn_tensor" not in module:
                return {}
            drawn = drawing(module["randn_tensor"])
            helpers = {name: f for name, f in module.items() if inspect.isfunction(f) and reads_global(f.__code__, "randn_tensor")}
            return {"randn_tensor": drawn, **{name: with_globals(f, randn_tensor=drawn) for name, f in helpers.items()}}

        with held(self.pipeline, "_blocks", own_blocks(self.blocks, globals_of=names)):
            yield
        if not seen:
            raise ValueError(f"{self.name} drew no initial noise in its blocks, or by another function than diffusers' own: leave `latents` out of its call.")

    @contextmanager
    def prepared_latents(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        seen: list[bool] = []

        def before(run: Callable, components: Any, state: PipelineState):
            if not seen and state.get("latents") is not None:
                seen.append(True)
                state.set("latents", change(state.get("latents")))
            return run(components, state)

        blocks = own_blocks(self.blocks, around=lambda block: before if isinstance(block, LoopSequentialPipelineBlocks) else None)
        with held(self.pipeline, "_blocks", blocks):
            yield

    def starts_from_noise(self, arguments: dict[str, Any]) -> bool:
        return self._chosen(arguments) is not None and "strength" not in self.of_a_call(arguments)

    def of_a_call(self, arguments: dict[str, Any]) -> set[str]:
        chosen = self._chosen(arguments)
        return set() if chosen is None else {p.name or p.kwargs_type for p in chosen.inputs}

    def _chosen(self, arguments: dict[str, Any]) -> ModularPipelineBlocks | None:
        if not isinstance(self.blocks, (ConditionalPipelineBlocks, SequentialPipelineBlocks)):
            return self.blocks  # there is nothing to choose
        return self.blocks.get_execution_blocks(**{name: value for name, value in arguments.items() if value is not None})
