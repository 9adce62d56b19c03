"""What a rollout leaves behind: states, actions and log-probabilities of every solver step, and how to walk it again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from .condition import Condition, positions


@dataclass(frozen=True)
class Trajectory:
    """K solver steps of B samples.

    Attributes:
        states: (B, K, *D), what the denoiser and the scheduler saw at each step.
        actions: (B, K, *D), what the scheduler returned. Pipelines may edit it before the next step (inpainting does), so
            `actions[:, k]` need not be `states[:, k + 1]`.
        timesteps, sigmas: (K,) float32; sigmas is NaN where the scheduler has none.
        stochastic: (K,) bool, where a log-probability exists.
        log_probs: (B, K) float64, nats, NaN at deterministic steps.
        condition: the call that made it.
        children: trajectories of the scheduler's copies, for pipelines that denoise several modalities.
    """

    states: Tensor
    actions: Tensor
    timesteps: Tensor
    sigmas: Tensor
    stochastic: Tensor
    log_probs: Tensor
    condition: Condition
    children: tuple[Trajectory, ...] = ()
    made_by: ClassVar[str] = "policy.rollout(prompts) returns one"

    def __len__(self) -> int:
        return self.states.shape[0]

    @property
    def num_steps(self) -> int:
        return self.states.shape[1]

    @property
    def noisy_steps(self) -> list[int]:
        """The solver steps that have a log-probability, in order."""
        return self.stochastic.nonzero().flatten().tolist()

    @property
    def step_sizes(self) -> list[float]:
        """|sigma_next - sigma| of each of the K steps; the last ends at the clean sample. NaN where there are no sigmas (diffusion)."""
        rising = self.sigmas[0] < self.sigmas[-1] or self.sigmas[0] == 0  # some schedules count from noise at 0
        clean = 1.0 if rising else 0.0
        return torch.cat([self.sigmas, self.sigmas.new_tensor([clean])]).diff().abs().tolist()

    @property
    def final(self) -> Tensor:
        """(B, *D), the last action. Pipelines decode it, after what they do to it behind their last step: `Policy.decode` does the same. Those that
        blend in a given picture (inpainting) or change the scale there return other latents for `output_type="latent"`. Of samples that are made portion
        after portion it is the last portion, and no whole one: `Policy.outcome` decodes the trajectory."""
        return self.actions[:, -1]

    @property
    def samples(self) -> Tensor:
        """(B, K + 1, *D), states and final; what it says only if no edit lies between the steps."""
        return torch.cat([self.states, self.final[:, None]], 1)

    def select(self, index: list[int] | slice) -> Trajectory:
        """The trajectory of some of the samples, for micro-batches."""
        index = list(range(len(self)))[index] if isinstance(index, slice) else positions(index)
        fields = {name: getattr(self, name)[index] for name in ("states", "actions", "log_probs")}
        return replace(self, **fields, condition=self.condition.select(index), children=tuple(c.select(index) for c in self.children))

    @staticmethod
    def cat(parts: list[Trajectory]) -> Trajectory:
        """One trajectory of all samples of `parts`, which must share their call's arguments and schedule.

        Raises:
            ValueError: no parts, or the schedules or the arguments differ.
        """
        if not parts:
            raise ValueError("No trajectories to join: give at least one.")
        first = parts[0]
        if any(not torch.equal(p.timesteps, first.timesteps) or not torch.equal(p.stochastic, first.stochastic) for p in parts):
            raise ValueError("Trajectories with different schedules cannot be joined; roll them out with the same call arguments.")
        fields = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("states", "actions", "log_probs")}
        condition = Condition.cat([p.condition for p in parts])
        children = tuple(Trajectory.cat([p.children[i] for p in parts]) for i in range(len(first.children)))
        return replace(first, **fields, condition=condition, children=children)

    def to(self, device) -> Trajectory:
        """A copy with states, actions and log-probabilities on `device`."""
        fields = {name: getattr(self, name).to(device) for name in ("states", "actions", "log_probs")}
        return replace(self, **fields, children=tuple(c.to(device) for c in self.children))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file. Tensors of the condition travel along.

        Raises:
            TypeError: a call argument holds what is neither a tensor nor JSON (a PIL image, say); the message names it.
        """
        tensors, condition = self._tensors(""), self.condition
        arguments = {"kwargs": condition.kwargs, "per_sample": condition.per_sample}
        call = {kind: {name: _packed(name, value, f"condition.{kind}.{name}", tensors) for name, value in own.items()} for kind, own in arguments.items()}
        meta = {"prompts": condition.prompts, "seeds": condition.seeds, "step_seeds": condition.step_seeds, **call, "children": len(self.children)}
        Path(path).write_bytes(serialised(tensors, {"trajectory": json.dumps(meta)}))  # not save_file, whose files are for the owner alone

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Trajectory:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else, or is damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No trajectory {str(path)!r}: there is no such file.")
        try:
            opened = safe_open(path, "pt", device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}.") from error
        with opened as file:
            if (text := (file.metadata() or {}).get("trajectory")) is None:
                raise ValueError(f"{path} is no trajectory: Trajectory.save writes them.")
            meta = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        call = [{name: _unpacked(value, tensors) for name, value in meta[kind].items()} for kind in ("kwargs", "per_sample")]
        condition = Condition(meta["prompts"], call[0], meta["seeds"], meta["step_seeds"], call[1])
        parts = [cls(**{n: tensors[f"{prefix}{n}"] for n in _FIELDS}, condition=condition) for prefix in ["", *(f"child{i}." for i in range(meta["children"]))]]
        return replace(parts[0], children=tuple(parts[1:]))

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        own = {f"{prefix}{name}": getattr(self, name).clone(memory_format=torch.contiguous_format) for name in _FIELDS}
        for i, child in enumerate(self.children):
            own |= child._tensors(f"child{i}.")
        return own


_TENSOR, _TUPLE = "tensor of this file", "tuple"
_FIELDS = ("states", "actions", "timesteps", "sigmas", "stochastic", "log_probs")


def _packed(name: str, value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON. Its tensors go into `tensors`, with their names there in their places."""
    if isinstance(value, Tensor):
        tensors[key] = value.clone(memory_format=torch.contiguous_format)
        return {_TENSOR: key}
    if isinstance(value, (list, tuple)):
        parts = [_packed(name, part, f"{key}.{i}", tensors) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else {_TUPLE: parts}
    if isinstance(value, dict) and all(isinstance(part, str) for part in value):
        return {part: _packed(name, own, f"{key}.{part}", tensors) for part, own in value.items()}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"Cannot save a trajectory whose call argument {name} is neither a tensor nor JSON: {type(value).__name__} is not JSON serializable.")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_TUPLE}:  # pipelines add sizes to others, and tuples only to tuples
            return tuple(_unpacked(part, tensors) for part in value[_TUPLE])
        return {name: _unpacked(own, tensors) for name, own in value.items()}
    return [_unpacked(part, tensors) for part in value] if isinstance(value, list) else value
