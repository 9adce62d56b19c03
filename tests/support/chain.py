"""A chain of Gaussian steps whose objective is known in closed form: Flow-GRPO's SDE with a linear velocity."""

import torch
from torch import nn

from diffusers_align import GaussianTransition
from diffusers_align.schedulers.kernels import flow_grpo as flow_grpo_kernel

SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]


STEPS = len(SIGMAS) - 1


TARGETS = torch.tensor([[1.5, 0.0], [-1.5, 0.5], [0.0, -1.5]], dtype=torch.float64)


PROMPTS, D = TARGETS.shape


KERNELS = [flow_grpo_kernel(SIGMAS[k], SIGMAS[k + 1], 0.7, SIGMAS[1]) for k in range(STEPS)]


class Chain(nn.Module):
    """Flow-GRPO's SDE with a velocity that is linear in the state: v(x, k, c) = w_k x + u_kc."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(STEPS, dtype=torch.float64))
        self.u = nn.Parameter(torch.zeros(STEPS, PROMPTS, D, dtype=torch.float64))

    def transition(self, k, x, prompt) -> GaussianTransition:
        kernel, velocity = KERNELS[k], self.w[k] * x + self.u[k, prompt]
        return GaussianTransition(kernel.x_weight * x + kernel.v_weight * velocity, torch.full((1, 1), kernel.std, dtype=x.dtype))

    @torch.no_grad()
    def rollout(self, number, generator):
        """States (K + 1, N, D), log-probabilities (K, N), prompts (N,), rewards (N,)."""
        prompt = torch.arange(number) % PROMPTS
        states, log_probs = [torch.randn(number, D, generator=generator, dtype=torch.float64)], []
        for k in range(STEPS):
            transition = self.transition(k, states[-1], prompt)
            states.append(transition.sample(generator))
            log_probs.append(transition.log_prob(states[-1]))
        return torch.stack(states), torch.stack(log_probs), prompt, -(states[-1] - TARGETS[prompt]).square().sum(1)

    @torch.no_grad()
    def completion_rewards(self, states, prompt):
        """Rewards of the ODE's completions from each state, (N, STEPS + 1)."""
        return torch.stack([self.completion_reward(states[start], start, prompt) for start in range(STEPS + 1)], 1)

    @torch.no_grad()
    def completion_reward(self, x, start, prompt):
        for k in range(start, STEPS):
            x = x + (SIGMAS[k + 1] - SIGMAS[k]) * (self.w[k] * x + self.u[k, prompt])
        return -(x - TARGETS[prompt]).square().sum(1)

    def objective(self) -> torch.Tensor:
        """E[-|x_0 - target|^2] over prompts and noise: a linear Gaussian chain keeps a mean for each prompt and one variance."""
        mean, variance = torch.zeros(PROMPTS, D, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        for k, kernel in enumerate(KERNELS):
            slope = kernel.x_weight + kernel.v_weight * self.w[k]
            mean, variance = slope * mean + kernel.v_weight * self.u[k], slope**2 * variance + kernel.std**2
        return -(mean - TARGETS).square().sum(1).mean() - D * variance


# The last step can land on the target, give or take its own noise.
OPTIMUM = -D * KERNELS[-1].std ** 2


def gradient(loss, chain) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(chain.parameters()))])


def perturbed_chain() -> Chain:
    chain, generator = Chain(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return chain
