r"""The forward process of any pipeline: noising clean latents, what the model is asked for there, and what its answer means.

Both kinds of model noise in one way, $x_t = \alpha_t x_0 + \sigma_t \epsilon$: flow matching with $\alpha = 1 - \sigma$, diffusion with
$\alpha^2 = \bar\alpha_t$ and $\sigma^2 = 1 - \bar\alpha_t$. They differ in what the model predicts:

| prediction_type | target | $\hat x_0$ | $\hat\epsilon$ |
|---|---|---|---|
| `epsilon` | $\epsilon$ | $(x_t - \sigma\hat\epsilon)/\alpha$ | output |
| `v_prediction` | $\alpha\epsilon - \sigma x_0$ | $\alpha x_t - \sigma\,$output | $\alpha\,$output$\, + \sigma x_t$ |
| `sample` | $x_0$ | output | $(x_t - \alpha\hat x_0)/\sigma$ |
| `flow` | $\epsilon - x_0$ | $x_t - \sigma\,$output | $x_t + (1 - \sigma)\,$output |

A scheduler in sigma space (`SigmaSDEScheduler`) has a scale $\alpha$ of its own, 1 where its states explode, and preconditions its model:
$\hat x_0 = c_{skip}\,x_t/\alpha + c_{out}\,$output (`schedulers.sigma_space`). The target is what solves that for the output.

Everything is read off the policy's scheduler, whose noise table is the pipeline's own: losses on noised samples (DiffusionNFT,
AWM, DPO, KTO, RWR, fine-tuning) need no line for a model family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .schedulers import DDIMSDEScheduler, DDPMSDEScheduler, FlowMatchSDEScheduler, SigmaSDEScheduler, UnCLIPSDEScheduler, WuerstchenSDEScheduler

SCHEMES = ("uniform", "logit_normal", "grid")
WEIGHTINGS = ("native", "eps", "x0", "elbo")


class ForwardProcess:
    """Noises samples (B, *D) at per-sample timesteps (B,) in the scheduler's units, those that `Policy.predict` takes.

    Coefficients are computed in float64; results are float32, or float64 where the latents are.

    Args:
        scheduler: a policy's `scheduler`: an SDE scheduler, with the noise table of the pipeline's own.

    Attributes:
        prediction_type: `flow`, `epsilon`, `v_prediction` or `sample`.

    Raises:
        TypeError: a scheduler of another class.
        ValueError: a flow schedule whose timesteps do not tell the noise level.
    """

    def __init__(self, scheduler: FlowMatchSDEScheduler | DDIMSDEScheduler | SigmaSDEScheduler):
        if getattr(scheduler, "jumps", False):
            raise TypeError(
                f"The model of {type(scheduler).__name__} jumps along its own trajectories and predicts no mean of noise or data, so losses on noised samples "
                "(DPO, KTO, NFT, AWM, SFT) mean nothing there: use methods that roll out (GRPO, DDPO, DPOK, D3PO, SPO) or a reward's gradient."
            )
        if not isinstance(
            scheduler, (FlowMatchSDEScheduler, DDIMSDEScheduler, SigmaSDEScheduler, DDPMSDEScheduler, UnCLIPSDEScheduler, WuerstchenSDEScheduler)
        ):
            raise TypeError(f"{type(scheduler).__name__} is no policy's scheduler; pass policy.scheduler, or sde_twin(pipeline.scheduler).")
        self.scheduler, self.is_flow = scheduler, isinstance(scheduler, FlowMatchSDEScheduler)
        self.num_train_timesteps = int(scheduler.config.get("num_train_timesteps", 1))  # Wuerstchen's time is continuous
        self.prediction_type = "flow" if self.is_flow else scheduler.config.get("prediction_type", "epsilon")
        self._space = scheduler.space if isinstance(scheduler, SigmaSDEScheduler) else None
        if self._space is not None:
            self.prediction_type = self._space.prediction_type
        self._table = None if self.is_flow else getattr(scheduler, "alphas_cumprod", None)
        self._continuous = not self.is_flow and (self._table is None if self._space is None else self._space.times != "table")
        # Time that rises from noise to data turns the velocity around.
        self._inverted = bool(self.is_flow and scheduler.config.invert_sigmas)
        if self.is_flow:
            _check_timesteps(scheduler)

    # --- coefficients ----------------------------------------------------------------------------------------------

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the clean sample, (B,)."""
        return _like(self._levels(t)[0], t)

    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise, (B,)."""
        return _like(self._levels(t)[1], t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio (alpha / sigma)^2, (B,): infinite without noise."""
        alpha, sigma = self._levels(t)
        return _like((alpha / sigma).square(), t)

    def flow_time(self, t: Tensor) -> Tensor:
        r"""$\sigma / (\alpha + \sigma)$ in [0, 1], (B,): the noise level in flow matching's terms. Flow's own sigma; for diffusion,
        that of the rescaled state $x_t / (\alpha + \sigma)$."""
        alpha, sigma = self._levels(t)
        return _like(sigma / (alpha + sigma), t)

    @property
    def clean_timestep(self) -> float:
        """The end of the training range with the least noise: 0, or `num_train_timesteps` where time rises from noise to data; a continuous time's own."""
        return self.num_train_timesteps if self._inverted else self.scheduler.time_range[0]

    @property
    def whole_timesteps(self) -> bool:
        """Whether times are rows of a table, and nothing lies between them."""
        return not self.is_flow and self._space is None and self._table is not None

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (B,) float64 on the CPU."""
        t = t.detach().to("cpu", torch.float64)
        if self.is_flow:
            sigma = t / self.num_train_timesteps
            sigma = 1 - sigma if self._inverted else sigma
            if bool((sigma < 0).any() or (sigma > 1).any()):
                raise ValueError(f"Timesteps must lie in [0, {self.num_train_timesteps}], got {t.min():g} to {t.max():g}.")
            return 1 - sigma, sigma
        if self._space is not None:
            least, most = self.scheduler.time_range
            if bool((t < least - 1e-6 * (most - least)).any() or (t > most + 1e-6 * (most - least)).any()):
                raise ValueError(f"Timesteps must lie in [{least:g}, {most:g}], got {t.min():g} to {t.max():g}.")
            ratio = self._space.sigma_of(t)
            return self._space.alpha(ratio), self._space.alpha(ratio) * ratio
        if self._table is None:
            sigma = self.scheduler.noise_weight(t)
            return (1 - sigma.square()).sqrt(), sigma
        if bool((t < 0).any() or (t >= self.num_train_timesteps).any() or (t != t.round()).any()):
            raise ValueError(f"Timesteps must be whole numbers from 0 to {self.num_train_timesteps - 1}, rows of the noise table; got {t.tolist()}.")
        alphas_cumprod = self._table.cpu().double()[t.long()]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def _weights(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha and sigma (B, 1, ..., 1) to multiply `x` with, and `x`, in float32 or float64."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        alpha, sigma = (level.to(dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1)) for level in self._levels(t))
        return alpha, sigma, x.to(dtype)

    def _mixed(self, weights: Callable, t: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """`first` and `second` (B, *D) with the weights that they have at the noise levels of sigma space."""
        alpha, sigma = self._levels(t)
        dtype = torch.promote_types(first.dtype, torch.float32)
        a, b = (weight.to(dtype).to(first.device).reshape(-1, *[1] * (first.ndim - 1)) for weight in weights(sigma / alpha))
        return a * first.to(dtype) + b * second.to(dtype)

    # --- noising, and what the model says of it --------------------------------------------------------------------

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, *D), in the dtype of `x0`: what the pipeline would get."""
        alpha, sigma, clean = self._weights(t, x0)
        return (alpha * clean + sigma * noise.to(clean.dtype)).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect model would answer at x_t, (B, *D), in its own parametrisation."""
        if self._space is not None:
            return self._mixed(self._space.target_weights, t, x0, noise)
        alpha, sigma, x0 = self._weights(t, x0)
        noise = noise.to(x0.dtype)
        if self.prediction_type == "flow":
            return x0 - noise if self._inverted else noise - x0
        return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[self.prediction_type]

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean sample that the model's output at x_t implies, (B, *D): affine in the output."""
        if self._space is not None:
            return self._mixed(self._space.clean_weights, t, x_t, output)
        alpha, sigma, x_t = self._weights(t, x_t)
        output = output.to(x_t.dtype)
        if self.prediction_type == "flow":
            return x_t - sigma * self._velocity(output)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha
        return output if self.prediction_type == "sample" else alpha * x_t - sigma * output

    def to_noise(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that the model's output at x_t implies, (B, *D)."""
        if self._space is not None:
            return self._mixed(self._space.noise_weights, t, x_t, output)
        alpha, sigma, x_t = self._weights(t, x_t)
        output = output.to(x_t.dtype)
        if self.prediction_type == "flow":
            return x_t + alpha * self._velocity(output)
        if self.prediction_type == "sample":
            return (x_t - alpha * output) / sigma
        return output if self.prediction_type == "epsilon" else alpha * output + sigma * x_t

    def to_velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        r"""$\hat\epsilon - \hat x_0$, (B, *D): the velocity of the probability flow of $x_t / (\alpha + \sigma)$ in `flow_time`, one
        parametrisation for all models."""
        if self.prediction_type == "flow":
            return self._velocity(output.to(torch.promote_types(x_t.dtype, torch.float32)))
        return self.to_noise(output, x_t, t) - self.to_x0(output, x_t, t)

    def error_weight(self, t: Tensor, weighting: str = "native") -> Tensor:
        r"""What to multiply the squared error of the model's own output with, (B,), to have it in other terms.

        Args:
            weighting: `native`, 1; `eps` and `x0`, the squared error of the implied noise and clean sample, exactly; `elbo`, the x0
                error times minus half the derivative of the SNR by the time in [0, 1], for a table of T levels
                T/2 (SNR(t - 1) - SNR(t)): the bound on -log p(x0) of https://arxiv.org/abs/2107.00630, in nats for a sum over
                dimensions.

        `elbo` is 0 at t = 0 of a table, where the bound has a different term; a flow's is infinite without noise.

        Raises:
            ValueError: an unknown weighting.
        """
        if weighting not in WEIGHTINGS:
            raise ValueError(f"Unknown weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}.")
        alpha, sigma = self._levels(t)
        to_x0, to_eps = self._output_weights(alpha, sigma)
        if weighting == "elbo":
            return _like(alpha / sigma if self.is_flow else to_x0.square() * self._snr_fall(t), t)
        return _like({"native": torch.ones_like(alpha), "eps": to_eps.square(), "x0": to_x0.square()}[weighting], t)

    def _output_weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """How much of a difference between outputs is one between implied clean samples, and between implied noises; (B,) each."""
        if self._space is not None:
            to_x0 = self._space.preconditioning(sigma / alpha)[1].abs()
            return to_x0, to_x0 * alpha / sigma
        one = torch.ones_like(alpha)
        to_x0 = {"flow": sigma, "v_prediction": sigma, "epsilon": sigma / alpha, "sample": one}[self.prediction_type]
        return to_x0, {"flow": alpha, "v_prediction": alpha, "epsilon": one, "sample": alpha / sigma}[self.prediction_type]

    def _snr_fall(self, t: Tensor) -> Tensor:
        """T/2 (SNR(t - 1) - SNR(t)) of a noise table, (B,) float64; 0 at t = 0. Of continuous times, minus half the derivative by the time in [0, 1]."""
        if self._continuous:
            least, most = self.scheduler.time_range
            step, t = 1e-4 * (most - least), t.double().cpu()
            before, after = ((t + side).clamp(least, most) for side in (-step, step))
            return (self.snr(before) - self.snr(after)) / (2 * (after - before)) * (most - least)
        (alpha, sigma), (before_alpha, before_sigma) = self._levels(t), self._levels((t - 1).clamp(min=0))
        return self.num_train_timesteps / 2 * ((before_alpha / before_sigma).square() - (alpha / sigma).square())

    def _velocity(self, output: Tensor) -> Tensor:
        return -output if self._inverted else output

    # --- drawing ---------------------------------------------------------------------------------------------------

    def sample_timesteps(
        self,
        number: int,
        generator: torch.Generator | None = None,
        scheme: str = "uniform",
        *,
        grid: Tensor | None = None,
        stratified: bool = False,
        mean: float = 0.0,
        std: float = 1.0,
        shift: float | None = None,
    ) -> Tensor:
        """Timesteps (number,) at which to train, in the scheduler's units and dtype.

        Args:
            scheme: `uniform` over the training range; `logit_normal`, denser in the middle (SD3,
                https://arxiv.org/abs/2403.03206, section 3.1); `grid`, the solver's own steps.
            grid: (K,) timesteps of a rollout, so with its shift; those of the scheduler's last `set_timesteps` if absent.
            stratified: one draw in each of `number` equal parts of the distribution, in random order: K draws from a grid of K
                are a permutation.
            mean, std: of the logit.
            shift: s -> shift s / (1 + (shift - 1) s) of the time in [0, 1]; the scheduler's own static shift if absent, as in
                training. A grid is not shifted again.

        Raises:
            ValueError: an unknown scheme, or no grid.
        """
        if scheme not in SCHEMES:
            raise ValueError(f"Unknown scheme {scheme!r}; choose one of {', '.join(SCHEMES)}.")
        device = "cpu" if generator is None else generator.device
        u = torch.rand(number, generator=generator, device=device, dtype=torch.float64).cpu()
        if stratified:
            u = (torch.randperm(number, generator=generator, device=device).cpu() + u) / number
        if scheme == "grid":
            grid = self._grid() if grid is None else grid.cpu()
            return grid[(u * len(grid)).long().clamp(max=len(grid) - 1)].to(self._dtype)
        if scheme == "logit_normal":
            u = torch.sigmoid(mean + std * torch.special.ndtri(u))
        shift = self._shift if shift is None else shift
        u = shift * u / (1 + (shift - 1) * u)
        return self._from_fraction(u)

    def _from_fraction(self, u: Tensor) -> Tensor:
        """Times (number,) in the scheduler's units, from u in [0, 1], clean to noisy."""
        if self.is_flow:
            return ((1 - u if self._inverted else u) * self.num_train_timesteps).to(self._dtype)
        if self._continuous:
            least, most = self.scheduler.time_range
            return (least + u * (most - least)).to(self._dtype)
        return (u * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1).to(self._dtype)

    def noised(
        self, x0: Tensor, seeds: list[int], number: int, *, time_seed: int | None = None, stratified: bool = True, **timesteps
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """`number` times (x_t, t, noise) of the batch `x0` (B, *D), each sample's draws from its own seed: they depend on neither
        the batch nor the number of processes, and can be repeated.

        Args:
            seeds: B integers.
            time_seed: one stream of timesteps for all samples, in the place of their own.
            timesteps: arguments of `sample_timesteps`.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        sources = generators if time_seed is None else [torch.Generator().manual_seed(time_seed) for _ in seeds]
        times = [self.sample_timesteps(number, source, stratified=stratified, **timesteps) for source in sources]
        for t in torch.stack(times, 1).to(x0.device):
            noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0.device)
            yield self.add_noise(x0, noise, t), t, noise

    @property
    def _dtype(self) -> torch.dtype:
        return torch.int64 if self.whole_timesteps else torch.float32

    @property
    def _shift(self) -> float:
        """The static shift; dynamic ones belong to the sampler's resolution, not to the training range."""
        return 1.0 if not self.is_flow or self.scheduler.config.use_dynamic_shifting else self.scheduler.shift

    def _grid(self) -> Tensor:
        if getattr(self.scheduler, "num_inference_steps", None) is None:
            raise ValueError("The scheduler has no sampling grid yet: pass grid=trajectory.timesteps, or call set_timesteps first.")
        return self.scheduler.timesteps.cpu()


def _like(level: Tensor, t: Tensor) -> Tensor:
    return level.to(torch.float64 if t.dtype == torch.float64 else torch.float32).to(t.device)


def _check_timesteps(scheduler: FlowMatchSDEScheduler) -> None:
    """Whether timestep = sigma * num_train_timesteps (or its whole part) along a schedule of the scheduler's own kind."""
    probe, number = type(scheduler).from_config(scheduler.config), scheduler.config.num_train_timesteps
    probe.set_timesteps(10, **({"mu": 1.0} if scheduler.config.use_dynamic_shifting else {}))
    error = (probe.timesteps.double() - probe.sigmas[: len(probe.timesteps)].double() * number).abs().max()
    if error > 1 + 1e-6 * number:
        source = (scheduler.config.source or {}).get("_class_name", type(scheduler).__name__)
        raise ValueError(
            f"{source}'s timesteps are not {number} times its sigmas (they are {error:.3g} apart), so a timestep does not tell the noise "
            "level. Give the pipeline a FlowMatchEulerDiscreteScheduler for losses on noised samples."
        )
