"""Each algorithm on a chain of Gaussian steps whose objective is known in closed form. One row an algorithm."""

import pytest
import torch
from torch import nn

from diffusers_align import GaussianTransition
from diffusers_align.algorithms.ddpo import ddpo_loss
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss, official_kl
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.rl import PromptStatistics, batch_advantages, group_advantages
from diffusers_align.schedulers.kernels import flow_grpo as flow_grpo_kernel

torch.set_num_threads(1)
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

    def objective(self) -> torch.Tensor:
        """E[-|x_0 - target|^2] over prompts and noise: a linear Gaussian chain keeps a mean for each prompt and one variance."""
        mean, variance = torch.zeros(PROMPTS, D, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        for k, kernel in enumerate(KERNELS):
            slope = kernel.x_weight + kernel.v_weight * self.w[k]
            mean, variance = slope * mean + kernel.v_weight * self.u[k], slope**2 * variance + kernel.std**2
        return -(mean - TARGETS).square().sum(1).mean() - D * variance


# The last step can land on the target, give or take its own noise.
OPTIMUM = -D * KERNELS[-1].std ** 2


class Reinforce:
    updates_a_rollout = 1

    def advantages(self, prompt, rewards):
        return batch_advantages(rewards)

    def loss(self, log_prob, old, advantage):
        return reinforce_loss(log_prob, advantage, per_dim=D)


class DDPO:
    updates_a_rollout = 4

    def __init__(self):
        self.statistics = PromptStatistics(buffer_size=64, min_count=16)

    def advantages(self, prompt, rewards):
        return self.statistics.update([f"prompt {i}" for i in prompt.tolist()], rewards)

    def loss(self, log_prob, old, advantage):
        return ddpo_loss(log_prob, old, advantage, per_dim=D, clip_range=0.1)


class FlowGRPO:
    updates_a_rollout = 4

    def advantages(self, prompt, rewards):
        return group_advantages(rewards, prompt)

    def loss(self, log_prob, old, advantage):
        return flow_grpo_loss(log_prob, old, advantage, per_dim=D, clip_range=0.1)


ALGORITHMS = [Reinforce, DDPO, FlowGRPO]


def surrogate(chain, algorithm, rollout, advantage, penalty=None) -> torch.Tensor:
    states, old, prompt, _ = rollout
    loss = 0
    for k in range(STEPS):
        transition = chain.transition(k, states[k], prompt)
        loss = loss + algorithm.loss(transition.log_prob(states[k + 1]), old[k], advantage).mean()
        if penalty:
            loss = loss + penalty(k, states[k], prompt, transition).mean()
    return loss


def gradient(loss, chain) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(chain.parameters()))])


def train(algorithm, seed, updates=200, penalty=None) -> tuple[Chain, list[float]]:
    chain, generator = Chain(), torch.Generator().manual_seed(seed)
    optimizer, history = torch.optim.Adam(chain.parameters(), lr=0.05), [Chain().objective().item()]
    for _ in range(updates // algorithm.updates_a_rollout):
        rollout = chain.rollout(192, generator)
        advantage = algorithm.advantages(rollout[2], rollout[3])
        for _ in range(algorithm.updates_a_rollout):
            optimizer.zero_grad()
            surrogate(chain, algorithm, rollout, advantage, penalty).backward()
            optimizer.step()
        history.append(chain.objective().item())
    return chain, history


def perturbed_chain() -> Chain:
    chain, generator = Chain(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return chain


def test_the_closed_form_is_the_mean_reward():
    chain = perturbed_chain()
    rewards = chain.rollout(60_000, torch.Generator().manual_seed(0))[3]
    assert abs(rewards.mean() - chain.objective().detach()) < 4 * rewards.std() / len(rewards) ** 0.5


def test_the_score_function_estimator_is_unbiased():
    chain, generator, batches = perturbed_chain(), torch.Generator().manual_seed(0), []
    exact = gradient(chain.objective(), chain)
    for _ in range(100):
        states, _, prompt, rewards = chain.rollout(600, generator)
        log_prob = sum(chain.transition(k, states[k], prompt).log_prob(states[k + 1]) for k in range(STEPS))
        batches.append(-gradient(reinforce_loss(log_prob, rewards + 2).mean(), chain))
    estimates = torch.stack(batches)
    z = (estimates.mean(0) - exact) / (estimates.std(0) / 10)
    assert z.abs().max() < 4
    assert z.square().mean() < 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("make_chain", [Chain, perturbed_chain])
def test_expected_update_is_an_ascent_direction_of_the_exact_objective(algorithm, make_chain):
    chain, algorithm = make_chain(), algorithm()
    rollout = chain.rollout(6000, torch.Generator().manual_seed(0))
    estimate = -gradient(surrogate(chain, algorithm, rollout, algorithm.advantages(rollout[2], rollout[3])), chain)
    exact = gradient(chain.objective(), chain)
    assert torch.cosine_similarity(estimate, exact, dim=0) > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_climbs_to_the_known_optimum(algorithm, seed):
    _, history = train(algorithm(), seed)
    gap = [OPTIMUM - value for value in history]
    assert min(gap) > 0
    quarter = len(gap) // 4
    assert gap[0] > 2 * gap[quarter] > 2 * gap[2 * quarter]
    assert gap[-1] < 0.1 * gap[0]


def test_kl_penalty_holds_the_policy_near_its_reference():
    reference, rewards, distances = Chain(), [], []
    for beta in (0.0, 1.0, 100.0):

        def penalty(k, x, prompt, transition):
            return beta * official_kl(transition.mean, reference.transition(k, x, prompt).mean.detach(), transition.std, SIGMAS[k] - SIGMAS[k + 1])

        chain, history = train(FlowGRPO(), 0, updates=100, penalty=penalty)
        states, _, prompt, _ = chain.rollout(3000, torch.Generator().manual_seed(1))
        transitions = [(chain.transition(k, states[k], prompt), reference.transition(k, states[k], prompt)) for k in range(STEPS)]
        distances.append(sum(p.kl(q).mean().item() for p, q in transitions))
        rewards.append(history[-1])
    assert rewards[0] > rewards[1] > rewards[2]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.01 * distances[0]
