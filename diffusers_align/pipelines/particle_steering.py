"""Particle steering and value-based decoding over any stock pipeline whose sampler has a stochastic kernel.

The algorithms' pages: `diffusers_align.algorithms.particle_steering` and `diffusers_align.algorithms.svdd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..algorithms import particle_steering as smc
from ..algorithms.best_of_n import best
from ..algorithms.svdd import choose
from ..checks.ranges import Count, NonNegative, Probability, check_fields, checked
from ..condition import Condition
from ..gradients.check import scaled_gradients
from ..policy import noise_seed
from ..rewards import InvalidReward
from ..transition import GaussianTransition
from .base import WrappedPipeline
from .draws import Generators
from .judge import Judge
from .outputs import merged
from .particles import Particles, Walk

Method, Returned = Literal["smc", "svdd"], Literal["best", "sample", "all"]


@dataclass(frozen=True)
class Steering:
    """How particles are steered; the arguments of `ParticleSteeringPipeline` of the same names.

    Raises:
        ValueError: an argument that is out of range or unknown.
    """

    method: Method = "smc"
    num_particles: Count = 4
    potential: str = "difference"
    reward_scale: NonNegative = 10.0
    resampler: str = "systematic"
    ess_threshold: Probability = 0.5
    resample_every: Count | None = None
    start: Probability = 0.2
    end: Probability = 0.8
    gradient: bool = False
    alpha: NonNegative = 0.0
    returned: Returned = "best"

    def __post_init__(self):
        check_fields(self)
        for name, known in (("potential", smc.POTENTIALS), ("resampler", smc.RESAMPLERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}.")
        if self.start > self.end:
            raise ValueError(f"start must not lie behind end, got {self.start:g} and {self.end:g}.")
        if self.method == "svdd" and self.gradient:
            raise ValueError("SVDD chooses among draws of the sampler's own kernel: gradient=True is for method='smc'.")

    def stops(self, stochastic: list[bool]) -> list[int]:
        """The solver steps at which particles are weighed: from each of them on there is noise for copies to part by.

        Raises:
            ValueError: no step has noise.
        """
        if not any(stochastic):
            raise ValueError("No step of the sampler has noise, so that copies of a particle would stay one: raise the scheduler's eta or noise_level.")
        steps = len(stochastic)
        every_step = self.method == "svdd" or self.gradient
        interval = 1 if every_step else self.resample_every or max(1, round(steps / 5))
        first, last = (1, steps) if every_step else (max(1, round(self.start * steps)), self.end * steps)
        # The first state of all particles of a group is noise, which no reward tells apart.
        return [k for k in range(first, steps, interval) if k <= last and any(stochastic[k:])]


class ParticleSteeringPipeline(WrappedPipeline):
    """Samples of the stock pipeline, tilted by a reward that needs no gradient: particles of each prompt that compete on the way.

    >>> pipe = ParticleSteeringPipeline(DiffusionPipeline.from_pretrained(...), reward="image_reward")  # doctest: +SKIP
    >>> pipe("a red cube on a blue ball", num_particles=8, reward_scale=10.0).images[0]  # doctest: +SKIP

    They walk on the pipeline's sampler with noise: its own if it is an SDE scheduler, else the SDE twin with the same noise table.
    """

    @checked
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        reward=None,
        num_particles: Count = 4,
        reward_scale: NonNegative = 10.0,
        potential: str = "difference",
        method: Method = "smc",
        resampler: str = "systematic",
        ess_threshold: Probability = 0.5,
        resample_every: Count | None = None,
        start: Probability = 0.2,
        end: Probability = 0.8,
        gradient: bool = False,
        alpha: NonNegative = 0.0,
        returned: Returned = "best",
        batch_size: Count | None = None,
        scheduler=None,
        columns: dict[str, list] | None = None,
        on_invalid: Literal["error", "mask"] = "error",
        output_type: str | None = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ):
        """
        Args:
            prompt, kwargs: those of the stock call.
            reward: in the place of the pipeline's.
            num_particles: N, of each of the P outputs: so many denoiser calls. 4 in FK steering, 20 in SVDD.
            reward_scale: lambda of the tilt exp(lambda * reward); 10 in FK steering. 0 is the sampler as it is; negate the reward for its opposite.
            potential: `difference`, `max` or `add`.
            method: `smc`, particles with weights; `svdd`, at each step the best of N candidates goes on.
            resampler, ess_threshold: how, and below what share of effective particles; 1 resamples whenever weights differ.
            resample_every: weigh particles every so many steps, a fifth of them if absent, from `start` to `end` (shares of the steps): every 20 of 100
                from 20 to 80 in FK steering. The final samples are weighed in any case.
            gradient: propose along the reward's gradient through the denoiser and the autoencoder (twisted, TDS), at every step.
            alpha: temperature of SVDD; 0 takes the best.
            returned: `best`, of each output's particles the one of the largest reward; `sample`, one drawn by weight, a fair draw of the
                tilt, or for SVDD one chosen at temperature alpha, as at each step; `all` of them.
            batch_size: particles a call, in memory; all if absent. The particles of one prompt may be spread over calls.
            scheduler: an SDE scheduler, in the place of the SDE twin.
            columns: other arguments of the reward, a list for each with an entry per prompt.
            on_invalid: a particle without a reward (NaN): "error", or "mask" to give it the weight 0.

        Returns:
            The stock output with `rewards` (P, N), `log_weights` (P, N) (zero for SVDD), `log_evidence` (P,) (None for SVDD), `ess` (P, weighings) and
            `chosen` (P,), or None for `all`.

        Raises:
            ValueError: an argument is out of range, or the sampler has no stochastic kernel.
        """
        steering = Steering(
            method, num_particles, potential, reward_scale, resampler, ess_threshold, resample_every, start, end, gradient, alpha, returned,
        )  # fmt: skip
        _refuse_arguments(kwargs)
        condition, generator = self.condition(prompt, kwargs)
        judge = self.judge(reward, condition, columns, on_invalid)
        with self.as_policy(scheduler, condition):
            return self._steered(steering, judge, condition, generator, batch_size, output_type=output_type, return_dict=return_dict)

    def _steered(self, steering: Steering, judge: Judge, condition: Condition, generator, batch_size: int | None, **options: Any):
        """The call's output, with the sampler's noise in place."""
        groups, number = len(condition), steering.num_particles
        walk = Walk(self, condition.select(_of_groups(groups, number)), _seeds(generator, groups, number), batch_size)
        run = _Run(walk, steering, judge, groups)
        with self.progress_bar(total=len(walk.stochastic_steps)) as bar:
            final = run(bar.update)
        rows, chosen = run.returned()
        parts = [rows[i : i + walk.batch_size] for i in range(0, len(rows), walk.batch_size)]
        output = merged([self.finish([x[part] for x in final.states], walk.condition.select(part), walk.fresh(part), **options) for part in parts])
        evidence = smc.log_evidence(run.weights) if steering.method == "smc" else None
        found = {"rewards": run.rewards, "log_weights": run.weights.log_weight, "log_evidence": evidence}
        return self.extended(output, **found, ess=torch.stack(run.ess, 1), chosen=chosen)


class _Run:
    """The particles of one call, their weights, and what has become of them."""

    def __init__(self, walk: Walk, steering: Steering, judge: Judge, groups: int):
        self.walk, self.steering, self.judge, self.groups = walk, steering, judge, groups
        # On the CPU, in float64, which not every device has.
        self.weights = smc.initial_weights(groups, steering.num_particles)
        self.log_ratio: Tensor | None = None
        self.ess: list[Tensor] = []
        # A stream of its own for each group: none depends on the others.
        self.choices = [torch.Generator().manual_seed(noise_seed(seed, "choices")) for seed in walk.seeds[:: steering.num_particles]]

    def __call__(self, on_progress) -> Particles:
        """Walk to the end; the final particles."""
        particles = gradient = None
        stops = self.steering.stops(self.walk.stochastic_steps)
        for before, stop in zip([0, *stops], [*stops, None]):
            particles, rewards, gradient = self.segment(particles, stop, gradient)
            if stop is not None:
                index = self.weigh(rewards)
                particles, gradient = particles.select(index), None if gradient is None else gradient[index]
                on_progress(stop - before)
        on_progress(len(self.walk.stochastic_steps) - (stops or [0])[-1])
        self.finish(rewards)
        return particles

    def segment(self, start: Particles | None, stop: int | None, gradient: Tensor | None) -> tuple[Particles, Tensor, Tensor | None]:
        """From one weighing to the next, call by call: the particles, their rewards (P, N), and the log-potential's gradients (B, *D)."""
        parts, rewards, gradients, ratios = [], [], [], []
        for rows in self.walk.batches():
            own = None if start is None else start.select(rows)
            drawn, ratio = self.propose(own, rows, None if gradient is None else gradient[rows])
            with torch.set_grad_enabled(self.steering.gradient and stop is not None):
                part = self.walk.advance(rows, own, stop, drawn=drawn, gradients=torch.is_grad_enabled())
                scores = self.judge(self.walk.decode(part, rows), [i // self.steering.num_particles for i in rows])
                gradients.append(self.slope(scores, part) if torch.is_grad_enabled() else None)
            parts.append(part.detached())
            rewards.append(scores.detach())
            ratios.append(ratio)
        shape = (self.groups, self.steering.num_particles)
        self.log_ratio = None if ratios[0] is None else torch.cat(ratios).reshape(shape).cpu()
        return Particles.cat(parts), torch.cat(rewards).reshape(shape).cpu(), None if gradients[0] is None else torch.cat(gradients)

    def propose(self, start: Particles | None, rows: list[int], gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Next states drawn along the gradient, and log p - log q of them; nothing where the kernel itself draws."""
        if gradient is None or start.transition is None:
            return None, None
        kernel = start.transition
        shifted = smc.twist(kernel.mean, kernel.std, gradient)
        dtype = start.states[0].dtype
        drawn = GaussianTransition(shifted, kernel.std).sample(self.walk.noise(rows), dtype).to(dtype)
        return drawn, smc.proposal_log_ratio(drawn, kernel.mean, shifted, kernel.std)

    def slope(self, scores: Tensor, part: Particles) -> Tensor:
        """Gradient of lambda r at each particle's state, (B, *D) float32."""
        if not scores.requires_grad:
            raise ValueError("The reward has no gradient (or cut it): leave out gradient=True, particles need none.")
        half = part.states[0].dtype == torch.float16
        (slope,) = scaled_gradients(self.steering.reward_scale * scores.nan_to_num().sum(), [part.states[0]], half=half)
        if slope is None:
            raise ValueError("The reward has no gradient (or cut it): leave out gradient=True, particles need none.")
        return slope.float().nan_to_num(posinf=0, neginf=0)

    def weigh(self, rewards: Tensor) -> list[int]:
        """Weigh and resample, and say whose copies the particles become."""
        steering, number = self.steering, self.steering.num_particles
        uniforms = torch.stack([torch.rand(number, generator=g, dtype=torch.float64) for g in self.choices])
        if steering.method == "svdd":
            index = choose(rewards, uniforms[:, 0], alpha=steering.alpha)[:, None].expand(-1, number)
            self.ess.append(torch.ones_like(self.weights.log_evidence))
        else:
            options = {"potential": steering.potential, "reward_scale": steering.reward_scale}
            self.weights = smc.reweight(self.weights, rewards, log_ratio=self.log_ratio, **options)
            self.ess.append(smc.effective_particles(self.weights.log_weight))
            self.weights, index = smc.resample(self.weights, uniforms, method=steering.resampler, ess_threshold=steering.ess_threshold)
        return (index + number * torch.arange(self.groups)[:, None]).flatten().tolist()

    def finish(self, rewards: Tensor) -> None:
        """Weigh the final samples."""
        if not torch.isfinite(rewards).any(1).all():
            raise InvalidReward("A prompt's final samples have no reward at all (NaN): repair the reward or take more particles.")
        self.rewards = rewards
        if self.steering.method == "smc":
            self.weights = smc.reweight(self.weights, rewards, reward_scale=self.steering.reward_scale, log_ratio=self.log_ratio, last=True)
            self.ess.append(smc.effective_particles(self.weights.log_weight))
        else:
            self.ess.append(torch.ones_like(self.weights.log_evidence))

    def returned(self) -> tuple[list[int], Tensor | None]:
        """Rows of the particles that are returned, and which of each group they are."""
        number = self.steering.num_particles
        if self.steering.returned == "all":
            return list(range(self.groups * number)), None
        if self.steering.returned == "best":
            chosen = best(self.rewards)
        else:
            uniforms = torch.stack([torch.rand(number, generator=g, dtype=torch.float64) for g in self.choices])
            if self.steering.method == "svdd":
                chosen = choose(self.rewards, uniforms[:, 0], alpha=self.steering.alpha)
            else:
                chosen = smc.ancestors(self.weights.log_weight, uniforms, "multinomial")[:, 0]
        return (chosen + number * torch.arange(self.groups)).tolist(), chosen


def _of_groups(groups: int, number: int) -> list[int]:
    return [group for group in range(groups) for _ in range(number)]


def _seeds(generator: Generators, groups: int, number: int) -> list[int]:
    """Of all particles, by groups, from the call's generator; those of few particles are among those of many."""
    sources = generator if isinstance(generator, list) else [generator] * groups
    bases = [int(torch.randint(2**62, (), generator=g, device=g.device if g else "cpu")) for g in sources]
    return [noise_seed(base, "particle", i) for base in bases for i in range(number)]


def _refuse_arguments(kwargs: dict[str, Any]) -> None:
    if kwargs.get("eta") is not None:
        raise ValueError(f"The noise of particles is the SDE scheduler's: pass scheduler=sde_twin(pipe.scheduler, eta={kwargs['eta']}) in the place of eta.")
    if given := [name for name in ("callback_on_step_end", "callback") if kwargs.get(name) is not None]:
        raise ValueError(f"Particles leave and resume calls of the stock pipeline, so that {given[0]} would see some steps twice: leave it out.")
