"""A linear model of targets and its reference, on noised winners and losers, in float64."""

import math

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.nn import functional as F

from diffusers_align import sde_twin
from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.algorithms.dspo import dspo_loss
from diffusers_align.algorithms.linear_dpo import linear_dpo_loss
from diffusers_align.algorithms.mapo import mapo_loss
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.rl.matching import matching_error
from diffusers_align.rl.pair_losses import PAIR_LOSSES

PAIRS, D = 6, 4
BETA = 5.0
NAN = math.nan


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


class Model:
    """A linear model of the target and its reference, on noised winners and losers."""

    def __init__(self, at_reference=False, pairs=PAIRS):
        self.x_w, self.x_l, self.y_w, self.y_l = random(4, pairs, D)
        self.reference = random(D, D, seed=1) / 2
        self.weight = (self.reference + (0 if at_reference else 0.3) * random(D, D, seed=2)).requires_grad_()

    def errors(self, rows=slice(None)):
        """(error_w, error_l, ref_error_w, ref_error_l)."""
        sides = ((self.x_w[rows], self.y_w[rows]), (self.x_l[rows], self.y_l[rows]))
        return [matching_error(x @ weight, y) for weight in (self.weight, self.reference) for x, y in sides]

    def ref_distance(self):
        return matching_error(self.x_w @ self.weight, self.x_w @ self.reference)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.weight, retain_graph=True)[0]


def official(error_w, error_l, ref_error_w, ref_error_l, beta):
    """Salesforce's lines: inside term, loss, implicit accuracy."""
    model_diff, ref_diff = error_w - error_l, ref_error_w - ref_error_l
    inside = -0.5 * beta * (model_diff - ref_diff)
    return inside, -1 * F.logsigmoid(inside).mean(), (inside > 0).sum() / inside.size(0)


# --- invariances, precision, two passes ----------------------------------------------------------------------------------


LOSSES = {
    **{kind: lambda w, l_, rw, rl, k, kind=kind: diffusion_dpo_loss(w, l_, rw, rl, beta=BETA, kind=kind) for kind in PAIR_LOSSES},
    "soft": lambda w, l_, rw, rl, k: diffusion_dpo_loss(w, l_, rw, rl, beta=BETA, label=0.7, sft_weight=0.3),
    "mapo": lambda w, l_, rw, rl, k: mapo_loss(w, l_, num_timesteps=10),
    "linear": lambda w, l_, rw, rl, k: linear_dpo_loss(w, l_, rw, rl, beta=0.5),
    "dspo": lambda w, l_, rw, rl, k: dspo_loss(w, l_, rw, rl, k, beta=BETA, dspo_beta=0.6),
    "dspo distance": lambda w, l_, rw, rl, k: dspo_loss(w, l_, rw, rl, k, beta=BETA, objective="distance"),
}


# --- parametrisations ----------------------------------------------------------------------------------------------------


TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROCESSES = {
    "flow": ForwardProcess(sde_twin(FlowMatchEulerDiscreteScheduler())),
    "inverted flow": ForwardProcess(sde_twin(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))),
    **{kind: ForwardProcess(sde_twin(DDIMScheduler(prediction_type=kind, **TABLE))) for kind in ("epsilon", "v_prediction", "sample")},
}
TIMES = torch.tensor([999.0, 700.0, 300.0, 40.0, 1.0])


def noised(forward):
    x0, noise, output = random(3, 5, D)
    return x0, noise, output, forward.add_noise(x0, noise, TIMES)


# --- InPO ------------------------------------------------------------------------------------------------------------------


def levels_of(forward):
    return lambda t: (forward.alpha(t), forward.sigma(t))
