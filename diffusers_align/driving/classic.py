"""The calls of a classic pipeline: a `DiffusionPipeline`, whose call has a signature and whose parts are methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .calls import Calls
from .guiders import guided, guider_parameters
from .outputs import arrays_as_tensors, form_asked
from .pipeline_state import quiet
from .replacements import reads_global, replaced, signature_of, with_globals

# Some pipelines have the private name alone.
_ENCODERS = ("encode_prompt", "_encode_prompt")


@contextmanager
def _arrays_without_gradient(name: str) -> Iterator[None]:
    """A sentence where a pipeline makes arrays of what a gradient should come through."""
    try:
        yield
    except RuntimeError as error:
        if "numpy() on Tensor that requires grad" not in str(error):
            raise
        raise ValueError(
            f"{name} of this diffusers makes NumPy arrays of its pictures, so no gradient comes back from them: use what needs rewards alone, not their "
            "gradients, or a newer diffusers, whose pipeline may return tensors."
        ) from error


class ClassicCalls(Calls):
    """See `Calls`."""

    @property
    def whats_missing(self) -> str:
        others = [name for name, component in self.pipeline.components.items() if hasattr(component, "step")]
        if others:
            return f"its parts take their steps by {', '.join(others)} one after the other, so that there is no one chain of states to learn on or to steer"
        return "it takes no steps that could be a policy's, guided or searched over"

    @property
    def own_parameters(self) -> dict[str, inspect.Parameter]:
        return dict(signature_of(type(self.pipeline).__call__).parameters)

    def of_a_call(self, arguments: dict[str, Any]) -> set[str]:
        return set(self.own_parameters)

    @property
    def functions(self) -> list[FunctionType]:
        return [inspect.unwrap(type(self.pipeline).__call__)]

    @property
    def schedulers(self) -> dict[str, Any]:
        scheduler = getattr(self.pipeline, "scheduler", None)
        return {"scheduler": scheduler} if hasattr(scheduler, "step") else {}

    def run(self, call: dict[str, Any]) -> Any:
        settings = {name: call[name] for name in guider_parameters(self.pipeline) if name in call and name not in self.own_parameters}
        own = {name: value for name, value in call.items() if name not in settings}
        arrays = False
        if "output_type" in own:
            form, arrays = form_asked(self.pipeline, own.pop("output_type"))
            own |= form
        with quiet(self.pipeline), guided(self.pipeline, settings), _arrays_without_gradient(self.name):
            if not arrays:
                return self._call(**own)
            with arrays_as_tensors(self.pipeline._execution_device) as finished:
                return finished(self._call(**own))

    def _call(self, **call: Any) -> Any:
        return inspect.unwrap(type(self.pipeline).__call__)(self.pipeline, **call)

    def clean_up(self) -> None:
        self.pipeline.maybe_free_model_hooks()

    @property
    def encodes(self) -> bool:
        return self._encoder is not None

    @property
    def _encoder(self) -> str | None:
        return next((name for name in _ENCODERS if hasattr(self.pipeline, name)), None)

    def encoding(self, encode: Callable[..., Any]):
        return nullcontext() if self._encoder is None else replaced(self.pipeline, self._encoder, encode)

    @contextmanager
    def initial_noise(self, put: Callable[[Tensor], Tensor]) -> Iterator[None]:
        code = getattr(getattr(self.pipeline, "prepare_latents", None), "__code__", None)
        if code is None or not reads_global(code, "randn_tensor"):
            raise ValueError(f"{self.name} draws no initial noise in prepare_latents, so it cannot be replaced.")
        seen: list[bool] = []

        def prepared(prepare: Callable, *args: Any, **kwargs: Any):
            draw = prepare.__globals__["randn_tensor"]

            def drawn(*args: Any, **kwargs: Any) -> Tensor:
                noise = draw(*args, **kwargs)
                seen.append(True)
                return put(noise) if len(seen) == 1 else noise

            return with_globals(prepare, randn_tensor=drawn)(*args, **kwargs)

        with replaced(self.pipeline, "prepare_latents", prepared):
            yield
        if not seen:
            raise ValueError(f"{self.name} drew no initial noise: leave `latents` out of its call.")

    @contextmanager
    def prepared_latents(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        if not hasattr(self.pipeline, "prepare_latents"):
            yield
            return

        def prepared(prepare: Callable, *args: Any, **kwargs: Any):
            leaves, spec = pytree.tree_flatten(prepare(*args, **kwargs))
            return pytree.tree_unflatten([change(leaves[0]), *leaves[1:]], spec)

        with replaced(self.pipeline, "prepare_latents", prepared):
            yield

    def starts_from_noise(self, arguments: dict[str, Any]) -> bool:
        return hasattr(self.pipeline, "prepare_latents") and "strength" not in self.own_parameters
