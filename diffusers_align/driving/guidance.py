"""What switches a pipeline's guidance off, found out by trying which call makes the fewest denoiser rows a sample.

Guidance evaluates the denoiser on more rows than a sample has: without a prompt, with perturbed attention, without the source picture. Pipelines
switch it off by a scale (`guidance_scale`, `true_cfg_scale`), by several together (`guidance_scale` and `pag_scale`), or by `guidance=False` to
their guiders (`guiders`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..condition import Condition
from .guiders import state_of
from .of_driver import OfDriver
from .scheduler_hook import Step

if TYPE_CHECKING:
    from .driver import Driver

# Not the scale that a distilled model takes as an input, nor that of rescaling.
_SCALE = re.compile(r"(?<!embedded_)(guidance|cfg|pag|sag)_scale$")
_FIRST = ("true_cfg_scale", "guidance_scale")


class GuidanceSwitch(OfDriver):
    """Finds the arguments that switch the guidance of a driver's pipeline off, once for each kind of call."""

    def __init__(self, driver: Driver):
        super().__init__(driver)
        self._known: dict[tuple, dict[str, Any]] = {}

    def off(self, condition: Condition) -> dict[str, Any]:
        """For calls like that of `condition`; {} where they are not guided.

        Raises:
            ValueError: none does. What every trial call raises comes through.
        """
        negative = sorted(name for name in condition.per_sample if name.startswith("negative_"))
        asked = [str(condition.kwargs.get(name)) for name in ("guidance", *self._scales(), "negative_prompt")]
        key = (*asked, *negative, str(state_of(self.driver.pipeline)))
        if key not in self._known:
            self._known[key] = self._found(condition.select([0]))
        return self._known[key]

    def _scales(self) -> list[str]:
        names = [name for name in self.driver.parameters if _SCALE.search(name)]
        return sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))

    def _tries(self) -> Iterator[dict[str, Any]]:
        """The call as it is, without guiders, and with other scales: few of them before more."""
        yield {}
        if "guidance" in self.driver.parameters:
            yield {"guidance": False}
        names = self._scales()
        for number in range(1, len(names) + 1):
            for chosen in itertools.combinations(names, number):
                mixed = [(1.0, 0.0), (0.0, 1.0)] if number == 2 else []
                for values in ([1.0] * number, *mixed, [0.0] * number):
                    yield dict(zip(chosen, values))

    def _found(self, single: Condition) -> dict[str, Any]:
        rows, errors = {}, []
        for arguments in self._tries():
            try:
                number = self._rows_a_step(single, arguments)
            except Exception as error:  # whatever a pipeline makes of an argument that it does not understand
                if of_the_device(error):
                    raise
                errors.append(error)
                continue
            if number == 1:
                return arguments
            rows.setdefault(number, arguments)
        if not rows:
            raise errors[0]
        # Some networks are asked twice, guided or not: what asks them least is then without guidance.
        if least := rows[min(rows)]:
            return least
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


def of_the_device(error: Exception) -> bool:
    """Whether an error is the device's own (memory, a failed launch, a lost process), which says nothing of what a pipeline takes."""
    kinds = tuple(kind for name in ("OutOfMemoryError", "AcceleratorError") if (kind := getattr(torch, name, None)) is not None)
    return isinstance(error, kinds) or any(word in str(error) for word in ("CUDA", "cuDNN", "CUBLAS", "HIP error", "NCCL", "DefaultCPUAllocator"))
