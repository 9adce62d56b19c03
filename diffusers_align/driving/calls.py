"""How a pipeline is called: the one seam between the kinds of pipeline and everything that drives them.

A classic pipeline has a signature, methods (`encode_prompt`, `prepare_latents`) and one scheduler; a modular one has blocks that declare what they
take, guiders, and as many schedulers as it likes. What differs is behind `Calls` (`driving/classic.py`, `driving/modular.py`); nothing else asks
which kind a pipeline is.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

from diffusers import ModularPipeline
from torch import Tensor

from ..condition import belongs_to_samples
from .guiders import guider_parameters
from .replacements import reads_global


class OneForAll(str):
    """One of several equal texts, in the place of one that was given for all samples."""


def one_a_prompt(call: dict[str, Any]) -> dict[str, Any]:
    """The call with one text for each of its list of prompts where one stands for all: not all pipelines and blocks repeat it."""
    number = len(call["prompt"]) if isinstance(call.get("prompt"), list) else None
    return {name: [OneForAll(v)] * number if number and isinstance(v, str) and belongs_to_samples(name) else v for name, v in call.items()}


class Calls(ABC):
    """The calls of one pipeline."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    @property
    def name(self) -> str:
        """Of the pipeline, for messages."""
        return type(self.pipeline).__name__

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """What a call takes, by name, as `inspect.signature` has it: the pipeline's own arguments, and what its guiders take beside them."""
        own = self.own_parameters
        return own | {name: parameter for name, parameter in guider_parameters(self.pipeline).items() if name not in own}

    @property
    @abstractmethod
    def own_parameters(self) -> dict[str, inspect.Parameter]:
        """What the pipeline itself takes."""

    @abstractmethod
    def of_a_call(self, arguments: dict[str, Any]) -> set[str]:
        """The names that a call with these arguments reads: a modular pipeline chooses among its blocks by them."""

    @property
    @abstractmethod
    def functions(self) -> list[FunctionType]:
        """The undecorated functions that a call runs, the pipeline's own or its blocks': what they hand on to a scheduler is in their code."""

    @property
    def takes_gradients(self) -> bool:
        """Whether a call differentiates through its denoiser, to move its latents by what it finds. None of its denoiser calls can be left out then, and
        the states at which its steps begin depend on the weights."""
        return any(reads_global(function.__code__, "enable_grad") for function in self.functions)

    @property
    @abstractmethod
    def schedulers(self) -> dict[str, Any]:
        """Those that a call may step, by component name, the main one first."""

    def check_schedulers(self) -> None:
        """Raise a ValueError if there is none."""
        if not self.schedulers:
            raise ValueError(f"{self.name} has no scheduler of its own: {self.whats_missing}.")

    @property
    def main_scheduler(self) -> Any:
        """The first of `schedulers`.

        Raises:
            ValueError: there is none.
        """
        self.check_schedulers()
        return next(iter(self.schedulers.values()))

    @property
    @abstractmethod
    def whats_missing(self) -> str:
        """Why a pipeline of this kind may have no scheduler, or what to do; an end of a sentence."""

    def spread(self, call: dict[str, Any]) -> dict[str, Any]:
        """The call as `run` is given it, with one text for each prompt where one stands for all."""
        return one_a_prompt(call)

    @abstractmethod
    def run(self, call: dict[str, Any]) -> Any:
        """Call the pipeline, without its progress bars, in autograd's own mode.

        Args:
            call: names of `parameters`. The output has final latents where `output_type` is "latent", and is not decoded if the kind allows.

        Returns:
            The pipeline's output; its entry 0 has the latents, images, videos or sounds.
        """

    @abstractmethod
    def clean_up(self) -> None:
        """What the pipeline does at the end of a call, for one that was abandoned."""

    @abstractmethod
    def encoding(self, encode: Callable[..., Any]) -> AbstractContextManager:
        """Context: what turns prompts into embeddings is `encode(original, *args, **kwargs)`; of a pipeline that has nothing of the kind, nothing."""

    @property
    @abstractmethod
    def encodes(self) -> bool:
        """Whether the pipeline has something that `encoding` stands in for."""

    @abstractmethod
    def initial_noise(self, put: Callable[[Tensor], Tensor]) -> AbstractContextManager:
        """Context: `put` gets the noise (B, *D) that a call draws first, and returns what it starts from.

        Raises:
            ValueError: the pipeline draws no noise where it is looked for, found at once or at the end.
        """

    @abstractmethod
    def prepared_latents(self, change: Callable[[Tensor], Tensor]) -> AbstractContextManager:
        """Context: `change` gets the latents (B, *D) that a call's denoising starts from, and gives those in their place."""

    @abstractmethod
    def starts_from_noise(self, arguments: dict[str, Any]) -> bool:
        """Whether a call with these arguments starts from noise alone, which `prepared_latents` finds."""


def calls_of(pipeline) -> Calls:
    """The calls of a pipeline of either kind.

    Raises:
        TypeError: it is no pipeline, such as the name of one.
    """
    from .classic import ClassicCalls
    from .modular import ModularCalls

    if isinstance(pipeline, (str, os.PathLike)):
        raise TypeError(f"A loaded pipeline is needed, got the name {str(pipeline)!r}: DiffusionPipeline.from_pretrained(NAME) loads one.")
    return (ModularCalls if isinstance(pipeline, ModularPipeline) else ClassicCalls)(pipeline)
