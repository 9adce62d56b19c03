r"""The pretrained and the fine-tuned model at once: any stock pipeline that carries a LoRA, sampled between them or beyond.

At each denoiser call the adapter is on for one pass and off for another, and the two predictions are combined,

$$ \hat v = v_{\text{base}} + w_k\, (v_{\text{tuned}} - v_{\text{base}}) $$

w = 1 is the fine-tuned model, w = 0 the pretrained one. 0 < w < 1 trades what training added, faults included, against the pretrained
model's variety; w > 1 extrapolates. A weight that rises along the chain lets the pretrained model lay out the picture and
the fine-tuned one finish it: annealed importance guidance (https://arxiv.org/abs/2409.06493; its code, NVIDIA/NeMo-Aligner, has the
schedules `linear`, `power_2`, `step_0.6`). A guider of diffusers does the arithmetic in its own way, with the fine-tuned prediction as its
conditional one and the pretrained as its unconditional one.

Scaling the LoRA's weights themselves (DRaFT, https://arxiv.org/abs/2309.17400; `pipe.set_adapters(name, w)`) costs one pass, and is another
interpolation: linear in the weights, not in the prediction.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import lora
from ..checks.ranges import NonNegative, Probability, check_call, check_value
from ..driving.arguments import check_known
from ..driving.denoisers import denoisers
from ..driving.prompt_memory import PromptMemory
from ..driving.replacements import replaced
from ..driving.scheduler_hook import Step, drive
from .base import WrappedPipeline
from .guided_sampling import first_step
from .noise_grid import position

Schedule = Callable[[float], float]


class AdapterGuidancePipeline(WrappedPipeline):
    """A stock pipeline that mixes its model with and without the LoRA that it carries. It needs no reward.

    >>> pipe = AdapterGuidancePipeline(DiffusionPipeline.from_pretrained(...))  # doctest: +SKIP
    >>> pipe.load_lora_weights("my-lora")  # doctest: +SKIP
    >>> pipe("a fox", adapter_scale="linear").images  # doctest: +SKIP
    """

    @torch.no_grad()
    def __call__(self, prompt: str | list[str] | None = None, *, adapter_scale: float | str | Schedule | None = None, guider=None, **arguments: Any):
        """Sample from the mixture.

        Args:
            adapter_scale: w, 1 if absent: a number, `linear` (k / K at solver step k of K), `power_P` ((k / K)^P), `step_F` (0 before the fraction F
                of the steps, then 1), or a function of k / K.
            guider: in its place, a guider of `diffusers.guiders` that works on two predictions: classifier-free guidance, whose scale is w, APG,
                CFG-Zero*, ... Its `start` and `stop` count; outside of them it is the fine-tuned model. It is not changed.
            prompt, arguments: the stock call's.

        Returns:
            The stock output with `denoiser_calls`, the passes made of models that carry the LoRA: one where w is 0 or 1, otherwise two.
            Those are the stock pipeline's with and without the LoRA, bit for bit.

        Raises:
            ValueError: no LoRA is active, or it is fused, or reaches beyond the denoisers; a weight or a guider that cannot be used; an argument that the
                stock call lacks.
        """
        adapted = _adapted(self.pipeline)
        if adapter_scale is not None and guider is not None:
            raise ValueError("Give adapter_scale or guider: classifier-free guidance's guidance_scale is the adapter's scale.")
        check_known(type(self).__name__, type(self.pipeline).__name__, arguments, self.calls.parameters)
        check_call(arguments)
        call = {**arguments, "prompt": prompt} if "prompt" in self.calls.parameters else arguments
        memory = PromptMemory()  # of this call: text encoders may change
        mixture = _Mixture(self._rule(1.0 if adapter_scale is None else adapter_scale, guider, call, memory))
        with ExitStack() as stack:
            bar = stack.enter_context(self.progress_bar(total=1))
            for name, module in adapted.items():
                stack.enter_context(replaced(module, "forward", partial(mixture.denoise, name, module)))
            output = drive(self.pipeline, partial(mixture.on_step, bar), call, memory=memory)
        return self.extended(output, denoiser_calls=mixture.calls)

    def _rule(self, adapter_scale: float | str | Schedule, guider, call: dict[str, Any], memory: PromptMemory) -> _Interpolation | _Guided:
        if guider is not None:
            _check_guider(guider)
        elif not callable(adapter_scale) and not isinstance(adapter_scale, str):
            check_value("adapter_scale", adapter_scale, float)
            return _Interpolation(lambda fraction: float(adapter_scale), num_steps=1)
        step = first_step(self.pipeline, call, memory)
        timesteps = step.scheduler.timesteps[position(step.scheduler, step.timestep) :]
        if guider is not None:
            return _Guided(guider, timesteps)
        return _Interpolation(adapter_scale if callable(adapter_scale) else schedule(adapter_scale), len(timesteps))


def schedule(name: str) -> Schedule:
    """The schedule `linear`, `power_P` or `step_F` of annealed importance guidance: the fraction of the steps taken to w.

    Raises:
        ValueError: there is none of that name.
    """
    kind, _, number = name.partition("_")
    try:
        found = {"linear": lambda: lambda s: s, "power": lambda p: lambda s: s**p, "step": lambda f: lambda s: float(s >= f)}[kind]
        if number:
            check_value(name, float(number), Probability if kind == "step" else NonNegative)
        return found(float(number)) if number else found()
    except (KeyError, ValueError, TypeError):
        raise ValueError(
            f"adapter_scale must be a number, a function, linear, power_P or step_F (such as power_2, step_0.6; P from 0 on, F from 0 to 1), got {name!r}."
        ) from None


class _Interpolation:
    """base + w (tuned - base), w by the fraction k / K of the steps taken."""

    def __init__(self, weight: Schedule, num_steps: int):
        self.weight, self.num_steps = weight, num_steps

    def at(self, k: int) -> tuple[bool, bool]:
        """Turn to step k; whether it takes the fine-tuned model, and the pretrained one."""
        self.w = float(self.weight(k / self.num_steps))
        if not abs(self.w) < float("inf"):
            raise ValueError(f"adapter_scale must be finite, got {self.w} at step {k}.")
        return self.w != 0, self.w != 1

    def __call__(self, slot: tuple, tuned: Tensor, base: Tensor | None) -> Tensor:
        """The prediction; `base` is None where `at` has not asked for it."""
        return tuned if base is None else base + self.w * (tuned - base)


class _Guided:
    """The same by a guider. Those with a memory (APG's momentum) get one for each call of a step and each of its outputs."""

    def __init__(self, guider, timesteps: Tensor):
        self.guider, self.timesteps, self.copies, self.state = copy.deepcopy(guider), timesteps, {}, None

    def at(self, k: int) -> tuple[bool, bool]:
        self.state = {"step": k, "num_inference_steps": len(self.timesteps), "timestep": self.timesteps[min(k, len(self.timesteps) - 1)]}
        self.guider.set_state(**self.state)
        return True, self.guider.num_conditions > 1

    def __call__(self, slot: tuple, tuned: Tensor, base: Tensor | None) -> Tensor:
        guider = self.copies.setdefault(slot, copy.deepcopy(self.guider))
        guider.set_state(**self.state)
        return guider.forward(tuned, base).pred


class _Mixture:
    """The hooks of one call: around each denoiser call, and at each solver step."""

    def __init__(self, rule: _Interpolation | _Guided):
        self.rule, self.k, self.calls, self.in_step = rule, 0, 0, 0

    def denoise(self, name: str, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any):
        needs_tuned, needs_base = self.rule.at(self.k)
        slot, self.in_step = (name, self.in_step), self.in_step + 1
        self.calls += needs_tuned + needs_base
        base = None
        if needs_base:
            with lora.disabled([module]):
                base = forward(*args, **kwargs)
        if not needs_tuned:
            return base
        leaves, spec = pytree.tree_flatten(forward(*args, **kwargs))
        others = pytree.tree_leaves(base) if needs_base else [None] * len(leaves)
        mixed = [self.rule((*slot, i), *pair) if isinstance(pair[0], Tensor) else pair[0] for i, pair in enumerate(zip(leaves, others))]
        return pytree.tree_unflatten(mixed, spec)

    def on_step(self, bar, step: Step) -> None:
        if step.child == 0:
            self.k, self.in_step = step.k + 1, 0
            bar.total = len(step.scheduler.timesteps)
            bar.update(step.k + 1 - bar.n)


def _active(module: nn.Module) -> list[BaseTunerLayer]:
    return [m for m in module.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters and set(m.active_adapters) & set(m.lora_A)]


def _adapted(pipeline) -> dict[str, nn.Module]:
    """The denoisers that carry an active LoRA.

    Raises:
        ValueError: none does, or the LoRA cannot be switched off call by call.
    """
    found = {name: module for name, module in denoisers(pipeline).items() if _active(module)}
    if not found:
        raise ValueError(f"No LoRA is active in this {type(pipeline).__name__}'s {', '.join(denoisers(pipeline))}: load one with pipe.load_lora_weights.")
    others = [name for name, module in pipeline.components.items() if isinstance(module, nn.Module) and name not in found and _active(module)]
    if others:
        raise ValueError(
            f"The LoRA changes {', '.join(others)} as well, which the pretrained and the fine-tuned denoiser would share: load its denoiser's part alone."
        )
    for name, module in found.items():
        if any(layer.merged for layer in _active(module)):
            raise ValueError(f"The LoRA is fused into the {name}, so it cannot be switched off: call pipe.unfuse_lora().")
        if getattr(module, "is_cache_enabled", False):
            raise ValueError(f"The {name} caches its activations, which two passes a step would mix up: call pipe.{name}.disable_cache().")
    return found


def _check_guider(guider) -> None:
    from diffusers.guiders import BaseGuidance

    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"guider must be one of diffusers.guiders, got a {type(guider).__name__}.")
    expected = list(inspect.signature(guider.forward).parameters)
    if expected != ["pred_cond", "pred_uncond"]:
        raise ValueError(
            f"{type(guider).__name__} takes {', '.join(expected)}, but there are two predictions here: take one on a pair, such as ClassifierFreeGuidance."
        )
