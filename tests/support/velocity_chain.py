"""A small chain of a velocity model in float64, and its gradients by definition."""

import torch
from torch import nn

STEPS, BATCH, D = 6, 3, 4
SIGMAS = torch.linspace(1, 0, STEPS + 1).tolist()
EXACT = {"rtol": 0, "atol": 1e-12}


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(D + 1, 8), nn.Tanh(), nn.Linear(8, D)).double()

    def forward(self, x, sigma):
        return self.layers(torch.cat([x, torch.full_like(x[:, :1], sigma)], 1))


def noise(seed=1):
    return torch.randn(BATCH, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reward(x):
    return -(x - 1).square().sum(1) + x.prod(1)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def gradient(loss, model):
    return flat(torch.autograd.grad(loss.sum(), list(model.parameters())))


def chain(model, grad_steps, *, x=None, detach_input=False, call=None, stop_step=None):
    """The final state, by the definition: other calls have no graph, the solver's own arithmetic always has."""
    x, call = noise() if x is None else x, call or model
    for k in range(STEPS):
        with torch.set_grad_enabled(k in grad_steps):
            velocity = call(x.detach() if detach_input else x, SIGMAS[k])
        if k == stop_step:
            return x - SIGMAS[k] * velocity
        x = x + (SIGMAS[k + 1] - SIGMAS[k]) * velocity
    return x


def step_terms(model):
    """Each step's share of the whole gradient: as if each had parameters of its own."""
    copies = [[p.detach().clone().requires_grad_() for p in model.parameters()] for _ in range(STEPS)]
    names, x = [name for name, _ in model.named_parameters()], noise()
    for k in range(STEPS):
        x = x + (SIGMAS[k + 1] - SIGMAS[k]) * torch.func.functional_call(model, dict(zip(names, copies[k])), (x, SIGMAS[k]))
    return [flat(g) for g in zip(*[iter(torch.autograd.grad(reward(x).sum(), [p for c in copies for p in c]))] * len(names))]


def final_gradient(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(reward(x).sum(), x)[0]


# --- which steps ---------------------------------------------------------------------------------------------------------


def drawn(choose, number=2000):
    generator = torch.Generator().manual_seed(0)
    return [choose(generator) for _ in range(number)]
