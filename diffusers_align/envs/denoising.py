"""The environments: `gymnasium.Env` and `gymnasium.vector.VectorEnv` around `envs.episodes`."""

from __future__ import annotations

from typing import Annotated, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ..checks.ranges import Count, CountOrNone, Range, check_value, checked
from ..policy import Policy
from .episodes import Episodes, Task, make_task


class DenoisingEnv(gymnasium.Env):
    """One episode draws one sample: `reset` makes its initial noise, each `step` takes one noisy solver step.

    Observations are a dict: `sample` (*D), x_t; `time` (1,), from 1 to 0; `condition` (E,), features of the prompt; and with `action="candidates"`
    `candidates` (n, *D), the noises to choose from. `gymnasium.wrappers.FlattenObservation` makes one vector of it.

    >>> env = DenoisingEnv(policy, ["a red cube"], "jpeg_compressibility", action="candidates", num_candidates=4)  # doctest: +SKIP
    >>> observation, info = env.reset(seed=0)  # doctest: +SKIP
    >>> observation, reward, terminated, truncated, info = env.step(2)  # doctest: +SKIP

    `info` has the `prompt` and the `seed` of the episode: under the actions that `policy.rollout([prompt], seeds=[seed])` would draw (with candidates, 0 at
    each step) its sample is the rollout's.

    Args:
        policy, prompts, reward, task: as of `envs.episodes.make_task`.

    Raises:
        ValueError: what `make_task` raises.
    """

    metadata = {"render_modes": []}

    def __init__(self, policy: Policy, prompts, reward, **task: Any):
        self.task = make_task(policy, prompts, reward, **task)
        self.observation_space, self.action_space = spaces_of(self.task)
        self.episodes: Episodes | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode: a prompt and a seed, drawn from the environment's generator.

        Args:
            seed: of that generator, from here on.
            options: `row`, the number of the prompt, and `seed`, the episode's own, in the place of draws.

        Raises:
            ValueError: other options, or a row that no prompt has.
        """
        super().reset(seed=seed)
        row, own = drawn(self.task, self.np_random, options or {})
        self.episodes = Episodes(self.task, [row], [own])
        return self._observation(), self._info()

    def step(self, action) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take one noisy solver step.

        Raises:
            ValueError: the episode has not begun, or has ended; an action of another shape, of no candidate, or not finite.
        """
        if self.episodes is None:
            raise ValueError("The episode has not begun: reset the environment.")
        reward = self.episodes.step(np.asarray(action)[None])
        return self._observation(), float(reward[0]), self.episodes.ended, False, self._info()

    def _observation(self) -> dict[str, np.ndarray]:
        return {name: x[0] for name, x in self.episodes.observation().items()}

    def _info(self) -> dict[str, Any]:
        return {"prompt": self.task.condition.prompts[self.episodes.rows[0]], "seed": self.episodes.seeds[0]}


class DenoisingVectorEnv(VectorEnv):
    """Several episodes that take their steps in one denoiser call. All have the same number of steps, so they end together.

    As in Gymnasium's own, the step after the last begins new episodes, whatever the actions (`AutoresetMode.NEXT_STEP`). Environment i draws as a
    `DenoisingEnv` that was reset with `seed + i` does.

    Args:
        num_envs: episodes at a time.
        policy, prompts, reward, task: as of `envs.episodes.make_task`.

    Raises:
        ValueError: what `make_task` raises.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}

    @checked
    def __init__(self, policy: Policy, prompts, reward, *, num_envs: Count, **task: Any):
        self.task, self.num_envs = make_task(policy, prompts, reward, **task), num_envs
        self.single_observation_space, self.single_action_space = spaces_of(self.task)
        self.observation_space, self.action_space = (batch_space(s, num_envs) for s in (self.single_observation_space, self.single_action_space))
        self.generators = [seeding.np_random()[0] for _ in range(num_envs)]
        self.episodes: Episodes | None = None

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode in each environment.

        Args:
            seed: of the first one's generator, of which the others' follow; or one for each. None goes on with the generators as they are.
            options: as of `DenoisingEnv.reset`, for all.

        Raises:
            ValueError: other options, or a number of seeds that is not that of the environments.
        """
        if seed is None:
            seed = [None] * self.num_envs
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, (int, np.integer)) else list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{self.num_envs} environments need as many seeds, got {len(seeds)}.")
        self.generators = [g if s is None else seeding.np_random(int(s))[0] for g, s in zip(self.generators, seeds)]
        rows, own = zip(*(drawn(self.task, g, options or {}) for g in self.generators))
        self.episodes = Episodes(self.task, list(rows), list(own))
        return self.episodes.observation(), self._info()

    def step(self, actions) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one noisy solver step in each environment, or begin new episodes after the last.

        Raises:
            ValueError: the episodes have not begun, or actions of another shape, of no candidate, or not finite.
        """
        none = np.zeros(self.num_envs, bool)
        if self.episodes is None:
            raise ValueError("The episodes have not begun: reset the environment.")
        if self.episodes.ended:
            observation, info = self.reset()
            return observation, np.zeros(self.num_envs, np.float64), none, none.copy(), info
        rewards = self.episodes.step(np.asarray(actions))
        return self.episodes.observation(), rewards.astype(np.float64), none | self.episodes.ended, none, self._info()

    def _info(self) -> dict[str, Any]:
        """In Gymnasium's form: an array of all environments' for each entry, and which of them have it."""
        prompts = np.array([self.task.condition.prompts[row] for row in self.episodes.rows], dtype=object)
        has = np.ones(self.num_envs, bool)
        return {"prompt": prompts, "_prompt": has, "seed": np.array(self.episodes.seeds), "_seed": has.copy()}


def spaces_of(task: Task) -> tuple[spaces.Dict, spaces.Space]:
    """The observations and the actions of one episode."""

    def box(*shape: int) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, shape, np.float32)

    seen = {"sample": box(*task.shape), "time": spaces.Box(0.0, 1.0, (1,), np.float32), "condition": box(task.features.shape[1])}
    if task.num_candidates is None:
        return spaces.Dict(seen), spaces.Box(-task.bound, task.bound, task.shape, np.float32)
    return spaces.Dict({**seen, "candidates": box(task.num_candidates, *task.shape)}), spaces.Discrete(task.num_candidates)


def drawn(task: Task, generator: np.random.Generator, options: dict[str, Any]) -> tuple[int, int]:
    """The number of an episode's prompt and its seed: as the options say, or drawn."""
    number = len(task.condition)
    row, seed = int(generator.integers(number)), int(generator.integers(2**62))
    if unknown := sorted(set(options) - {"row", "seed"}):
        raise ValueError(f"options are row and seed, got {', '.join(unknown)}.")
    row, seed = options.get("row", row), options.get("seed", seed)
    check_value("options row", row, Annotated[int, Range(0, number - 1)])
    check_value("options seed", seed, CountOrNone)
    return int(row), int(seed)
