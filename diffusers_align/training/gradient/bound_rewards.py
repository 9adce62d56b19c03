"""A reward of given prompts as a function of images, to be differentiated: what `scoring.Scorer` is for rewards without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ...data.prompts import Prompt, fields_of
from ...driving.outcome import Outcome
from ...policy import Policy
from ...rewards import InvalidReward, Reward, RewardError, RewardTimeout
from ...rewards.base import listed, score_columns
from ...rewards.patience import OverTime, within
from ...rewards.registry import reward_name

# What torch says where a tensor leaves the graph, for NumPy: a mistake in the reward, not in an image.
LEAVES_THE_GRAPH = "requires grad"


@dataclass(frozen=True)
class BoundReward:
    """The reward of the images of some prompts: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], or sounds (B, C, T), to (B,) float32, NaN where it is
    masked. Of videos with sound it sees the video alone.

    Of a masked sample nothing goes back into its image: behind a NaN that was computed (0/0, a model that overflows) even a gradient of 0
    is NaN.

    Attributes:
        reward: the reward, of images, prompts and columns.
        asked: B prompts with the data set's other fields.
        on_invalid: where the reward is NaN or infinite, raises or takes too long: `error`, or `mask`. A batch that raises is scored again
            one by one, so that only the samples at fault are lost.
        timeout: seconds for a batch.
        failures: what failed and was masked, in words.
        rate: tells the sampling rate of sounds.

    Raises (a call):
        InvalidReward: an answer of a wrong shape; NaN, unless masked.
        RewardError, RewardTimeout: the reward raised or took too long, unless masked.
    """

    reward: Reward
    asked: list[Prompt]
    on_invalid: Literal["error", "mask"] = "error"
    timeout: float | None = None
    failures: list[str] = field(default_factory=list)
    rate: Callable[[], int] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        seen = images.view_as(images)
        rewards = self._attempt(seen)
        unscored = rewards.detach().isnan().reshape(-1, *[1] * (images.ndim - 1))
        if seen.requires_grad and unscored.any():
            seen.register_hook(lambda gradient: torch.where(unscored, 0.0, gradient))
        return rewards

    def _attempt(self, images: Tensor) -> Tensor:
        try:
            return within(self.timeout, self._scores(images, torch.is_grad_enabled()))
        except InvalidReward:
            raise
        except OverTime:
            failure, cause = RewardTimeout(self._told(f"gave no answer in {self.timeout:g} s")), None
        except Exception as error:
            failure, cause = RewardError(self._told(f"raised {type(error).__name__}: {error}")), error
        if self.on_invalid == "error" or LEAVES_THE_GRAPH in str(cause):
            raise failure from cause
        if cause is not None and len(self.asked) > 1:
            return torch.cat([replace(self, asked=[prompt])._attempt(images[i : i + 1]) for i, prompt in enumerate(self.asked)])
        self.failures.append(str(failure))
        return images.float().flatten(1).sum(1) * torch.nan  # with a graph, so that a batch without any score has one

    def _scores(self, images: Tensor, with_graph: bool) -> Callable[[], Tensor]:
        def scores() -> Tensor:
            with torch.set_grad_enabled(with_graph):  # a thread has a gradient mode of its own
                made = Outcome(images, sampling_rate=self.rate() if images.ndim == 3 and self.rate is not None else None)
                texts, columns = [prompt.text for prompt in self.asked], made.beside(fields_of(self.asked))
                return score_columns(self.reward, images, texts, columns, self.on_invalid)["reward"]

        return scores

    def _told(self, what: str) -> str:
        return f"Reward {reward_name(self.reward)!r} {what}, for {len(self.asked)} images of the prompts {listed([prompt.text for prompt in self.asked])}."


def bound_reward(reward, asked: list[Prompt], args, policy: Policy) -> BoundReward:
    """The `BoundReward` of `--invalid_rewards` and `--reward_timeout`, for what the policy makes."""
    return BoundReward(reward, asked, args.invalid_rewards, args.reward_timeout, rate=lambda: policy.sampling_rate)
