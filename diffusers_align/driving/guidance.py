"""What switches a pipeline's guidance off, found out by trying which call makes the fewest denoiser rows a sample.

Guidance evaluates the denoiser on more rows than a sample has: without a prompt, with perturbed attention, without the source picture. Pipelines
switch it off by a scale (`guidance_scale`, `true_cfg_scale`), by several together (`guidance_scale` and `pag_scale`), or by their guider, a component.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..condition import Condition
from .replacements import held
from .scheduler_hook import Step

if TYPE_CHECKING:
    from .driver import Driver

# Not the scale that a distilled model takes as an input, nor that of rescaling.
_SCALE = re.compile(r"(?<!embedded_)(guidance|cfg|pag|sag)_scale$")
_FIRST = ("true_cfg_scale", "guidance_scale")


@dataclass(frozen=True)
class Unguided:
    """A call without guidance: `arguments` of it, and whether its guider components must be disabled."""

    arguments: dict[str, Any] = field(default_factory=dict)
    guiders: bool = False


class GuidanceSwitch:
    """Finds what switches the guidance of a driver's pipeline off, once for each kind of call."""

    def __init__(self, driver: Driver):
        self.driver = driver
        self._known: dict[tuple, Unguided] = {}

    def off(self, condition: Condition) -> Unguided:
        """For calls like that of `condition`; nothing where they are not guided.

        Raises:
            ValueError: nothing does. What every trial call raises comes through.
        """
        negative = sorted(name for name in condition.per_sample if name.startswith("negative_"))
        key = (*(str(condition.kwargs.get(name)) for name in (*self._scales(), "negative_prompt")), *negative)
        if key not in self._known:
            self._known[key] = self._found(condition.select([0]))
        return self._known[key]

    @contextmanager
    def without(self, condition: Condition) -> Iterator[dict[str, Any]]:
        """Context: the pipeline's guiders are disabled if need be. Gives the arguments that the calls within must have."""
        unguided = self.off(condition)
        with self._guiders_disabled(unguided.guiders):
            yield unguided.arguments

    def _scales(self) -> list[str]:
        names = [name for name in self.driver.parameters if _SCALE.search(name)]
        return sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))

    def _tries(self) -> Iterator[Unguided]:
        """The calls to try: as it is, with few arguments changed before those with more, with the guiders disabled."""
        yield Unguided()
        names = self._scales()
        for number in range(1, min(len(names), 3) + 1):
            for chosen in itertools.combinations(names, number):
                for values in itertools.product((1.0, 0.0), repeat=number):
                    yield Unguided(dict(zip(chosen, values)))
        if self._guiders():
            yield Unguided(guiders=True)

    def _found(self, single: Condition) -> Unguided:
        rows, errors = {}, []
        for unguided in self._tries():
            try:
                with self._guiders_disabled(unguided.guiders):
                    number = self._rows_a_step(single, unguided.arguments)
            except (ValueError, TypeError, AssertionError, RuntimeError) as error:
                if of_the_device(error):
                    raise
                errors.append(error)
                continue
            if number == 1:
                return unguided
            rows.setdefault(number, unguided)
        if not rows:
            raise errors[0]
        # Some networks are asked twice, guided or not; what asks them least is then without guidance.
        fewest = min(rows)
        if rows[fewest] != Unguided():
            return rows[fewest]
        raise ValueError(f"Found no argument of {type(self.driver.pipeline).__name__} that switches guidance off; call predict(..., guidance=True).")

    @torch.no_grad()
    def _rows_a_step(self, single: Condition, arguments: dict[str, Any]) -> int:
        rows, in_first = [], [True]

        def count(module, args, kwargs):
            first = args[0] if args else next(iter(kwargs.values()))
            if in_first[0]:
                rows.append(len(first))

        def step(step: Step) -> Tensor:
            in_first[0] = False
            step.skip()
            return step.sample

        handles = [module.register_forward_pre_hook(count, with_kwargs=True) for module in self.driver.denoisers.values()]
        try:
            self.driver.drive(single, step, needs_denoiser=lambda k: k == 0, **arguments)
        finally:
            for handle in handles:
                handle.remove()
        return sum(rows)

    def _guiders(self) -> list[Any]:
        components = self.driver.pipeline.components
        return [c for name, c in components.items() if name.endswith("guider") and hasattr(c, "disable") and hasattr(c, "_enabled")]

    @contextmanager
    def _guiders_disabled(self, disabled: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for guider in self._guiders() if disabled else ():
                stack.enter_context(held(guider, "_enabled", False))
            yield


def of_the_device(error: Exception) -> bool:
    """Whether an error is the device's own (memory, a failed launch, a lost process), which says nothing of what a pipeline takes."""
    kinds = tuple(kind for name in ("OutOfMemoryError", "AcceleratorError") if (kind := getattr(torch, name, None)) is not None)
    return isinstance(error, kinds) or any(word in str(error) for word in ("CUDA", "cuDNN", "CUBLAS", "HIP error", "NCCL", "DefaultCPUAllocator"))
