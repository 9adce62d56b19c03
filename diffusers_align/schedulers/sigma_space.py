r"""Noise levels without a table of whole timesteps: what the sigmas and times of a stock scheduler mean, and the Gaussian step between two sigmas.

A state is $x = \alpha\,(x_0 + \sigma\epsilon)$. Schedulers in EDM's and k-diffusion's terms let it explode, $\alpha = 1$ (Euler, Heun, KDPM2, LMS,
EDM's, StableAudio's); those of the DPM-Solver kind (UniPC, DEIS too) keep its variance, $\alpha = 1/\sqrt{1+\sigma^2}$, at the same sigmas. The model
is preconditioned (Karras et al., https://arxiv.org/abs/2206.00364, eq. 7): $\hat x_0 = c_{skip}\,x/\alpha + c_{out}\,$output.

| what the model predicts | $c_{skip}$ | $c_{out}$ |
|---|---|---|
| `epsilon` | $1$ | $-\sigma$ |
| `v_prediction` | $1/(1+\sigma^2)$ | $-\sigma/\sqrt{1+\sigma^2}$ |
| `sample` | $0$ | $1$ |
| EDM's with $\sigma_d$ | $\sigma_d^2/(\sigma^2+\sigma_d^2)$ | $\pm\sigma\sigma_d/\sqrt{\sigma^2+\sigma_d^2}$ |
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AncestralStep(NamedTuple):
    """Where a step from sigma ends: the noise that it keeps, and the noise that it adds; the squares of both add up to those of the next sigma."""

    kept: float
    added: float


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> AncestralStep:
    r"""k-diffusion's `get_ancestral_step`: $\sigma_{up} = \eta\,\sigma'\sqrt{1 - \sigma'^2/\sigma^2}$ and $\sigma_{down}^2 = \sigma'^2 - \sigma_{up}^2$.

    With eta = 1 the step $\hat x_0 + \sigma_{down}\hat\epsilon + \sigma_{up} z$ is the exact posterior $q(x_{\sigma'} \mid x_\sigma, \hat x_0)$ of the
    variance-exploding process (Song et al., https://arxiv.org/abs/2011.13456, appendix F), and for any eta the noise is right by construction: it is DDIM's
    kernel (https://arxiv.org/abs/2010.02502, eq. 16) in other coordinates. No noise where sigma does not fall.
    """
    if not 0 < sigma_next < sigma:
        return AncestralStep(sigma_next, 0.0)
    added = eta * sigma_next * math.sqrt((1 - sigma_next / sigma) * (1 + sigma_next / sigma))
    return AncestralStep(math.sqrt(max(0.0, sigma_next**2 - added**2)), added)


class SigmaSpace:
    """What the noise levels and the times of a stock scheduler mean. Methods take and return tensors of any shape, in float64.

    Attributes:
        exploding: whether alpha is 1.
        times: what the model is told of a noise level: `table`, a timestep of training or a point between two, by the logarithm of sigma; `log`,
            log(sigma) / 4, and `atan`, 2/pi atan(sigma), EDM's ways; `linear`, sigma times the number of timesteps.
    """

    def __init__(self, stock):
        self.config, name = stock.config, type(stock).__name__
        self.exploding = float(getattr(stock, "init_noise_sigma", 0.0)) != 1.0
        self.edm = hasattr(stock, "precondition_outputs")
        self.scaled = hasattr(stock, "scale_model_input") and self.exploding
        self.prediction_type = "epsilon" if name.startswith("FlowMatch") else self.config.get("prediction_type", "epsilon")
        continuous = self.config.get("timestep_type") == "continuous" and self.prediction_type == "v_prediction"
        self.times = "atan" if name.startswith("Cosine") else "log" if self.edm or continuous else "linear" if name.startswith("FlowMatch") else "table"
        self.log_table: Tensor | None = None
        if getattr(stock, "alphas_cumprod", None) is not None:
            alphas = stock.alphas_cumprod.double().cpu()
            self.log_table = ((1 - alphas) / alphas).sqrt().log()

    # --- times ---------------------------------------------------------------------------------------------------------

    def sigma_of(self, times: Tensor) -> Tensor:
        """The noise level at which the model is asked at `times`."""
        times = times.detach().to("cpu", torch.float64)
        if self.times == "log":
            return (4 * times).exp()
        if self.times == "atan":
            return (times * math.pi / 2).tan()
        if self.times == "linear":
            return times / self.config.num_train_timesteps
        below = times.floor().long().clamp(0, len(self.log_table) - 2)
        return torch.lerp(self.log_table[below], self.log_table[below + 1], times - below).exp()

    def time_of(self, sigma: float) -> float:
        """`sigma_of`'s inverse, within the levels that the model has."""
        if self.times == "log":
            return math.log(sigma) / 4
        if self.times == "atan":
            return math.atan(sigma) * 2 / math.pi
        if self.times == "linear":
            return sigma * self.config.num_train_timesteps
        above = int(torch.searchsorted(self.log_table, math.log(sigma)).clamp(1, len(self.log_table) - 1))
        low, high = self.log_table[above - 1 : above + 1].tolist()
        return above - 1 + min(1.0, max(0.0, (math.log(sigma) - low) / (high - low)))

    @property
    def time_range(self) -> tuple[float, float]:
        """The times with the least and the most noise: of the table, or of the config's sigma_min and sigma_max."""
        if self.times == "table":
            return 0.0, float(len(self.log_table) - 1)
        ends = self.config.get("sigma_min"), self.config.get("sigma_max")
        low, high = (float(self.log_table[i].exp()) if end is None else end for i, end in zip((0, -1), ends))
        return self.time_of(low), self.time_of(high)

    # --- weights -------------------------------------------------------------------------------------------------------

    def alpha(self, sigma: Tensor) -> Tensor:
        """Weight of the clean sample in a state, whose noise has the weight alpha sigma."""
        return torch.ones_like(sigma) if self.exploding else (1 + sigma.square()).rsqrt()

    def preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out."""
        if self.edm:
            data, sign = self.config.sigma_data, -1 if self.prediction_type == "v_prediction" else 1
            total = sigma.square() + data**2
            return data**2 / total, sign * sigma * data * total.rsqrt()
        if self.prediction_type == "v_prediction":
            return 1 / (1 + sigma.square()), -sigma * (1 + sigma.square()).rsqrt()
        if self.prediction_type in ("sample", "original_sample"):
            return torch.zeros_like(sigma), torch.ones_like(sigma)
        return torch.ones_like(sigma), -sigma

    def target_weights(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What a perfect model answers, as weights of the clean sample and of the noise."""
        c_skip, c_out = self.preconditioning(sigma)
        return (1 - c_skip) / c_out, -c_skip * sigma / c_out

    def clean_weights(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample that an output implies, as weights of the state and of the output."""
        c_skip, c_out = self.preconditioning(sigma)
        return c_skip / self.alpha(sigma), c_out

    def noise_weights(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that an output implies, as weights of the state and of the output."""
        c_skip, c_out = self.preconditioning(sigma)
        return (1 - c_skip) / (self.alpha(sigma) * sigma), -c_out / sigma


def columns(levels: Tensor, sample: Tensor) -> Tensor:
    """One level, or one of each sample (B,), to multiply with `sample` (B, *D)."""
    levels = levels.to(sample.dtype).to(sample.device)
    return levels.reshape(-1, *[1] * (sample.ndim - 1)) if levels.ndim else levels


def implied_output(scheduler, clean: Tensor, sample: Tensor) -> Tensor:
    """The model's output (B, *D) that implies the clean sample `clean` at the scheduler's present step, float32. The scheduler is EDM's, or a twin of it."""
    weights = SigmaSpace(scheduler).clean_weights(scheduler.sigmas[scheduler.step_index].double().cpu())
    state, output = (columns(weight, sample.float()) for weight in weights)
    return (clean.float() - state * sample.float()) / output
