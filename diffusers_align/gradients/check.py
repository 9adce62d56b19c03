"""Whether reward gradients reach the trained parameters, and if not, which link of the chain is cut.

The chain is parameters -> denoiser -> scheduler -> decoder -> reward. Each link can be cut without an error: by `no_grad` somewhere
inside, by a clamp that saturates, by pictures that leave for NumPy or PIL. Training would then go on with the gradient 0.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks.ranges import checked
from ..condition import Condition
from ..policy import Policy
from .rollout import DifferentiableRollout, count_steps, differentiable_rollout

# Powers of two by which a loss is scaled on its way back through float16, the largest first that does not overflow.
EXPONENTS = (16, 12, 8, 4, 0, -4)


class GradientError(ValueError):
    """Reward gradients do not reach the trained parameters; the message names the link that is cut, and what to do."""


class UnscoredError(GradientError):
    """The reward could score none of the images, so the check says nothing."""


@checked
def check_gradient(policy: Policy, condition: Condition, reward: Callable[[Tensor], Tensor], **rollout_options: Any) -> dict[str, float]:
    """Roll out, score and go back once; call it before training.

    Args:
        reward: images in [0, 1] to (B,), the prompts bound: `lambda images: score(reward, images, prompts)["reward"]`.
        rollout_options: those of `differentiable_rollout`, `grad_steps` among them.

    Returns:
        The norms of the sum of rewards' gradient with respect to `images`, `latents`, the last `output` of the denoiser and the
        trainable `parameters`.

    Raises:
        UnscoredError: the reward is NaN for all images. Where it is for some, the others are checked.
        GradientError: a link is cut.
    """
    _check_settings(policy)
    with _autograd_off(_modules(policy, reward)) as culprits:
        rollout = differentiable_rollout(policy, condition, **rollout_options)
        rewards = _rewards(reward, rollout)
    _check_graph(policy, rollout, rewards, culprits)
    if rewards.isnan().all():
        raise UnscoredError(f"The reward is NaN for all {len(rewards)} images of the check, prompts {condition.prompts}, so there is no gradient to look at.")
    _check_solver(policy, rollout)
    return _check_values(policy, rollout, rewards)


def _modules(policy: Policy, reward: Callable) -> dict[str, nn.Module]:
    """Decoder and reward: what runs with autograd on throughout."""
    found = {"vae": getattr(policy.pipeline, "vae", None), "reward": reward}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def _check_settings(policy: Policy) -> None:
    if not policy.trainable_parameters():
        raise GradientError("No parameter is trainable: call policy.add_lora() before the check.")
    if cached := [name for name, module in policy.denoisers.items() if getattr(module, "is_cache_enabled", False)]:
        raise GradientError(
            f"The cache of the {cached[0]} is on: it hands out outputs of earlier steps, and their gradients with them. Call {cached[0]}.disable_cache()."
        )


def _rewards(reward: Callable, rollout: DifferentiableRollout) -> Tensor:
    if not isinstance(rollout.images, Tensor):
        raise GradientError(f"The pipeline returned {type(rollout.images).__name__} instead of tensors: it has no output_type 'pt', and PIL has no gradient.")
    try:
        rewards = reward(rollout.images)
    except RuntimeError as error:
        if "requires grad" not in str(error):
            raise
        raise GradientError(f"The reward takes the images out of the graph, to NumPy or PIL: {error} Preprocess with torch operations instead.") from error
    if not isinstance(rewards, Tensor):
        raise GradientError(f"The reward returned a {type(rewards).__name__}, not a tensor: a number has no gradient.")
    return rewards


def _check_graph(policy: Policy, rollout: DifferentiableRollout, rewards: Tensor, culprits: list[str]) -> None:
    """Name the first link, from the parameters on, behind which nothing requires a gradient."""
    if not rollout.steps:
        raise GradientError("There are no gradient steps: grad_steps is empty.")
    if not rollout.steps[max(rollout.steps)].model_output.requires_grad:
        inside = _inside_denoiser(policy, rollout.condition)
        because = f": {inside[0]}" if inside else " (its parameters are not used, or its output is detached)"
        raise GradientError(f"The denoiser's output has no graph{because}.")
    if not rollout.latents.requires_grad:
        raise GradientError(
            f"The denoiser's output has a graph, the latents have none: {type(policy.stock_scheduler).__name__}.step or the pipeline's loop cuts it."
        )
    if not rollout.images.requires_grad:
        cause = next((c for c in culprits if c.startswith("vae")), "the decoder detaches them, or the pipeline does after it")
        raise GradientError(f"The latents have a graph, the images have none: {cause}.")
    if not rewards.requires_grad:
        cause = next((c for c in culprits if c.startswith("reward")), "it detaches them, runs under torch.no_grad, or goes through NumPy or PIL")
        raise GradientError(f"The images have a graph, the reward has none: {cause}.")


def _inside_denoiser(policy: Policy, condition: Condition) -> list[str]:
    """Where autograd goes off in the denoiser, by a roll-out in which it should be on at every step."""
    every = range(count_steps(policy, condition))
    with _autograd_off(policy.denoisers) as culprits:
        differentiable_rollout(policy, condition, grad_steps=every, checkpoint=False, decode=False)
    return culprits


def _check_solver(policy: Policy, rollout: DifferentiableRollout) -> None:
    """Each element of the model's output moves the step's result and the predicted clean sample, unless the solver clips."""
    for k, step in rollout.steps.items():
        for result in (step.clean, step.next_state):
            if result is None or result.shape != step.model_output.shape:
                continue
            (slope,) = torch.autograd.grad(result.sum(), step.model_output, retain_graph=True, allow_unused=True)
            lost = 1.0 if slope is None else float((slope == 0).double().mean())
            if lost > 0:
                raise GradientError(
                    f"{lost:.1%} of the denoiser's output has no influence at solver step {k}: {type(policy.stock_scheduler).__name__} clips the clean "
                    "sample. Latents must not be clipped: set clip_sample=False and thresholding=False in the scheduler's config."
                )


def _check_values(policy: Policy, rollout: DifferentiableRollout, rewards: Tensor) -> dict[str, float]:
    output, parameters = rollout.steps[max(rollout.steps)].model_output, policy.trainable_parameters()
    try:
        inputs, half = [rollout.images, rollout.latents, output, *parameters], torch.float16 in (rollout.images.dtype, rollout.latents.dtype, output.dtype)
        found = scaled_gradients(rewards[~rewards.isnan()].sum(), inputs, half=half)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise GradientError("Reentrant checkpointing lies on the way from the reward: use torch.utils.checkpoint with use_reentrant=False.") from error
    norms = {"images": _norm(found[:1]), "latents": _norm(found[1:2]), "output": _norm(found[2:3]), "parameters": _norm(found[3:])}
    causes = {
        "images": "the reward is flat there: it rounds, saturates, or does not look at the images",
        "latents": "every pixel lies beyond [0, 1], where the clamp passes nothing",
        "output": "the scheduler's later steps do not use it",
        "parameters": "the denoiser detaches them, or reentrant checkpointing (use_reentrant=True) drops them",
    }
    for name, norm in norms.items():
        if not norm > 0 or norm == float("inf"):
            reason = causes[name] if norm == 0 else "an overflow, or a NaN in the reward or behind it; try float32"
            raise GradientError(f"The reward's gradient with respect to the {name} is {norm:g}: {reason}.")
    return norms


def scaled_gradients(total: Tensor, inputs: list[Tensor], *, half: bool) -> list[Tensor | None]:
    """The gradients of a number, None where it does not depend on an input.

    Args:
        total: (), with its graph.
        half: some of it is in float16, where small gradients vanish: then it is scaled on the way back, as a loss scaler does, by the
            largest factor with which the least overflows, and the gradients come in float32.
    """
    if not half:
        return list(torch.autograd.grad(total, inputs, allow_unused=True))
    best, fewest = [], None
    for exponent in EXPONENTS:
        with torch.enable_grad():
            scaled = total * 2.0**exponent
        found = torch.autograd.grad(scaled, inputs, allow_unused=True, retain_graph=True)
        lost = sum(int((~g.isfinite()).sum()) for g in found if g is not None)
        if fewest is None or lost < fewest:
            best, fewest = [None if g is None else g.float() * 2.0**-exponent for g in found], lost
        if not lost:
            break
    return best


def _norm(gradients: tuple[Tensor | None, ...]) -> float:
    return float(sum(g.detach().double().square().sum() for g in gradients if g is not None)) ** 0.5


@contextmanager
def _autograd_off(roots: dict[str, nn.Module]) -> Iterator[list[str]]:
    """Collects, in words, which modules call their layers with autograd off."""
    found: list[str] = []
    entered: list[tuple[str, bool]] = []

    def enter(root: str, name: str):
        def hook(module, args):
            caller, was_on = entered[-1] if entered else (root, True)
            if was_on and not torch.is_grad_enabled():
                inside_checkpoint = any(f.name == "forward" and f.filename.endswith("checkpoint.py") for f in traceback.extract_stack())
                how = "reentrant checkpointing (use_reentrant=True)" if inside_checkpoint else "torch.no_grad or inference_mode"
                found.append(f"{caller} runs its layers under {how}")
            entered.append((f"{root}.{name}".rstrip("."), torch.is_grad_enabled()))

        return hook

    handles = []
    for root, module in roots.items():
        for name, layer in module.named_modules():
            handles.append(layer.register_forward_pre_hook(enter(root, name)))
            handles.append(layer.register_forward_hook(lambda *_: entered.pop() and None, always_call=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
