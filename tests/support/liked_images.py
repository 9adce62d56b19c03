"""A linear model and its reference, on images of which some are liked, in float64."""

import torch
from linear_models import random

from diffusers_align.rl.matching import matching_error

B, D, BETA = 8, 4, 3.0


class Model:
    """A linear model of the target and its reference."""

    def __init__(self, at_reference=False):
        self.x, self.y = random(2, B, D)
        self.reference = random(D, D, seed=1) / 2
        self.weight = (self.reference + (0 if at_reference else 0.3) * random(D, D, seed=2)).requires_grad_()
        self.desirable = torch.arange(B) % 3 != 0

    def errors(self):
        return matching_error(self.x @ self.weight, self.y), matching_error(self.x @ self.reference, self.y)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.weight, retain_graph=True)[0]
