"""The arguments of a pipeline's call, as users give them: refused where they would be lost, overwritten or taken for something else."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ..checks.given_names import did_you_mean
from ..checks.ranges import check_call
from ..condition import Condition, belongs_to_samples, counts_samples, is_embedding, number_of_samples
from ..schedulers import DDIMSDEScheduler
from .replacements import signature_of

# What a policy's methods set in each call, and the value that says nothing else. None is the pipeline's own default for all of them.
_ONE_OUTPUT = (1, "it makes one sample a prompt; repeat the prompts, with other seeds.")
_SET_BY_POLICY = {
    "prompt": (None, "prompts are the first argument."),
    "generator": (None, "seeds= fixes the draws of each sample."),
    "output_type": (None, "roll-outs keep latents, and decode makes pictures of them."),
    "return_dict": (True, "the policy reads the output."),
    "eta": (None, "the noise of the steps is the SDE scheduler's: Policy(pipe, sde_twin(pipe.scheduler, eta=...)), or deterministic=True."),
    **dict.fromkeys(("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"), _ONE_OUTPUT),
}


def check_arguments(pipeline: str, accepted: Collection[str], shared: dict[str, Any], per_sample: dict[str, Any], given: Collection[str]) -> None:
    """Refuse arguments of a call that would be overwritten or lost.

    Args:
        pipeline: its name, for messages.
        accepted: the names that its call takes.
        shared, per_sample: the arguments; those of `shared` that are not `given` with this call are defaults, which `per_sample` overrides.

    Raises:
        ValueError: an argument that the call lacks, that a policy sets itself, or that is given twice.
    """
    if not isinstance(per_sample, dict):
        raise ValueError(f'per_sample is a dict of arguments by name, {{"image": [...]}}, got a {type(per_sample).__name__}.')
    if twice := sorted(set(per_sample) & set(given)):
        raise ValueError(f"{', '.join(twice)}: given for all samples and in per_sample. Give it once.")
    everything = {**shared, **per_sample}
    for name in sorted(set(everything) & set(_SET_BY_POLICY)):
        harmless, reason = _SET_BY_POLICY[name]
        if everything[name] is not None and everything[name] is not harmless:
            raise ValueError(f"{name} cannot be an argument of a policy's call: {reason}")
    check_number(everything, accepted)
    check_call(everything)
    if unknown := sorted(set(everything) - set(accepted)):
        names = [name for name in accepted if name not in ("self", "args", "kwargs")]
        near = "".join(did_you_mean(name, names) for name in unknown)
        raise ValueError(f"{pipeline}'s call has no {', '.join(unknown)}.{near} It takes {', '.join(names)}.")
    if (images := per_sample.get("ip_adapter_image")) is not None and len(images) > 1:
        raise ValueError(
            "ip_adapter_image cannot be per_sample: pipelines take several images of an adapter as all of one prompt's. Give ip_adapter_image_embeds, "
            "for each sample what pipeline.prepare_ip_adapter_image_embeds makes of its image."
        )


# Arguments of stock calls that put a schedule of one's own in the place of the scheduler's.
_SCHEDULES = ("timesteps", "sigmas")


def own_levels(call: dict[str, Any]) -> dict[str, Any]:
    """The schedule of its own that a call has, which a twin on a table of timesteps does not take; {} if it has none."""
    return {name: call[name] for name in _SCHEDULES if call.get(name) is not None}


def check_levels(call: dict[str, Any], scheduler: Any, stock: Any) -> None:
    """Refuse a schedule that the policy's scheduler does not take.

    Args:
        stock: what the pipeline came with.

    Raises:
        ValueError: there is one.
    """
    if not isinstance(scheduler, DDIMSDEScheduler):  # others take what theirs takes, and say so
        return
    for name in own_levels(call):
        known = signature_of(type(stock).set_timesteps).parameters
        if name in known and hasattr(stock, "sigmas"):
            what_to_do = f"say them where the policy is made, Policy(pipe, {name}=...), or give it sde_twin(pipe.scheduler, by_sigmas=True)"
        else:
            what_to_do = (
                f"give num_inference_steps in their place, or the pipeline a scheduler that takes {name} and has levels of its own: "
                "pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config), before the policy is made"
            )
        raise ValueError(f"A policy on a {type(stock).__name__} walks its table in even steps, and takes no {name} of one's own: {what_to_do}.")


def check_known(who: str, pipeline: str, given: Collection[str], accepted: Collection[str]) -> None:
    """Refuse arguments that the call of a stock pipeline lacks: some take anything by keyword, and leave what they do not know unread.

    Args:
        who: what has been called, around the pipeline.

    Raises:
        ValueError: there is one.
    """
    if unknown := sorted({*given} - {*accepted, "output_type"}):  # every call is asked for a form of its output
        raise ValueError(f"Neither {who} nor {pipeline} takes {', '.join(unknown)}.")


def check_number(given: Collection[str], accepted: Collection[str]) -> None:
    """Refuse a number of samples that would be overwritten.

    Raises:
        ValueError: `batch_size` of a call that it tells how many samples to make.
    """
    if "batch_size" in given and counts_samples(accepted):
        raise ValueError("batch_size cannot be an argument of the call: it makes a sample for each prompt, which may be empty; give as many prompts, or seeds.")


def checked_prompts(prompts: str | Iterable[str]) -> list[str]:
    """Prompts as a list.

    Raises:
        ValueError: none, or something else than strings.
    """
    if not isinstance(prompts, Iterable):
        raise ValueError(f"Prompts are a list of strings, got {prompts!r}.")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("No prompts: give at least one.")
    if strange := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ValueError(f"Prompts are strings, got {strange[0]!r}.")
    return prompts


def unknown_prompts(pipeline: str, accepted: Collection[str], shared: dict[str, Any], per_sample: dict[str, Any], seeds: list[int] | None) -> list[str]:
    """As many empty strings as a call has samples that needs no prompts: embeddings stand in their place, or the pipeline takes none.

    Raises:
        ValueError: the pipeline needs prompts, or nothing says how many samples there are.
    """
    own = {name: value for name, value in shared.items() if value is not None and belongs_to_samples(name)} | per_sample
    if "prompt" in accepted and not any(map(is_embedding, own)):
        raise ValueError(f"No prompts: {pipeline} takes prompts, or prompt_embeds and what belongs to them in their place.")
    if (number := number_of_samples(own, seeds)) is None:
        raise ValueError("No prompts, and nothing else that says how many samples to make: give seeds, or arguments per_sample.")
    return [""] * number


def maybe_of_samples(condition: Condition) -> list[str]:
    """Shared lists of as many pictures as there are samples: stock pipelines take some of them one per prompt."""
    number = len(condition)
    lists = {name: value for name, value in condition.kwargs.items() if isinstance(value, (list, tuple)) and len(value) == number > 1}
    return [name for name, value in lists.items() if all(hasattr(item, "shape") or hasattr(item, "getpixel") for item in value)]
