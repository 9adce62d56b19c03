"""Best-of-n, random and zero-order search over any stock pipeline with its own sampler (`diffusers_align.algorithms.best_of_n`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.utils import logging
from torch import Tensor

from ..algorithms.best_of_n import best, neighbour
from ..checks.ranges import Count, Probability, checked
from ..condition import Condition
from ..driving.chains import Finals
from ..driving.initial_noise import prepared_latents
from ..policy import noise_seed
from .base import WrappedPipeline, copies_asked
from .draws import Generators, copied, noted
from .judge import Judge
from .outputs import rows_of

logger = logging.get_logger(__name__)


class BestOfNPipeline(WrappedPipeline):
    """Draws several candidates for each output of the stock pipeline and returns those that the reward likes best.

    >>> pipe = BestOfNPipeline(DiffusionPipeline.from_pretrained(...), reward="clip_score")  # doctest: +SKIP
    >>> pipe("a red cube", num_candidates=8, generator=torch.Generator().manual_seed(0)).images[0]  # doctest: +SKIP

    The stock pipeline's sample for the same generator is the first candidate, and those of a small search are among those of a
    larger one: the reward of what is returned never falls.
    """

    @checked
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        reward=None,
        num_candidates: Count = 4,
        search: Literal["random", "zero_order"] = "random",
        rounds: Count = 1,
        cosine: Probability = 0.95,
        batch_size: Count | None = None,
        columns: dict[str, list] | None = None,
        on_invalid: Literal["error", "mask"] = "error",
        output_type: str | None = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ):
        """
        Args:
            prompt, kwargs: those of the stock call, which draws the first candidates.
            reward: in the place of the pipeline's.
            num_candidates: of each round and output.
            search: `random`, independent candidates; `zero_order`, from the second round on neighbours of the best so far.
            rounds: of the search: `rounds * num_candidates` samples an output.
            cosine: of a neighbour's initial noise and the best one's: from 0, fresh noise, to 1, the best noise itself.
            batch_size: samples a call, for all but the first, which is the stock pipeline's own; a whole round if absent.
            columns: other arguments of the reward, a list for each with an entry per prompt.
            on_invalid: a candidate without a reward (NaN): "error", or "mask" to pass it over; where none has one, the stock sample is returned with a warning.

        Returns:
            The stock output with `rewards` (P, candidates) in the order drawn and `chosen` (P,), which of them are returned.

        Raises:
            ValueError: an argument out of range or unknown, no reward or prompt, initial latents, or noise that has no neighbours here.
        """
        self._check(num_candidates, search, rounds, {**kwargs, "prompt": prompt})
        condition, generator = self.condition(prompt, kwargs)
        judge, start = self.judge(reward, condition, columns, on_invalid), noted(generator, self.pipeline._execution_device)
        with self.progress_bar(total=rounds * num_candidates) as bar:
            found = self._first(condition, generator, judge, start, copies_asked(kwargs))
            bar.update()
            bases = _bases(generator, len(condition))
            for number in range(rounds):
                pivot = found.noise.clone() if search == "zero_order" and number > 0 else None
                drawn = [j for j in range(number * num_candidates, (number + 1) * num_candidates) if j > 0]
                pairs = [(j, row) for j in drawn for row in range(len(condition))]
                size = batch_size or max(1, len(pairs))
                for i in range(0, len(pairs), size):
                    self._draw(pairs[i : i + size], bases, condition, judge, found, pivot, cosine)
                bar.update(len(drawn))
        if none := [prompt for prompt, row in zip(condition.prompts, found.rewards.isnan().all(1).tolist()) if row]:
            logger.warning(f"No candidate has a reward for {len(none)} of {len(condition)} outputs: the stock sample is returned there. Prompts: {none[:3]}.")
        output = self._finished(found, condition, start, output_type=output_type, return_dict=return_dict)
        return self.extended(output, rewards=found.rewards, chosen=found.chosen)

    def _check(self, num_candidates: int, search: str, rounds: int, kwargs: dict[str, Any]) -> None:
        if kwargs.get("latents") is not None and num_candidates * rounds > 1:
            raise ValueError("latents fix the initial noise, so that all candidates would be one: leave them out.")
        if search == "zero_order" and rounds > 1:
            if not self.calls.starts_from_noise({**kwargs, **(kwargs.get("per_sample") or {})}):
                raise ValueError(f"{self.calls.name} does not start from noise alone, so noise has no neighbours there; use search='random'.")

    def _first(self, condition: Condition, generator: Generators, judge: Judge, start: Generators, copies: dict[str, int]) -> _Found:
        """The stock pipeline's own samples, by the call as it was made: prompts that it repeats once they are encoded round otherwise."""
        rows = list(range(len(condition)))
        with self._near(None, 1.0) as noise:
            # Initial latents are given for each output, everything else for each prompt.
            given = {name: condition.per_sample[name] for name in ("latents",) if name in condition.per_sample}
            states = self.sample(condition.select(rows[:: max(copies.values(), default=1)]), generator, copies, **given)
        rewards = judge(self.decode(states, condition, copied(start)), rows)
        return _Found(states, noise[0] if noise else None, rewards[:, None], [None] * len(rows))

    def _draw(self, pairs: list[tuple[int, int]], bases: list[int], condition: Condition, judge: Judge, found: _Found, pivot, cosine: float) -> None:
        """One call for candidates (j, row)."""
        rows = [row for _, row in pairs]
        seeds = [noise_seed(bases[row], "candidate", j) for j, row in pairs]
        chosen = condition.select(rows)
        with self._near(None if pivot is None else pivot[rows], cosine) as noise:
            states = self.sample(chosen, _seeded(seeds))
        if all(torch.equal(x[i], found.states[chain][row]) for chain, x in states.items() for i, row in enumerate(rows)):
            why = "it draws by an argument of its own: give seed=None" if "seed" in self.calls.parameters else "it draws nothing: an inversion's noise, say"
            raise ValueError(f"{self.calls.name} makes the same samples with other seeds ({why}): there is none to choose.")
        rewards = judge(self.decode(states, chosen, _seeded(seeds)), rows)
        for i, (j, row) in enumerate(pairs):
            found.add(j, row, {chain: x[i] for chain, x in states.items()}, noise[0][i] if noise else None, rewards[i], seeds[i])

    def _finished(self, found: _Found, condition: Condition, start: Generators, **options: Any):
        """The output of the best. What the pipeline draws beside the initial noise comes by their own seeds; of first candidates by the first call's
        generators, of which a single one draws for all of them together."""
        first = [seed is None for seed in found.seeds]
        if all(first):
            return self.finish(found.states, condition, start, **options)
        own = [torch.Generator().manual_seed(seed or 0) for seed in found.seeds]
        if isinstance(start, list):
            own = [theirs if is_first else g for theirs, is_first, g in zip(start, first, own)]
        output = self.finish(found.states, condition, own, **options)
        draws = not self.calls.starts_from_noise({**condition.kwargs, **condition.per_sample})  # else there is nothing to draw behind the noise
        if isinstance(start, list) or not any(first) or not draws:
            return output
        return rows_of(self.finish(found.states, condition, start, **options), output, first)

    @contextmanager
    def _near(self, pivot: Tensor | None, cosine: float) -> Iterator[list[Tensor]]:
        """The initial noise of a call within, moved near `pivot` (B, *D) if there is one."""
        noise: list[Tensor] = []

        def moved(latents: Tensor) -> Tensor:
            latents = latents if pivot is None else neighbour(pivot.to(latents), latents, cosine=cosine)
            noise.append(latents.clone())
            return latents

        with prepared_latents(self.pipeline, moved):
            yield noise


@dataclass
class _Found:
    """The best candidate so far of each of P outputs.

    Attributes:
        states: (P, *D), final, of each scheduler and chain.
        noise: (P, *D), initial.
        rewards: (P, candidates so far), of all.
        seeds: of the best; None for the first.
    """

    states: Finals
    noise: Tensor | None
    rewards: Tensor
    seeds: list[int | None]

    @property
    def chosen(self) -> Tensor:
        """(P,)"""
        return best(self.rewards)

    def add(self, j: int, row: int, states: Finals, noise: Tensor | None, reward: Tensor, seed: int) -> None:
        """Put candidate j of output `row` in the best one's place if it is better."""
        if j == self.rewards.shape[1]:
            self.rewards = torch.cat([self.rewards, torch.full_like(self.rewards[:, :1], torch.nan)], 1)
        self.rewards[row, j] = reward
        if int(self.chosen[row]) == j:
            for chain, new in states.items():
                self.states[chain][row] = new
            self.seeds[row] = seed
            if noise is not None:
                self.noise[row] = noise


def _seeded(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _bases(generator: Generators, number: int) -> list[int]:
    """A seed for each output, from the call's generator after its first use."""
    sources = generator if isinstance(generator, list) else [generator] * number
    return [int(torch.randint(2**62, (), generator=g, device=g.device if g else "cpu")) for g in sources]
