"""A pipeline as a Gymnasium environment, for the libraries of reinforcement learning.

| name | what it is |
|---|---|
| `DenoisingEnv` | a `gymnasium.Env`: one episode is one sample |
| `DenoisingVectorEnv` | a `gymnasium.vector.VectorEnv`: several episodes in one denoiser call a step |

[Which libraries, and how](../guides/rl_libraries.md). Nothing else of the package imports gymnasium.

Raises:
    ImportError: gymnasium is not installed.
"""

from __future__ import annotations

try:
    import gymnasium  # noqa: F401
except ImportError as error:
    raise ImportError('diffusers_align.envs needs Gymnasium, which is not installed. Run `pip install gymnasium` (".[rl]" in a checkout).') from error

from .denoising import DenoisingEnv, DenoisingVectorEnv

__all__ = ["DenoisingEnv", "DenoisingVectorEnv"]
