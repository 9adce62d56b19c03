"""Pipelines that align at inference, around any stock pipeline (`base`).

| file name | class | what it does |
|---|---|---|
| `best_of_n` | `BestOfNPipeline` | the best of several samples; random and zero-order search |
| `particle_steering` | `ParticleSteeringPipeline` | particles that compete on the way; SVDD |
| `reward_guided` | `RewardGuidedPipeline` | the reward's gradient guides each step |
| `value_steering` | `ValueSteeringPipeline` | a learned Q-function picks the noise of each step |
| `adapter_guidance` | `AdapterGuidancePipeline` | mixes the model with and without its LoRA |
| `noise_optimization` | `NoiseOptimizationPipeline` | the reward's gradient moves the initial noise |
| `preference_flow` | `PreferenceFlowPipeline` | carries finished samples to preferred ones; trained, and not around another |

`path` gives diffusers the file, `push` puts it into a repository of its own:

>>> DiffusionPipeline.from_pretrained(model, custom_pipeline=path("best_of_n"), trust_remote_code=True)  # doctest: +SKIP
"""

from __future__ import annotations

from huggingface_hub import create_repo, upload_file

from ..files.paths import front_door
from .adapter_guidance import AdapterGuidancePipeline
from .base import WrappedPipeline
from .best_of_n import BestOfNPipeline
from .noise_optimization import NoiseOptimizationPipeline
from .particle_steering import ParticleSteeringPipeline
from .preference_flow import PreferenceFlowPipeline
from .reward_guided import RewardGuidedPipeline
from .value_steering import ValueSteeringPipeline


def path(name: str) -> str:
    """The file of a pipeline, for `custom_pipeline=`.

    Raises:
        FileNotFoundError: there is none of that name; the message lists those there are.
    """
    return str(front_door("pipelines", name))


def push(name: str, repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Upload a pipeline's file to the Hub, so that its repository's name can be given as `custom_pipeline=`; return that name.

    Whoever loads it needs the package installed: the file holds the name of the class alone.
    """
    repo = create_repo(repo_id, exist_ok=True, token=token, private=private).repo_id
    upload_file(path_or_fileobj=path(name), path_in_repo="pipeline.py", repo_id=repo, token=token, commit_message=f"Add {name}")
    return repo


__all__ = [
    "AdapterGuidancePipeline", "BestOfNPipeline", "NoiseOptimizationPipeline", "ParticleSteeringPipeline", "PreferenceFlowPipeline",
    "RewardGuidedPipeline", "ValueSteeringPipeline", "WrappedPipeline", "path", "push",
]  # fmt: skip
