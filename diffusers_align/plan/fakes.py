"""Models that compute nothing: their weights are fake tensors, which have a shape, a precision and no numbers, and whoever calls them gets zeros.

A pipeline asks its scheduler for numbers at every turn, so it cannot run on fake tensors as a whole. Its models can: all that is large happens inside
them. So each model stands behind a door. Real tensors go in, fake ones run through the model's own code and leave its own graph, and real zeros with an
edge to that graph come out. The pipeline, the driver, checkpointing and the losses around them are the real ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..driving.replacements import InPlace
from .meter import Meter, Work

DOORS = ("forward", "decode", "encode")


class FakeModels:
    """Fake weights, and the doors of the models that have them.

    Args:
        meter: sees what happens behind the doors.
        as_on_gpu: under autocast, operations that CUDA does in float32 are done so, where the CPU does them in half precision.

    Attributes:
        denoisers: names of the models whose rows are counted.
    """

    def __init__(self, meter: Meter, as_on_gpu: bool = True):
        self.meter, self.as_on_gpu, self.denoisers = meter, as_on_gpu, set()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[Any, tuple[Any, Work]] = {}
        self._inside = False

    @contextmanager
    def making(self) -> Iterator[None]:
        """Context: what is made is fake, and `to` gives any module other weights: torch's own swaps their insides, and refuses with some of these."""
        before, nn.Module._apply = nn.Module._apply, _converted
        try:
            with self.mode:
                yield
        finally:
            nn.Module._apply = before

    def put_behind_doors(self, name: str, module: nn.Module) -> None:
        """From now on the module can be called with real tensors."""
        for method in DOORS:
            if callable(original := getattr(module, method, None)):
                module.__dict__[method] = InPlace(partial(self._called, name), original)

    def forget(self) -> None:
        """The models have changed: what calls take is found anew."""
        self._known.clear()

    def convertible(self, module: nn.Module) -> nn.Module:
        """The module, which `to` gives other fake weights also later, when a pipeline casts it."""
        for part in module.modules():
            part.__dict__["_apply"] = partial(_converted, part)
        return module

    def _called(self, name: str, original: Callable, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        given = [leaves[i] for i in places]
        if any(isinstance(x, FakeTensor) for x in given):
            return original(*args, **kwargs)
        if name in self.denoisers and self.meter.work is not None:  # once more where a call is made again on the way back, as `costs.json` has it
            self.meter.work.rows[torch.is_grad_enabled()] += len(given[0])
        if self._inside:
            return original(*args, **kwargs)

        def run(*fakes: Tensor) -> Any:
            own_args, own_kwargs = pytree.tree_unflatten([fakes[places.index(i)] if i in places else leaf for i, leaf in enumerate(leaves)], spec)
            with self.behind(name):
                return original(*own_args, **own_kwargs)

        if torch.is_grad_enabled():
            door = _Door(self, name, run)
            return door.answer(_Through.apply(door, torch.zeros((), requires_grad=True), *given))
        others = [repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]
        return self._once(_kind_of_call(name, original, given, others), name, lambda: run(*map(self.fake, given)))

    def _once(self, key: Any, name: str, run: Callable[[], Any]) -> Any:
        """Without gradients, equal calls take the same, so the second is not walked."""
        if key not in self._known:
            with self.meter.measure() if self.meter.work is None else self.meter.part() as work:
                answer = run()
            with self.meter.unseen():
                self._known[key] = pytree.tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), answer), work
            return real(answer)
        answer, work = self._known[key]
        if self.meter.work is not None:
            with self.named(name):
                self.meter.again(work)
        return real(answer)

    def fake(self, tensor: Tensor, requires_grad: bool = False) -> Tensor:
        """A leaf of the same shape and precision."""
        with self.meter.unseen():
            return self.mode.from_tensor(tensor.detach(), static_shapes=True).detach().requires_grad_(requires_grad)

    def checkpoint(self, module: nn.Module, *args: Any) -> Any:
        """What diffusers' models recompute their blocks with. Modes of functions do not reach the way back, so the block enters it anew."""

        def block(*args: Any) -> Any:
            with self._functions():
                return module(*args)

        return checkpoint(block, *args, use_reentrant=False)

    def _functions(self):
        return _AsOnGPU() if self.as_on_gpu else nullcontext()

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Context: it is this model that takes memory."""
        model, self.meter.model = self.meter.model, name
        try:
            yield
        finally:
            self.meter.model = model

    @contextmanager
    def behind(self, name: str) -> Iterator[None]:
        """Context: on the fake side of a door."""
        was, self._inside = self._inside, True
        try:
            with self.named(name), self._functions(), self.mode, self.meter.watch():
                yield
        finally:
            self._inside = was


def _converted(module: nn.Module, convert: Callable, recurse: bool = True) -> nn.Module:
    known: dict[int, Tensor] = {}  # shared weights stay so
    for part in module.modules() if recurse else [module]:
        for name, tensor in (*part.named_parameters("", False, False), *part.named_buffers("", False, False)):
            if id(tensor) not in known:
                found = convert(tensor.detach())
                known[id(tensor)] = tensor if found.dtype == tensor.dtype else _like(tensor, found)
            setattr(part, name, known[id(tensor)])
    return module


def _like(tensor: Tensor, found: Tensor) -> Tensor:
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


def _kind_of_call(name: str, original: Callable, given: list[Tensor], others: list[str]) -> tuple:
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    dtype = getattr(getattr(original, "__self__", None), "dtype", None)
    return (name, original.__name__, autocast, dtype, *((x.shape, x.dtype) for x in given), *others)


def real(tree: Any) -> Any:
    """Zeros in the place of fake tensors, also in objects that hold some."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.zeros(leaf.shape, dtype=leaf.dtype)
        if any(isinstance(value, Tensor) for value in getattr(leaf, "__dict__", {}).values()):
            leaf = copy.copy(leaf)
            leaf.__dict__.update({name: of(value) for name, value in leaf.__dict__.items()})
        return leaf

    return pytree.tree_map(of, tree)


class _Door:
    """A call with gradients: the fake graph on its far side, and where its tensors belong in the answer."""

    def __init__(self, models: FakeModels, name: str, run: Callable):
        self.models, self.name, self.run = models, name, run
        self.leaves: list[Any] = []
        self.spec: Any = None

    def open(self, fakes: list[Tensor]) -> list[Tensor]:
        """The fake tensors of the model's answer."""
        with torch.enable_grad():
            self.leaves, self.spec = pytree.tree_flatten(self.run(*fakes))
        found = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return found

    def answer(self, reals: tuple[Tensor, ...]) -> Any:
        """The model's answer with these in the place of its tensors."""
        tensors = iter(reals)
        return pytree.tree_unflatten([next(tensors) if leaf is None else leaf for leaf in self.leaves], self.spec)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, door: _Door, anchor: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.door = door
        ctx.fakes = [door.models.fake(x, needs) for x, needs in zip(given, ctx.needs_input_grad[2:])]
        ctx.outputs = door.open(ctx.fakes)
        with door.models.meter.unseen():
            reals = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in ctx.outputs)
        ctx.mark_non_differentiable(*(real for real, x in zip(reals, ctx.outputs) if not x.requires_grad))
        return reals

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        models, outputs = ctx.door.models, [x for x in ctx.outputs if x.requires_grad]
        ctx.outputs = None
        with models.behind(ctx.door.name):
            own = [torch.empty_like(x) for x in outputs]
            torch.autograd.backward(outputs, own)
        return None, None, *(torch.zeros(x.shape, dtype=x.dtype) if x.requires_grad else None for x in ctx.fakes)


# What CUDA's autocast does in float32 and the CPU's does not, of what models do.
_SINGLE = {
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.softplus, F.normalize, torch.softmax, torch.exp, torch.pow, torch.rsqrt, torch.reciprocal,
    torch.sum, torch.cumsum, torch.norm, torch.prod, torch.Tensor.softmax, torch.Tensor.exp, torch.Tensor.pow, torch.Tensor.__pow__, torch.Tensor.rsqrt,
    torch.Tensor.reciprocal, torch.Tensor.sum, torch.Tensor.cumsum, torch.Tensor.norm, torch.Tensor.prod,
}  # fmt: skip


class _AsOnGPU(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _SINGLE and torch.is_autocast_enabled("cpu"):
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, (args, kwargs))
        return function(*args, **kwargs)
