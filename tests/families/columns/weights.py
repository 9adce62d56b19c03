"""LoRA out and in, and the model underneath it."""

from __future__ import annotations

import tempfile

import torch

from diffusers_align import Policy, Trajectory, load_lora
from diffusers_align.lora import stock_lines

from ..cell import DoesNotApply, require
from ..column import Column
from ..subject import Subject, relative_error

SAME = 1e-5


@torch.no_grad()
def reference(subject: Subject) -> None:
    with subject.moved():
        trained = subject.rollout().final
        with subject.policy.reference():
            pretrained = subject.rollout().final
        again = subject.rollout().final
    require(torch.equal(pretrained, subject.trajectory.final), f"The reference is off by {relative_error(pretrained, subject.trajectory.final):.1e}.")
    require(not torch.equal(trained, pretrained), "The LoRA makes no difference.")
    require(torch.equal(again, trained), "The LoRA is another one after reference().")


@torch.no_grad()
def _saved(subject: Subject, folder: str) -> Trajectory:
    """Save a LoRA that does something; what it makes, frozen as what is loaded is: of trainable weights kernels may round otherwise."""
    parameters = [parameter for own in subject.lora.values() for parameter in own]
    with subject.moved():
        subject.policy.save_lora(folder)
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            return subject.rollout()
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)


def _check_loaded(subject: Subject, pipeline, expected: Trajectory) -> str | None:
    loaded = subject.rollout(Policy(pipeline, **subject.case.call))
    require(relative_error(expected.final, subject.trajectory.final) > 1e-3, "The LoRA makes no difference.")
    # Loaded in another order, weights may be added up otherwise, and some samplers make much of that in their later steps.
    first, last = relative_error(loaded.actions[:, 0], expected.actions[:, 0]), relative_error(loaded.final, expected.final)
    require(first <= SAME and last <= 100 * SAME, f"What was loaded is off by {first:.1e} after one step, {last:.1e} at the end.")
    return None if last <= SAME else f"rounding of {last:.1e}"


def lora(subject: Subject) -> str | None:
    fresh = subject.build()
    with tempfile.TemporaryDirectory() as folder:
        expected = _saved(subject, folder)
        lines = stock_lines(fresh, subject.policy.denoisers, folder)
        if not lines[0].startswith("pipe."):
            raise DoesNotApply("diffusers has no LoRA loader for this pipeline's denoiser; `diffusers_align.load_lora` has.")
        for line in lines:
            exec(line, {"pipe": fresh})
    return _check_loaded(subject, fresh, expected)


def own(subject: Subject) -> str | None:
    fresh = subject.build()
    with tempfile.TemporaryDirectory() as folder:
        expected = _saved(subject, folder)
        load_lora(fresh, folder)
    return _check_loaded(subject, fresh, expected)


COLUMNS = (
    Column("reference", "ref", "`reference()` is the pretrained model, bit for bit", reference, ("rollout",)),
    Column("lora", "lora", "a saved LoRA loads by the stock `load_lora_weights`, with identical samples", lora, ("rollout",)),
    Column("own", "own", "the same by `diffusers_align.load_lora`", own, ("rollout",)),
)
