"""Each algorithm on a chain of Gaussian steps whose objective is known in closed form. One row per algorithm."""

import copy

import pytest
import torch
from chain import KERNELS, OPTIMUM, PROMPTS, SIGMAS, STEPS, TARGETS, Chain, D, gradient, perturbed_chain
from oracles import euler_step, exact_fisher_product, states_forwards
from torch import nn

from diffusers_align.algorithms.adjoint_matching import adjoint_matching_loss, lean_adjoints, terminal_adjoint
from diffusers_align.algorithms.advantage_weighted_matching import awm_loss, pseudo_log_prob, unit_advantages
from diffusers_align.algorithms.alignprop import alignprop_loss, truncation
from diffusers_align.algorithms.best_of_n import best
from diffusers_align.algorithms.continuous_adjoint import adjoint_gradient
from diffusers_align.algorithms.d3po import d3po_loss
from diffusers_align.algorithms.dance_grpo import best_and_worst
from diffusers_align.algorithms.ddpo import ddpo_loss
from diffusers_align.algorithms.dense_grpo import step_gains
from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.algorithms.diffusion_kto import ReferencePoint, kto_loss
from diffusers_align.algorithms.diffusion_nft import nft_loss, optimality
from diffusers_align.algorithms.diffusion_sdpo import safeguard_scale, scale_gradient
from diffusers_align.algorithms.discrete_adjoint_matching import generalized_kl_loss, log_adjoint, log_weight
from diffusers_align.algorithms.dpok import dpok_loss
from diffusers_align.algorithms.draft import draft_loss, low_variance_loss, renoised
from diffusers_align.algorithms.draft import grad_steps as last_steps
from diffusers_align.algorithms.drtune import grad_steps as sparse_steps
from diffusers_align.algorithms.dspo import dspo_loss
from diffusers_align.algorithms.flow_cps import flow_cps_loss
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss, official_kl
from diffusers_align.algorithms.grpo_guard import grpo_guard_loss, guard_log_ratio
from diffusers_align.algorithms.guidance import Guidance, Level, guide, output_change, preset
from diffusers_align.algorithms.inpo import invert, inverted_noise
from diffusers_align.algorithms.linear_dpo import linear_dpo_loss
from diffusers_align.algorithms.mapo import mapo_loss
from diffusers_align.algorithms.mix_grpo import window_at
from diffusers_align.algorithms.mv_grpo import mv_grpo_loss
from diffusers_align.algorithms.noise_optimization import ascend, settings
from diffusers_align.algorithms.particle_steering import initial_weights, log_evidence, reweight
from diffusers_align.algorithms.particle_steering import resample as resample_particles
from diffusers_align.algorithms.preference_flow_matching import COUPLINGS, couple, interpolate, pfm_loss, transport
from diffusers_align.algorithms.refl import middle_step, refl_loss
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.algorithms.reward_weighted_regression import reward_weighted_loss, reward_weights
from diffusers_align.algorithms.spo import resample, spo_loss, step_pairs
from diffusers_align.algorithms.srpo import discounts, recovered_sample, semantic_relative_preference, srpo_loss
from diffusers_align.algorithms.svdd import choose
from diffusers_align.algorithms.vader import grad_steps as random_steps
from diffusers_align.algorithms.vader import vader_loss
from diffusers_align.algorithms.value_steering import candidates_value, q_targets, value_loss
from diffusers_align.rl import PromptStatistics, batch_advantages, group_advantages, trust_region_step
from diffusers_align.rl.matching import matching_error
from diffusers_align.rl.reward_maps import RewardMap
from diffusers_align.rl.values import ValueBaseline, value_advantages
from diffusers_align.schedulers.kernels import memoryless as memoryless_kernel

torch.set_num_threads(1)


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


def judged_pairs(advantage):
    """Indices of winners and losers: sample i against sample i + N/2, of the same prompt."""
    half = len(advantage) // 2
    first, second = torch.arange(half), torch.arange(half, 2 * half)
    better = advantage[first] >= advantage[second]
    return torch.where(better, first, second), torch.where(better, second, first)


class D3PO(FlowGRPO):
    """The better of two samples of a prompt, step by step, against the sampler as the reference."""

    def loss(self, log_prob, old, advantage):
        w, l_ = judged_pairs(advantage)
        return d3po_loss(log_prob[w], log_prob[l_], old[w], old[l_], per_dim=D, beta=1.0)


ALGORITHMS = [Reinforce, DDPO, FlowGRPO, DanceGRPO, MixGRPO, FlowCPS, GRPOGuard, DenseGRPO, MVGRPO, DPOK, D3PO]


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


# --- pairs of steps from one state ---------------------------------------------------------------------------------------


def spo_rollout(chain, number, generator):
    """At each step, four candidates from one state, judged by their ODE's end: steps (k, x, better, worse, prompt) of the kept pairs."""
    prompt, generators = torch.arange(number) % PROMPTS, [generator] * number
    x, steps = torch.randn(number, D, generator=generator, dtype=torch.float64), []
    with torch.no_grad():
        for k in range(STEPS):
            transition = chain.transition(k, x, prompt)
            candidates = torch.stack([transition.sample(generator) for _ in range(4)], 1)
            scores = torch.stack([chain.completion_reward(candidate, k + 1, prompt) for candidate in candidates.unbind(1)], 1)
            pairs, every = step_pairs(scores, threshold=0.3), torch.arange(number)
            kept = every[pairs.keep]
            steps.append((k, x[kept], candidates[kept, pairs.winner[kept]], candidates[kept, pairs.loser[kept]], prompt[kept]))
            x = candidates[every, resample(number, 4, generators)]
    return steps


def spo_surrogate(chain, old, steps):
    total = 0
    for k, x, better, worse, prompt in steps:
        transition = chain.transition(k, x, prompt)
        with torch.no_grad():
            before = old.transition(k, x, prompt)
        log_probs = [t.log_prob(state) for t in (transition, before) for state in (better, worse)]
        total = total + spo_loss(*log_probs, per_dim=D, beta=1.0).mean()
    return total


@pytest.mark.parametrize("make_chain", [Chain, perturbed_chain])
def test_pairs_from_one_state_are_an_ascent_direction_at_each_step(make_chain):
    chain = make_chain()
    estimate = -gradient(spo_surrogate(chain, chain, spo_rollout(chain, 6000, torch.Generator().manual_seed(0))), chain)
    assert torch.cosine_similarity(of_each_step(estimate), of_each_step(gradient(chain.objective(), chain)), dim=1).min() > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_step_aware_preferences_climb_to_the_known_optimum(seed):
    chain, generator = Chain(), torch.Generator().manual_seed(seed)
    optimizer, gap = torch.optim.Adam(chain.parameters(), lr=0.05), [OPTIMUM - Chain().objective().item()]
    for _ in range(50):
        steps, old = spo_rollout(chain, 48, generator), copy.deepcopy(chain)
        for _ in range(4):
            optimizer.zero_grad()
            spo_surrogate(chain, old, steps).backward()
            optimizer.step()
        gap.append(OPTIMUM - chain.objective().item())
    assert min(gap) > 0
    assert gap[0] > 2 * gap[12] > 2 * gap[24]
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


def pair_errors(velocity, old_velocity, x0, noise, advantage):
    """Errors of winners and losers, of the flow and of the old one."""
    error, old_error, (w, l_) = matching_error(velocity, noise - x0), matching_error(old_velocity, noise - x0), judged_pairs(advantage)
    return error[w], error[l_], old_error[w], old_error[l_]


def dpo(x_t, sigma, velocity, old_velocity, x0, noise, advantage):
    return diffusion_dpo_loss(*pair_errors(velocity, old_velocity, x0, noise, advantage), beta=1.0)


def linear_dpo(x_t, sigma, velocity, old_velocity, x0, noise, advantage):
    return linear_dpo_loss(*pair_errors(velocity, old_velocity, x0, noise, advantage), beta=1.0)


def mapo(x_t, sigma, velocity, old_velocity, x0, noise, advantage):
    return mapo_loss(*pair_errors(velocity, old_velocity, x0, noise, advantage)[:2], num_timesteps=4)


def sdpo(x_t, sigma, velocity, old_velocity, x0, noise, advantage):
    residual, (w, l_) = velocity - (noise - x0), judged_pairs(advantage)
    error_w, error_l, *old_errors = pair_errors(velocity, old_velocity, x0, noise, advantage)
    guarded = scale_gradient(error_l, safeguard_scale(residual[w], residual[l_], mu=0.5, per_sample=True))
    return diffusion_dpo_loss(error_w, guarded, *old_errors, beta=1.0)


def dspo(x_t, sigma, velocity, old_velocity, x0, noise, advantage):
    distance = matching_error(velocity, old_velocity)[judged_pairs(advantage)[0]]
    return dspo_loss(*pair_errors(velocity, old_velocity, x0, noise, advantage), distance, beta=1.0, dspo_beta=0.5)


def kto(x_t, sigma, velocity, old_velocity, x0, noise, advantage):
    error, old_error = matching_error(velocity, noise - x0), matching_error(old_velocity, noise - x0)
    return kto_loss(error, old_error, advantage > 0, ReferencePoint()(old_error - error), beta=1.0)


def rwr(x_t, sigma, velocity, old_velocity, x0, noise, advantage):
    return reward_weighted_loss(matching_error(velocity, noise - x0), reward_weights(advantage, temperature=1.0))


def inpo(flow, old, batch, generator):
    """The old flow inverted from either image to each noise level."""
    x0, prompt, rewards = batch
    grid, pairs, total = torch.tensor(SIGMAS, dtype=torch.float64).flip(0), judged_pairs(rewards), 0

    def velocity(policy, x, sigma):
        k = min(STEPS - 1, SIGMAS.index(float(sigma)))  # the noiseless end has no velocity of its own
        return policy.w[k] * x + policy.u[k, prompt]

    def denoise(x, time):
        v = velocity(old, x, time[0])
        return x - time[0] * v, x + (1 - time[0]) * v

    for last in range(2, STEPS + 2):
        times = grid[:last, None].expand(-1, len(x0))
        x_t = invert(x0, times, denoise, lambda time: (1 - time, time), eta=0.1, generator=generator)
        noise = inverted_noise(x_t, x0, 1 - times[-1], times[-1])
        errors = [matching_error(velocity(policy, x_t, times[-1, 0]), noise - x0) for policy in (flow, old)]
        total = total + diffusion_dpo_loss(*(e[i] for e in (errors[0], errors[1].detach()) for i in pairs), beta=1.0).mean()
    return total


ON_NOISED_SAMPLES = [nft, awm, dpo, mapo, linear_dpo, sdpo, dspo, inpo, kto, rwr]


def forward_surrogate(loss, flow, old, batch, generator) -> torch.Tensor:
    if loss is inpo:
        return inpo(flow, old, batch, generator)
    x0, prompt, rewards = batch
    advantage, noise, total = group_advantages(rewards, prompt), torch.randn(STEPS, *x0.shape, generator=generator, dtype=x0.dtype), 0
    for k, sigma in enumerate(SIGMAS[:-1]):
        x_t = (1 - sigma) * x0 + sigma * noise[k]
        velocity, before = (policy.w[k] * x_t + policy.u[k, prompt] for policy in (flow, old))
        total = total + loss(x_t, sigma, velocity, before.detach(), x0, noise[k], advantage).mean()
    return total


@pytest.mark.parametrize("loss", ON_NOISED_SAMPLES)
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
@pytest.mark.parametrize("loss", ON_NOISED_SAMPLES)
def test_training_on_noised_samples_climbs(loss, seed):
    gap = train_on_noised_samples(loss, seed)
    assert gap[0] > 1.5 * gap[15] > 1.5 * gap[30]
    assert gap[-1] < 0.2 * gap[0]


# --- through the sampling: the reward is differentiated along the flow ----------------------------------------------------


def velocity_at(flow, prompt):
    return lambda x, k: flow.w[k] * x + flow.u[k, prompt]


def differentiate(flow, prompt, grad_steps, generator, *, stop_step=None, detach_input=False) -> torch.Tensor:
    """Final samples (N, D) with the graph of the chosen steps' velocities."""
    x, velocity = torch.randn(len(prompt), D, generator=generator, dtype=torch.float64), velocity_at(flow, prompt)
    for k in range(STEPS):
        with torch.set_grad_enabled(k in grad_steps):
            v = velocity(x.detach() if detach_input else x, k)
        if k == stop_step:
            return x - SIGMAS[k] * v
        x = x + (SIGMAS[k + 1] - SIGMAS[k]) * v
    return x


def gain(x, prompt):
    return -(x - TARGETS[prompt]).square().sum(1)


def draft(flow, prompt, generator, truncated=None):
    return draft_loss(gain(differentiate(flow, prompt, last_steps(STEPS, truncated), generator), prompt))


def draft_1(flow, prompt, generator):
    return draft(flow, prompt, generator, truncated=1)


def draft_lv(flow, prompt, generator):
    x0, sigma, velocity = differentiate(flow, prompt, last_steps(STEPS, 1), generator), SIGMAS[-2], velocity_at(flow, prompt)
    starts = [renoised(x0, torch.randn(x0.shape, generator=generator, dtype=x0.dtype), alpha=1 - sigma, sigma=sigma) for _ in range(2)]
    return low_variance_loss([gain(x, prompt) for x in (x0, *(x - sigma * velocity(x, STEPS - 1) for x in starts))])


def alignprop(flow, prompt, generator):
    steps = range(truncation(STEPS, generator, strategy="uniform"), STEPS)
    return alignprop_loss(gain(differentiate(flow, prompt, steps, generator), prompt), RewardMap("shortfall", 0.0, 0.01))


def vader(flow, prompt, generator):
    return vader_loss(gain(differentiate(flow, prompt, random_steps(STEPS, generator, mode="random"), generator), prompt), RewardMap("distance", 1.0))


def refl(flow, prompt, generator):
    k = middle_step(STEPS, generator, window=(0.25, 0.975))
    return refl_loss(gain(differentiate(flow, prompt, [k], generator, stop_step=k), prompt), RewardMap("hinge", 0.0, 1e-3))


def drtune(flow, prompt, generator):
    steps, stop_step = sparse_steps(STEPS, generator, number=2, skip_last_steps=1)
    return draft_loss(gain(differentiate(flow, prompt, steps, generator, stop_step=stop_step, detach_input=True), prompt))


def srpo(flow, prompt, generator):
    """Denoising is rewarded, inversion punished as long as it comes near the target, at a random level."""
    k, x0 = 1 + int(torch.randint(STEPS - 1, (), generator=generator)), differentiate(flow, prompt, [], generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    velocity = velocity_at(flow, prompt)((1 - SIGMAS[k]) * x0 + SIGMAS[k] * noise, k)
    denoised, inverted = (recovered_sample(x0, noise, velocity, sigma=SIGMAS[k], sigma_next=level) for level in (SIGMAS[k + 1], (SIGMAS[k] + 1) / 2))
    nothing = torch.zeros(len(prompt), dtype=torch.float64)  # the reward under words that say nothing
    reward = semantic_relative_preference(gain(denoised, prompt), nothing, float(discounts(STEPS)[k]))
    penalty = semantic_relative_preference(nothing, gain(inverted, prompt), float(discounts(STEPS, inversion=True)[k]))
    return srpo_loss(reward, penalty, RewardMap("hinge", 1.0))


def continuous_adjoint(flow, prompt, generator):
    """A loss with the gradient that the adjoint found."""
    step = euler_step(lambda x, sigma: velocity_at(flow, prompt)(x, SIGMAS.index(sigma)), SIGMAS)
    states = states_forwards(step, torch.randn(len(prompt), D, generator=generator, dtype=torch.float64), STEPS)
    found = adjoint_gradient(step, states, -2 * (states[-1] - TARGETS[prompt]) / len(prompt), list(flow.parameters()))
    return -sum((g * p).sum() for g, p in zip(found.gradients, flow.parameters()))


THROUGH_SAMPLING = [draft, draft_1, draft_lv, alignprop, vader, refl, drtune, srpo, continuous_adjoint]


@pytest.mark.parametrize("loss", [draft, continuous_adjoint])
def test_the_whole_chains_gradient_is_that_of_the_objective(loss):
    flow = Flow()
    actual = -gradient(loss(flow, torch.arange(60_000) % PROMPTS, torch.Generator().manual_seed(0)).mean(), flow)
    exact = gradient(flow.objective(), flow)
    assert (actual - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("loss", THROUGH_SAMPLING)
def test_reward_gradients_are_an_ascent_direction(loss):
    flow, generator = Flow(), torch.Generator().manual_seed(0)
    prompt = torch.arange(600) % PROMPTS
    actual = -sum(gradient(loss(flow, prompt, generator).mean(), flow) for _ in range(100))
    assert torch.cosine_similarity(actual, gradient(flow.objective(), flow), dim=0) > 0.4


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loss", THROUGH_SAMPLING)
def test_training_by_reward_gradients_climbs(loss, seed):
    flow, generator, prompt = Flow(), torch.Generator().manual_seed(seed), torch.arange(192) % PROMPTS
    optimizer, gap = torch.optim.Adam(flow.parameters(), lr=0.05), [-flow.objective().item()]
    for _ in range(150):
        optimizer.zero_grad()
        loss(flow, prompt, generator).mean().backward()
        optimizer.step()
        gap.append(-flow.objective().item())
    assert gap[0] > 1.5 * gap[40] > 1.5 * gap[80]
    assert gap[-1] < 0.1 * gap[0]


# --- optimal control: the reward against the KL of paths -----------------------------------------------------------------

MEMORYLESS = [memoryless_kernel(SIGMAS[k], SIGMAS[k + 1], 1.0, SIGMAS[1]) for k in range(STEPS)]
SCALE = 0.7


class ControlledFlow(Flow):
    """Its memoryless SDE. The last step has no noise, so it stays the pretrained one's."""

    def mean(self, k, x, prompt):
        return MEMORYLESS[k].x_weight * x + MEMORYLESS[k].v_weight * (self.w[k] * x + self.u[k, prompt])

    def controlled_objective(self) -> torch.Tensor:
        """E[lambda r] - KL(paths || pretrained paths), by recursion."""
        base, kl = Flow(), 0.0
        mean, variance = torch.zeros(PROMPTS, D, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        for k, (x_weight, v_weight, std) in enumerate(MEMORYLESS):
            if std > 0:
                slope, shift = self.w[k] - base.w[k].detach(), self.u[k]
                square = (slope * mean + shift).square().sum(1).mean() + D * slope**2 * variance
                kl = kl + v_weight**2 * square / (2 * std**2)
            slope = x_weight + v_weight * self.w[k]
            mean, variance = slope * mean + v_weight * self.u[k], slope**2 * variance + std**2
        return SCALE * (-(mean - TARGETS).square().sum(1).mean() - D * variance) - kl


def controlled_optimum() -> float:
    """Over all affine controls: those of the linear-quadratic problem are affine."""
    flow = ControlledFlow()
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = -flow.controlled_objective()
        loss.backward()
        for parameter in flow.parameters():
            parameter.grad[-1] = 0
        return loss

    optimizer.step(closure)
    return flow.controlled_objective().item()


def adjoint_matching_surrogate(flow, base, number, generator):
    prompt = torch.arange(number) % PROMPTS
    with torch.no_grad():
        states = [torch.randn(number, D, generator=generator, dtype=torch.float64)]
        for k in range(STEPS):
            states.append(flow.mean(k, states[-1], prompt) + MEMORYLESS[k].std * torch.randn(number, D, generator=generator, dtype=torch.float64))
    terminal = terminal_adjoint(-2 * (states[-1] - TARGETS[prompt]), SCALE)
    adjoints = lean_adjoints(states, lambda k, x: base.mean(k, x, prompt), terminal)
    losses = [
        adjoint_matching_loss(flow.mean(k, states[k], prompt), base.mean(k, states[k], prompt), torch.tensor(MEMORYLESS[k].std), adjoints[k])
        for k in range(STEPS - 1)
    ]
    return sum(losses).mean()


def test_the_gradient_of_adjoint_matching_is_that_of_the_controlled_objective_at_the_start():
    """Without a control the lean adjoint is the whole one."""
    flow, base = ControlledFlow(), ControlledFlow()
    estimate = -gradient(adjoint_matching_surrogate(flow, base, 30_000, torch.Generator().manual_seed(0)), flow) / 2
    exact = gradient(flow.controlled_objective(), flow)
    trained = torch.cat([torch.arange(STEPS) < STEPS - 1, (torch.arange(STEPS) < STEPS - 1)[:, None].expand(STEPS, PROMPTS * D).flatten()])
    assert (estimate[trained] - exact[trained]).norm() < 0.05 * exact[trained].norm()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_adjoint_matching_reaches_the_optimal_control_of_the_same_chain(seed):
    flow, base, generator, optimum = ControlledFlow(), ControlledFlow(), torch.Generator().manual_seed(seed), controlled_optimum()
    optimizer, updates = torch.optim.Adam(flow.parameters(), lr=0.05), 200
    schedule, gap = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates), [optimum - flow.controlled_objective().item()]
    for _ in range(updates):
        optimizer.zero_grad()
        adjoint_matching_surrogate(flow, base, 384, generator).backward()
        optimizer.step()
        schedule.step()
        gap.append(optimum - flow.controlled_objective().item())
    assert min(gap) > -1e-9 and gap[-1] < 0.005 * gap[0]


def test_discrete_adjoint_matching_reaches_the_tilted_law():
    """Two letters of three, unmasked one by one, all words enumerated: the rates are a table, the loss an exact mean."""
    law, energy = torch.randn(2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    law, tilted = law.softmax(0), (law.log_softmax(0) - energy).softmax(0)
    states = torch.cartesian_prod(torch.arange(4), torch.arange(4))  # 3 is the mask
    words = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    fits = ((states[:, None] == words) | (states[:, None] == 3)).all(-1)
    completions = (fits * law) / (fits * law).sum(1, keepdim=True)
    moves = states[:, None].repeat(1, 6, 1)
    for edge in range(6):
        moves[:, edge, edge // 3] = edge % 3
    after = moves[..., 0] * 4 + moves[..., 1]
    exists = (states == 3).repeat_interleave(3, 1)
    letters = torch.stack([completions[:, words[:, edge // 3] == edge % 3].sum(1) for edge in range(6)], 1)
    base = torch.where(exists, (letters / (states == 3).sum(1, keepdim=True).clamp(min=1)).log(), -torch.inf)
    rates, word = base.masked_fill(~exists, 0).clone().requires_grad_(), states @ torch.tensor([3, 1])

    def completions_of(log_rates):
        jump = torch.zeros(16, 16, dtype=torch.float64).scatter_add(1, after, log_rates.exp() * exists)
        whole = torch.zeros(16, 9, dtype=torch.float64)
        whole[(states < 3).all(1)] = torch.eye(9, dtype=torch.float64)[word[(states < 3).all(1)]]
        return jump @ (jump @ whole) + jump @ whole + whole

    next_weights = log_weight(energy).expand(16, 6, 9) + (9 * completions[after]).log()
    adjoints = [log_adjoint(next_weights, log_weight(energy[w]).expand(16, 1)) for w in range(9)]
    optimizer = torch.optim.Adam([rates], 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        own = torch.where(exists, rates, -torch.inf)
        with torch.no_grad():
            ends = completions_of(rates)
        loss = sum((ends[:, w] * generalized_kl_loss(own, base, adjoints[w])).sum() for w in range(9))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = completions_of(rates.detach())[15]
    assert found.sum() == pytest.approx(1, abs=1e-3)
    assert (tilted * (tilted.log() - found.log())).sum().abs() < 1e-4
    assert (tilted * (tilted.log() - law.log())).sum() > 0.1


# --- on samples alone: the policy is a black box, and what is trained is a flow of its samples -----------------------------


class LinearField(nn.Module):
    """v(t, y, c) = W_kc (y, 1) at each time of an Euler solver."""

    def __init__(self, steps=5):
        super().__init__()
        self.steps, self.w = steps, nn.Parameter(torch.zeros(steps, PROMPTS, D, D + 1, dtype=torch.float64))

    def forward(self, t, y, prompt):
        return torch.einsum("nij,nj->ni", self.w[round(t * self.steps), prompt], torch.cat([y, torch.ones_like(y[:, :1])], 1))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_preference_flow_raises_the_reward_of_fresh_samples_at_each_pass(coupling, seed):
    generator, chain, field = torch.Generator().manual_seed(seed), Chain(), LinearField()
    before = [parameter.clone() for parameter in chain.parameters()]
    states, _, prompt, rewards = chain.rollout(600, generator)
    prompt, x, r = prompt[:300], states[-1].view(2, 300, D), rewards.view(2, 300)  # i and 300 + i share their prompt
    y0, y1 = (x[(r[0] > r[1]).long() if lose else (r[0] <= r[1]).long(), torch.arange(300)] for lose in (True, False))
    target = y1[couple(coupling, y0, y1, prompt.tolist(), generator=generator)]
    optimizer = torch.optim.Adam(field.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        points = [(k / field.steps, interpolate(y0, target, torch.full((300,), k / field.steps))) for k in range(field.steps)]
        sum(pfm_loss(field(t, y, prompt), y0, target).mean() for t, y in points).backward()
        optimizer.step()
    fresh, wanted = chain.rollout(3000, generator)[0][-1], torch.arange(3000) % PROMPTS
    flow = {"num_steps": field.steps, "solver": "euler"}
    moved = [fresh, *(transport(lambda t, y: field(t, y, wanted).detach(), fresh, iterations=passes, **flow) for passes in (1, 2))]
    reward = [-(y - TARGETS[wanted]).square().sum(1).mean() for y in moved]
    assert 0.75 * reward[0] < reward[1] < reward[2] < 0
    assert all(torch.equal(p, b) for p, b in zip(chain.parameters(), before))


# --- at inference: nothing is trained, the samples of the chain as it is are weighed or chosen -----------------------------


@torch.no_grad()
def walk_in_groups(chain, groups, number, generator, on_rewards):
    """`number` particles of each group, all of a group from one prompt: at each step, `on_rewards` says whose copies (groups, number) go on
    by the rewards of the predicted clean samples. Final samples (groups, number, D) and their rewards."""
    prompt = (torch.arange(groups) % PROMPTS).repeat_interleave(number)
    x = torch.randn(groups * number, D, generator=generator, dtype=torch.float64)
    for k in range(STEPS):
        if k > 0:
            clean = x - SIGMAS[k] * (chain.w[k] * x + chain.u[k, prompt])
            index = on_rewards(-(clean - TARGETS[prompt]).square().sum(1).view(groups, number))
            x = x.view(groups, number, D).gather(1, index[..., None].expand(-1, -1, D)).flatten(0, 1)
        x = chain.transition(k, x, prompt).sample(generator)
    return x.view(groups, number, D), -(x - TARGETS[prompt]).square().sum(1).view(groups, number)


def test_particles_reach_the_tilt_of_the_chain(groups=9000, number=8, scale=0.7):
    chain, generator, weights = perturbed_chain(), torch.Generator().manual_seed(0), [initial_weights(groups, number)]

    def steer(rewards):
        draws = torch.rand(groups, number, generator=generator, dtype=torch.float64)
        weights[0], index = resample_particles(reweight(weights[0], rewards, reward_scale=scale), draws)
        return index

    x, rewards = walk_in_groups(chain, groups, number, generator, steer)
    final = reweight(weights[0], rewards, reward_scale=scale, last=True)
    mean, variance = torch.zeros(PROMPTS, D, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for k, kernel in enumerate(KERNELS):
        slope = kernel.x_weight + kernel.v_weight * chain.w[k].detach()
        mean, variance = slope * mean + kernel.v_weight * chain.u[k].detach(), slope**2 * variance + kernel.std**2
    shrunk = 1 + 2 * scale * variance
    evidence = (shrunk**-0.5 * torch.exp(-scale * (mean - TARGETS).square() / shrunk)).prod(1)
    tilted = (mean + 2 * scale * variance * TARGETS) / shrunk
    estimate = log_evidence(final).exp()
    moments = estimate[:, None] * (final.log_weight.softmax(1)[..., None] * x).sum(1)
    for found, exact in ((estimate[:, None], evidence[:, None]), (moments, evidence[:, None] * tilted)):
        runs = found.view(-1, PROMPTS, found.shape[1])
        assert ((runs.mean(0) - exact).abs() < 4 * runs.std(0) / len(runs) ** 0.5).all()
    assert (tilted - mean).abs().max() > 0.5


def test_value_based_decoding_is_the_greedier_the_lower_its_temperature(groups=900, number=8):
    chain, generator = perturbed_chain(), torch.Generator().manual_seed(0)

    def mean_reward(alpha):
        def decode(rewards):
            return choose(rewards, torch.rand(groups, generator=generator), alpha=alpha)[:, None].expand(-1, number)

        rewards = walk_in_groups(chain, groups, number, generator, decode)[1][:, 0]
        return rewards.mean(), rewards.std() / groups**0.5

    (greedy, _), (soft, _), (never, error) = mean_reward(0.0), mean_reward(1.0), mean_reward(1e9)
    assert greedy > soft > never
    assert abs(never - chain.objective()) < 4 * error


def test_q_learning_over_noises_finds_the_value_of_the_best_of_them(states=5, steps=3, number=4, samples=60_000):
    """On a small chain: the values behind each step are those of the plain sampler at lambda 1, of the best of so many draws at lambda 0, and the samples
    that take the best earn what these say."""
    generator = torch.Generator().manual_seed(0)
    kernels = torch.randn(steps, states, states, generator=generator).mul(0.7).softmax(2)
    reward = torch.randn(states, generator=generator)
    plain, best_of = [reward], [reward]
    for kernel in kernels.flip(0):
        order = best_of[0].argsort()
        shares = kernel[:, order].cumsum(1).pow(number).diff(dim=1, prepend=torch.zeros(states, 1))  # of the largest of `number` draws
        best_of.insert(0, shares @ best_of[0][order])
        plain.insert(0, kernel @ plain[0])

    def walk(table, take):
        state, worth, visited = torch.zeros(samples, dtype=torch.long), [], []
        for k in range(steps):
            drawn = torch.multinomial(kernels[k][state], number, replacement=True, generator=generator)
            worth.append(candidates_value(table[k + 1][drawn]))
            state = drawn.gather(1, take(table[k + 1][drawn])[:, None])[:, 0]
            visited.append(state)
        return torch.stack(visited, 1), torch.stack(worth, 1)

    for lam, exact in ((1.0, plain), (0.0, best_of)):
        table = torch.zeros(steps + 1, states)
        for _ in range(steps):  # the loss's minimum: of a table, the mean target of each state
            visited, worth = walk(table, lambda values: torch.zeros(samples, dtype=torch.long))
            targets = q_targets(reward[visited[:, -1]], worth, lam=lam)
            for k in range(steps):
                here = [targets[:, k][visited[:, k] == s] for s in range(states)]
                table[k + 1] = torch.stack([found.mean() for found in here])
                assert all(value_loss(found, found.mean()).mean() <= value_loss(found, found.mean() + 0.1).mean() for found in here)
        assert (table[1:] - torch.stack(exact[1:])).abs().max() < 0.05
    earned = reward[walk(torch.stack(best_of), lambda values: best(values))[0][:, -1]]
    assert abs(earned.mean() - best_of[0][0]) < 4 * earned.std() / samples**0.5
    assert best_of[0][0] - plain[0][0] > 0.3


def test_the_best_of_n_is_distributed_as_the_largest_of_n(groups=9000, number=4):
    chain, generator = perturbed_chain(), torch.Generator().manual_seed(0)
    rewards = walk_in_groups(chain, groups, number, generator, lambda r: torch.arange(number).expand(groups, -1))[1]
    found = rewards.gather(1, best(rewards)[:, None])[:, 0]
    for prompt in range(PROMPTS):
        sample, own = rewards[prompt::PROMPTS].flatten().sort().values, found[prompt::PROMPTS]
        quantile = (torch.arange(len(sample), dtype=torch.float64) + 0.5) / len(sample)
        expected = (sample * number * quantile ** (number - 1)).mean()
        assert abs(own.mean() - expected) < 4 * own.std() / len(own) ** 0.5
        assert expected - sample.mean() > 0.3


def guided_reward(guidance, scale) -> float:
    """Mean reward of the flow's ODE under guidance by the reward itself."""
    flow, generator, levels = Flow(), torch.Generator().manual_seed(0), [Level(1 - sigma, sigma) for sigma in SIGMAS]
    prompt, x = torch.arange(192) % PROMPTS, torch.randn(192, D, generator=generator, dtype=torch.float64)
    for k in range(STEPS):
        slope = 1 - SIGMAS[k] * flow.w[k].detach()
        velocity, state = flow.w[k].detach() * x, torch.zeros_like(x)
        if k > 0:
            shift = guide(
                guidance, lambda clean: (-(clean - TARGETS[prompt]).square().sum(1), 2 * (TARGETS[prompt] - clean)), x, slope * x,
                (levels[k], levels[k + 1]), scale=scale, pull_back=lambda g: slope * g, draw=lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype),
            )  # fmt: skip
            velocity, state = velocity + output_change(shift.clean, levels[k], "flow"), shift.state
        x = x + (SIGMAS[k + 1] - SIGMAS[k]) * velocity + state
    return float(-(x - TARGETS[prompt]).square().sum(1).mean())


@pytest.mark.parametrize("name", ["energy", "dps", "lgd_mc", "mpgd", "tfg", "flowchef", "universal"])
def test_guidance_raises_the_reward_of_the_ode(name):
    rewards = [guided_reward(preset(name), scale) for scale in (-0.05, 0.0, 0.05, 0.1)]
    assert rewards == sorted(rewards) and rewards[3] > rewards[1] + 0.05


def test_mean_guidance_lands_on_the_optimum_by_a_newton_step():
    assert guided_reward(Guidance(mean=1.0), 0.5) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("optimizer, options", [("sgd", {"max_grad_norm": 10.0, "learning_rate": 0.02}), ("adam", {"learning_rate": 0.05}), ("lbfgs", {})])
def test_noise_optimisation_finds_the_noise_whose_ode_ends_at_the_target(optimizer, options):
    flow, starts = Flow(), torch.ones(PROMPTS, D, dtype=torch.float64)
    slope = torch.ones((), dtype=torch.float64)
    for k in range(STEPS):
        slope = slope * (1 + (SIGMAS[k + 1] - SIGMAS[k]) * flow.w[k].detach())

    def evaluate(target):
        return lambda z, gradient: (-(slope * z - target).square().sum(1), -2 * slope * (slope * z - target))

    for prompt, target in enumerate(TARGETS):
        found = ascend(evaluate(target), starts[prompt : prompt + 1], settings(optimizer, num_iterations=600, regularization=0.0, **options))
        torch.testing.assert_close(found.noise[0], target / slope, rtol=1e-3, atol=1e-3)
