"""Each algorithm on a chain of Gaussian steps whose objective is known in closed form. One row an algorithm."""

import copy

import pytest
import torch
from torch import nn

from diffusers_align import GaussianTransition
from diffusers_align.algorithms.advantage_weighted_matching import awm_loss, pseudo_log_prob, unit_advantages
from diffusers_align.algorithms.dance_grpo import best_and_worst
from diffusers_align.algorithms.ddpo import ddpo_loss
from diffusers_align.algorithms.dense_grpo import step_gains
from diffusers_align.algorithms.diffusion_nft import nft_loss, optimality
from diffusers_align.algorithms.dpok import dpok_loss
from diffusers_align.algorithms.flow_cps import flow_cps_loss
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss, official_kl
from diffusers_align.algorithms.grpo_guard import grpo_guard_loss, guard_log_ratio
from diffusers_align.algorithms.mix_grpo import window_at
from diffusers_align.algorithms.mv_grpo import mv_grpo_loss
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.rl import PromptStatistics, batch_advantages, exact_fisher_product, group_advantages, trust_region_step
from diffusers_align.rl.values import ValueBaseline, value_advantages
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

    @torch.no_grad()
    def completion_rewards(self, states, prompt):
        """Rewards of the ODE's completions from each state, (N, STEPS + 1)."""
        rewards = []
        for start in range(STEPS + 1):
            x = states[start]
            for k in range(start, STEPS):
                x = x + (SIGMAS[k + 1] - SIGMAS[k]) * (self.w[k] * x + self.u[k, prompt])
            rewards.append(-(x - TARGETS[prompt]).square().sum(1))
        return torch.stack(rewards, 1)

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
    weighs_steps = False  # whether some steps count more than others, so that only each step's own gradient is the exact one's direction

    def advantages(self, prompt, rewards):
        return batch_advantages(rewards)

    def loss(self, log_prob, old, advantage):
        return reinforce_loss(log_prob, advantage, per_dim=D)


class DDPO:
    updates_a_rollout = 4
    weighs_steps = False

    def __init__(self):
        self.statistics = PromptStatistics(buffer_size=64, min_count=16)

    def advantages(self, prompt, rewards):
        return self.statistics.update([f"prompt {i}" for i in prompt.tolist()], rewards)

    def loss(self, log_prob, old, advantage):
        return ddpo_loss(log_prob, old, advantage, per_dim=D, clip_range=0.1)


class FlowGRPO:
    updates_a_rollout = 4
    weighs_steps = False

    def advantages(self, prompt, rewards):
        return group_advantages(rewards, prompt)

    def loss(self, log_prob, old, advantage):
        return flow_grpo_loss(log_prob, old, advantage, per_dim=D, clip_range=0.1)


class DenseGRPO(FlowGRPO):
    """The ODE's completions are its rewards, and each step has an advantage of its own."""

    def advantages(self, prompt, rewards):
        return group_advantages(step_gains(rewards), prompt, global_std=False)


class MVGRPO:
    """A second view of each sample, under which the reward is half noise."""

    updates_a_rollout = 4
    weighs_steps = False

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def advantages(self, prompt, rewards):
        noisy = rewards + rewards.std() * torch.randn(len(rewards), generator=self.generator, dtype=rewards.dtype)
        views = group_advantages(torch.stack([rewards, noisy], 1), prompt, global_std=False)
        return views[:, None].expand(-1, STEPS, -1)

    def loss(self, log_prob, old, advantage):
        return sum(mv_grpo_loss(log_prob, old, view, num_views=2, per_dim=D, clip_range=0.1) for view in advantage.unbind(1))


class DanceGRPO(FlowGRPO):
    """Half of each group: its best and its worst."""

    def advantages(self, prompt, rewards):
        return best_and_worst(group_advantages(rewards, prompt, global_std=False, ddof=1), prompt, len(rewards) // PROMPTS // 4 * 2)


class MixGRPO(FlowGRPO):
    """Two steps of a sliding window bear the credit."""

    weighs_steps = True

    def __init__(self):
        self.iteration = 0

    def advantages(self, prompt, rewards):
        start, stop = window_at(self.iteration, size=2, first=0, end=STEPS, interval=2)
        self.iteration += 1
        within = torch.tensor([STEPS / 2 * (start <= k < stop) for k in range(STEPS)], dtype=rewards.dtype)
        return group_advantages(rewards, prompt)[:, None] * within


class FlowCPS(FlowGRPO):
    """The ratio on the scale of its official code."""

    weighs_steps = True

    def step_loss(self, k, transition, before, log_prob, old, advantage):
        return flow_cps_loss(log_prob, old, advantage, transition.std, per_dim=D, clip_range=0.05)


class GRPOGuard(FlowGRPO):
    weighs_steps = True

    def step_loss(self, k, transition, before, log_prob, old, advantage):
        log_ratio = guard_log_ratio(log_prob, old, transition.mean, before.mean, transition.std, per_dim=D)
        return grpo_guard_loss(log_ratio, advantage, SIGMAS[k] - SIGMAS[k + 1], clip_range=0.05)


class DPOK:
    """Its baseline is a value network that is fitted on the way."""

    updates_a_rollout = 4
    weighs_steps = False

    def __init__(self):
        self.values = ValueBaseline(STEPS, learning_rate=3e-3, accumulation_steps=1)

    def advantages(self, prompt, rewards, states):
        number, prompts, steps = len(rewards), torch.eye(PROMPTS)[prompt].repeat(STEPS, 1), torch.arange(STEPS).repeat_interleave(len(rewards))
        flat = states[:STEPS].flatten(0, 1)
        self.values.remember(flat, prompts, steps, rewards.repeat(STEPS))
        advantages = value_advantages(rewards, self.values(flat, prompts, steps).reshape(STEPS, number).T)
        self.values.fit(3)
        return advantages

    def loss(self, log_prob, old, advantage):
        return dpok_loss(log_prob, old, advantage, per_dim=D, clip_range=0.1)


ALGORITHMS = [Reinforce, DDPO, FlowGRPO, DanceGRPO, MixGRPO, FlowCPS, GRPOGuard, DenseGRPO, MVGRPO, DPOK]


def advantages_of(chain, algorithm, rollout) -> torch.Tensor:
    """(N,), or (N, STEPS, ...) where steps have credit of their own."""
    states, _, prompt, rewards = rollout
    if isinstance(algorithm, DPOK):
        return algorithm.advantages(prompt, rewards, states)
    return algorithm.advantages(prompt, chain.completion_rewards(states, prompt) if isinstance(algorithm, DenseGRPO) else rewards)


def surrogate(chain, algorithm, rollout, advantage, penalty=None, sampler=None) -> torch.Tensor:
    """`sampler` is the chain as it was when the rollout was made; the chain itself if absent."""
    states, old, prompt, _ = rollout
    loss = 0
    for k in range(STEPS):
        transition, log_prob = (t := chain.transition(k, states[k], prompt)), t.log_prob(states[k + 1])
        credit = advantage if advantage.ndim == 1 else advantage[:, k]
        if hasattr(algorithm, "step_loss"):
            with torch.no_grad():
                before = (sampler or chain).transition(k, states[k], prompt)
            loss = loss + algorithm.step_loss(k, transition, before, log_prob, old[k], credit).mean()
        else:
            loss = loss + algorithm.loss(log_prob, old[k], credit).mean()
        if penalty:
            loss = loss + penalty(k, states[k], prompt, transition).mean()
    return loss


def gradient(loss, chain) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(chain.parameters()))])


def of_each_step(flat) -> torch.Tensor:
    """A gradient's rows by solver step, (STEPS, 1 + PROMPTS * D)."""
    return torch.cat([flat[:STEPS, None], flat[STEPS:].reshape(STEPS, -1)], 1)


def train(algorithm, seed, updates=200, penalty=None) -> tuple[Chain, list[float]]:
    chain, generator = Chain(), torch.Generator().manual_seed(seed)
    optimizer, history = torch.optim.Adam(chain.parameters(), lr=0.05), [Chain().objective().item()]
    for _ in range(updates // algorithm.updates_a_rollout):
        rollout = chain.rollout(192, generator)
        advantage, sampler = advantages_of(chain, algorithm, rollout), copy.deepcopy(chain)
        for _ in range(algorithm.updates_a_rollout):
            optimizer.zero_grad()
            surrogate(chain, algorithm, rollout, advantage, penalty, sampler).backward()
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
    estimate = -gradient(surrogate(chain, algorithm, rollout, advantages_of(chain, algorithm, rollout)), chain)
    exact = gradient(chain.objective(), chain)
    if algorithm.weighs_steps:
        estimate, exact = of_each_step(estimate), of_each_step(exact)
        trained = estimate.norm(dim=1) > 0
        assert trained.sum() >= 2
        estimate, exact = estimate[trained], exact[trained]
    assert torch.cosine_similarity(estimate, exact, dim=-1).min() > 0.9


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


def trust_region(chain, rollout, max_kl) -> dict[str, float]:
    """A step on one rollout: KL and Fisher matrix of trajectories, summed over steps, mean over samples."""
    (states, old, prompt, rewards), parameters = rollout, list(chain.parameters())
    before, advantage = [chain.transition(k, states[k], prompt) for k in range(STEPS)], group_advantages(rewards, prompt)

    def loss():
        ratios = [(chain.transition(k, states[k], prompt).log_prob(states[k + 1]) - old[k]).exp() for k in range(STEPS)]
        return -(advantage * sum(ratios)).mean()

    def sweep(on_step):
        for k in range(STEPS):
            transition = chain.transition(k, states[k], prompt)
            on_step(transition.mean, transition.std)

    @torch.no_grad()
    def evaluate():
        return loss().item(), sum(before[k].kl(chain.transition(k, states[k], prompt)).mean().item() for k in range(STEPS))

    def product(vector):
        return exact_fisher_product(sweep, parameters, vector) / len(rewards)

    return trust_region_step(parameters, lambda: (loss().item(), gradient(loss(), chain)), product, evaluate, max_kl=max_kl, damping=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trust_region_steps_climb_to_the_known_optimum(seed):
    chain, generator = Chain(), torch.Generator().manual_seed(seed)
    history = [chain.objective().item()]
    for _ in range(32):
        report = trust_region(chain, chain.rollout(192, generator), max_kl=0.05)
        assert report["accepted"] == 1 and report["kl"] <= 0.05 * (1 + 1e-6) and report["improvement"] > 0
        history.append(chain.objective().item())
    gap = [OPTIMUM - value for value in history]
    assert min(gap) > 0
    assert gap[0] > 2 * gap[8] > 2 * gap[16]
    assert gap[-1] < 0.01 * gap[0]


# --- on the forward process: samples of the ODE, noised anew -------------------------------------------------------------


class Flow(Chain):
    """The probability-flow ODE of the same linear velocity, which starts as the exact one of N(0, I) data."""

    def __init__(self):
        super().__init__()
        sigmas = torch.tensor(SIGMAS[:-1], dtype=torch.float64)
        self.w.data = (2 * sigmas - 1) / (sigmas.square() + (1 - sigmas).square())

    @torch.no_grad()
    def sample(self, number, generator):
        """Final states (N, D), prompts (N,), rewards (N,)."""
        prompt = torch.arange(number) % PROMPTS
        x = torch.randn(number, D, generator=generator, dtype=torch.float64)
        for k in range(STEPS):
            x = x + (SIGMAS[k + 1] - SIGMAS[k]) * (self.w[k] * x + self.u[k, prompt])
        return x, prompt, -(x - TARGETS[prompt]).square().sum(1)

    def objective(self) -> torch.Tensor:
        mean, scale = torch.zeros(PROMPTS, D, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        for k in range(STEPS):
            dt = SIGMAS[k + 1] - SIGMAS[k]
            mean, scale = (1 + dt * self.w[k]) * mean + dt * self.u[k], (1 + dt * self.w[k]) * scale
        return -(mean - TARGETS).square().sum(1).mean() - D * scale.square()


def nft(x_t, sigma, velocity, old_velocity, x0, noise, advantage):
    return nft_loss(x_t - sigma * velocity, x_t - sigma * old_velocity, x0, optimality(advantage), beta=0.5)


def awm(x_t, sigma, velocity, old_velocity, x0, noise, advantage):
    time = torch.full((len(x0),), sigma, dtype=x0.dtype)
    log_prob, old = (pseudo_log_prob(v, noise - x0, time, weighting="t") for v in (velocity, old_velocity))
    return awm_loss(log_prob, old, unit_advantages(advantage))


def forward_surrogate(loss, flow, old, batch, generator) -> torch.Tensor:
    x0, prompt, rewards = batch
    advantage, noise, total = group_advantages(rewards, prompt), torch.randn(STEPS, *x0.shape, generator=generator, dtype=x0.dtype), 0
    for k, sigma in enumerate(SIGMAS[:-1]):
        x_t = (1 - sigma) * x0 + sigma * noise[k]
        velocity, before = (policy.w[k] * x_t + policy.u[k, prompt] for policy in (flow, old))
        total = total + loss(x_t, sigma, velocity, before.detach(), x0, noise[k], advantage).mean()
    return total


@pytest.mark.parametrize("loss", [nft, awm])
def test_expected_update_on_noised_samples_is_an_ascent_direction(loss):
    flow, generator = Flow(), torch.Generator().manual_seed(0)
    estimate = -gradient(forward_surrogate(loss, flow, flow, flow.sample(30_000, generator), generator), flow)
    exact = gradient(flow.objective(), flow)
    # Not its direction: a matching loss weighs the steps by their noise, the objective by their length.
    assert torch.cosine_similarity(estimate, exact, dim=0) > 0.5


def train_on_noised_samples(loss, seed, rollouts=60) -> list[float]:
    """What the flow's objective lacks to its optimum of 0, after each rollout."""
    flow, generator = Flow(), torch.Generator().manual_seed(seed)
    optimizer, gap = torch.optim.Adam(flow.parameters(), lr=0.02), [-flow.objective().item()]
    for _ in range(rollouts):
        old, batch = copy.deepcopy(flow), flow.sample(192, generator)
        for _ in range(2):
            optimizer.zero_grad()
            forward_surrogate(loss, flow, old, batch, generator).backward()
            optimizer.step()
        gap.append(-flow.objective().item())
    return gap


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loss", [nft, awm])
def test_training_on_noised_samples_climbs(loss, seed):
    gap = train_on_noised_samples(loss, seed)
    assert gap[0] > 1.5 * gap[15] > 1.5 * gap[30]
    assert gap[-1] < 0.2 * gap[0]
