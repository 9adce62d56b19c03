"""What a rollout leaves behind: states, actions and log-probabilities of every solver step, and how to walk it again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The arguments of a pipeline call for B samples, one prompt each.

    Attributes:
        prompts: B strings.
        kwargs: the call's other arguments. Lists and tensors of length B belong to the samples one by one.
        seeds: B integers; each fixes its sample's initial noise, whatever the batch.
        step_seeds: B integers for the noise of the steps; derived from `seeds` if absent.
    """

    prompts: list[str]
    kwargs: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] | None = None
    step_seeds: list[int] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, index: list[int]) -> Condition:
        """The condition of the samples `index`."""

        def pick(value):
            if isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self):
                return value[index]
            if isinstance(value, list) and len(value) == len(self):
                return [value[i] for i in index]
            return value

        # Schedules are lists whose length may happen to be B.
        kwargs = {name: value if name in ("sigmas", "timesteps") else pick(value) for name, value in self.kwargs.items()}
        return Condition([self.prompts[i] for i in index], kwargs, pick(self.seeds), pick(self.step_seeds))


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
    def final(self) -> Tensor:
        """(B, *D), the last action: the latents that the pipeline decodes."""
        return self.actions[:, -1]

    @property
    def samples(self) -> Tensor:
        """(B, K + 1, *D), states and final; what it says only if no edit lies between the steps."""
        return torch.cat([self.states, self.final[:, None]], 1)

    def select(self, index: list[int] | slice) -> Trajectory:
        """The trajectory of some of the samples, for micro-batches."""
        index = list(range(len(self)))[index] if isinstance(index, slice) else list(index)
        fields = {name: getattr(self, name)[index] for name in ("states", "actions", "log_probs")}
        return replace(self, **fields, condition=self.condition.select(index), children=tuple(c.select(index) for c in self.children))

    @staticmethod
    def cat(parts: list[Trajectory]) -> Trajectory:
        """One trajectory of all samples of `parts`, which must share their call's arguments and schedule.

        Raises:
            ValueError: the schedules or the arguments differ.
        """
        first = parts[0]
        if any(not torch.equal(p.timesteps, first.timesteps) or not torch.equal(p.stochastic, first.stochastic) for p in parts):
            raise ValueError("Trajectories with different schedules cannot be joined; roll them out with the same call arguments.")
        fields = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("states", "actions", "log_probs")}
        seeds = [None if getattr(first.condition, n) is None else [s for p in parts for s in getattr(p.condition, n)] for n in ("seeds", "step_seeds")]
        condition = Condition([c for p in parts for c in p.condition.prompts], _joined_kwargs(parts), *seeds)
        children = tuple(Trajectory.cat([p.children[i] for p in parts]) for i in range(len(first.children)))
        return replace(first, **fields, condition=condition, children=children)

    def to(self, device) -> Trajectory:
        """A copy with states, actions and log-probabilities on `device`."""
        fields = {name: getattr(self, name).to(device) for name in ("states", "actions", "log_probs")}
        return replace(self, **fields, children=tuple(c.to(device) for c in self.children))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file. Tensors of the condition travel along.

        Raises:
            TypeError: a call argument is neither a tensor nor JSON (a PIL image, say); the message names it.
        """
        tensors, call = self._tensors(""), {}
        for name, value in self.condition.kwargs.items():
            if isinstance(value, Tensor):
                tensors[f"condition.{name}"] = value.clone(memory_format=torch.contiguous_format)
            else:
                call[name] = value
        try:
            own = {"prompts": self.condition.prompts, "seeds": self.condition.seeds, "step_seeds": self.condition.step_seeds}
            meta = json.dumps({**own, "kwargs": call, "children": len(self.children)})
        except TypeError as error:
            raise TypeError(f"Cannot save a trajectory whose call arguments {sorted(call)} are not all JSON or tensors: {error}") from error
        save_file(tensors, path, {"trajectory": meta})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Trajectory:
        """Read what `save` wrote."""
        with safe_open(path, "pt", device=str(device)) as file:
            meta = json.loads(file.metadata()["trajectory"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        kwargs = meta["kwargs"] | {name.removeprefix("condition."): t for name, t in tensors.items() if name.startswith("condition.")}
        condition = Condition(meta["prompts"], kwargs, meta["seeds"], meta["step_seeds"])
        parts = [cls(**{n: tensors[f"{prefix}{n}"] for n in _FIELDS}, condition=condition) for prefix in ["", *(f"child{i}." for i in range(meta["children"]))]]
        return replace(parts[0], children=tuple(parts[1:]))

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        own = {f"{prefix}{name}": getattr(self, name).clone(memory_format=torch.contiguous_format) for name in _FIELDS}
        for i, child in enumerate(self.children):
            own |= child._tensors(f"child{i}.")
        return own


_FIELDS = ("states", "actions", "timesteps", "sigmas", "stochastic", "log_probs")


def _joined_kwargs(parts: list[Trajectory]) -> dict[str, Any]:
    joined = {}
    for name, value in parts[0].condition.kwargs.items():
        values = [p.condition.kwargs[name] for p in parts]
        of_samples = name not in ("sigmas", "timesteps") and all(hasattr(v, "__len__") and len(v) == len(p) for v, p in zip(values, parts))
        if of_samples and isinstance(value, Tensor):
            value = torch.cat(values)
        elif of_samples and isinstance(value, list):
            value = [item for v in values for item in v]
        elif any(not (torch.equal(v, value) if isinstance(value, Tensor) else v == value) for v in values):
            raise ValueError(f"Trajectories made with different {name} cannot be joined.")
        joined[name] = value
    return joined
