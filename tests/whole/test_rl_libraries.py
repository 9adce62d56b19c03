"""The RL libraries of the extra `[rl]` learn on a pipeline: each method that docs/guides/rl_libraries.md names, for a few hundred steps of a tiny one."""

import copy

import pytest
import torch
from tiny_pipelines import FAMILIES

from diffusers_align import Policy

pytestmark = pytest.mark.long
STEPS = 192
NOISES = 4


def redness(images, prompts):
    return images[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def policy():
    return Policy(FAMILIES["sd3"].build(), **{**FAMILIES["sd3"].call, "num_inference_steps": 3})


def environment(policy, **task):
    """Observations as one vector, which every library reads."""
    pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install ".[rl]"')
    from gymnasium.wrappers import FlattenObservation

    from diffusers_align.envs import DenoisingEnv

    return FlattenObservation(DenoisingEnv(policy, ["a cat", "a red bird"], redness, **task))


def discrete(policy):
    return environment(policy, action="candidates", num_candidates=NOISES)


def moved(before, after):
    """Whether any parameter is another one, and all are numbers."""
    after = dict(after)
    assert all(torch.isfinite(x).all() for x in after.values())
    return any(not torch.equal(x, after[name]) for name, x in before.items())


# --- stable-baselines3 and sb3-contrib -----------------------------------------------------------------------------------

ON_POLICY = {"PPO": {"n_steps": 48, "batch_size": 24}, "A2C": {"n_steps": 12}, "TRPO": {"n_steps": 48, "batch_size": 48}}
OFF_POLICY = {name: {"learning_starts": 24, "buffer_size": 500, "batch_size": 16, "target_update_interval": 32} for name in ("DQN", "QRDQN")}
HOMES = {name: "stable_baselines3" for name in ("PPO", "A2C", "DQN")} | {name: "sb3_contrib" for name in ("TRPO", "QRDQN")}


@pytest.mark.parametrize("name", [*ON_POLICY, *OFF_POLICY])
def test_stable_baselines_learns_on_a_pipeline(policy, name):
    library = pytest.importorskip(HOMES[name], reason=f'{HOMES[name]} is not installed: pip install ".[rl]"')
    env = environment(policy) if name in ON_POLICY else discrete(policy)
    agent = getattr(library, name)("MlpPolicy", env, seed=0, device="cpu", **{**ON_POLICY, **OFF_POLICY}[name])
    before = copy.deepcopy(agent.policy.state_dict())
    agent.learn(STEPS)
    assert agent.num_timesteps >= STEPS and moved(before, agent.policy.state_dict())
    assert len(agent.ep_info_buffer) >= STEPS // 3 // 2  # episodes came to their end, with rewards
    observation, _ = env.reset(seed=1)
    action, _ = agent.predict(observation, deterministic=True)
    assert env.action_space.contains(action if name in ON_POLICY else int(action))


def test_ppo_starts_at_the_sampler_itself(policy):
    """Its first policy is a Gaussian of mean nearly 0 and standard deviation 1, which is how the sampler draws."""
    library = pytest.importorskip("stable_baselines3", reason='stable_baselines3 is not installed: pip install ".[rl]"')
    env = environment(policy)
    agent = library.PPO("MlpPolicy", env, seed=0, device="cpu", n_steps=48)
    observation, _ = env.reset(seed=0)
    drawn = agent.policy.get_distribution(agent.policy.obs_to_tensor(observation)[0]).distribution
    assert torch.allclose(drawn.stddev, torch.ones_like(drawn.stddev)) and drawn.mean.abs().max() < 0.2


# --- tianshou --------------------------------------------------------------------------------------------------------------

ATOMS = {"num_atoms": 11, "v_min": 0.0, "v_max": 1.0}
# What each relative of DQN is made of: of the network, of the update, of the replay.
RELATIVES = {
    "double": {"update": {"is_double": True}},
    "duelling": {"net": {"duelling": True}},
    "prioritised": {"prioritised": True},
    "n-step": {"update": {"n_step_return_horizon": 3}},
    "noisy": {"net": {"noisy": True}},
    "C51": {"kind": "C51"},
    "QR-DQN": {"kind": "QRDQN"},
    "Rainbow": {"kind": "RainbowDQN", "net": {"duelling": True, "noisy": True}, "update": {"n_step_return_horizon": 3}, "prioritised": True},
}


def network(env, atoms=1, duelling=False, noisy=False):
    """A Q-network in the form that tianshou takes: duelling heads, noisy layers, several numbers an action."""
    from functools import partial

    from tianshou.utils.net.common import Net
    from tianshou.utils.net.discrete import NoisyLinear

    layer = partial(NoisyLinear, noisy_std=0.5) if noisy else torch.nn.Linear
    heads = ({"hidden_sizes": [32], "linear_layer": layer}, {"hidden_sizes": [32], "linear_layer": layer}) if duelling else None
    distributional = {"num_atoms": atoms, "softmax": atoms == ATOMS["num_atoms"]}
    return Net(
        state_shape=env.observation_space.shape, action_shape=NOISES, hidden_sizes=[32], linear_layer=layer, dueling_param=heads, **distributional
    )  # fmt: skip


def agent_of(env, kind="DQN", net=None, update=None):
    from tianshou.algorithm.modelfree import c51, dqn, qrdqn, rainbow
    from tianshou.algorithm.optim import AdamOptimizerFactory

    atoms = {"DQN": 1, "QRDQN": 12}.get(kind, ATOMS["num_atoms"])
    spaces = {"model": network(env, atoms, **(net or {})), "action_space": env.action_space, "observation_space": env.observation_space, "eps_training": 0.2}
    options = {"optim": AdamOptimizerFactory(lr=1e-3), "target_update_freq": 16, **(update or {})}
    if kind == "DQN":
        return dqn.DQN(policy=dqn.DiscreteQLearningPolicy(**spaces), **{"is_double": False, **options})
    if kind == "QRDQN":
        return qrdqn.QRDQN(policy=qrdqn.QRDQNPolicy(**spaces), num_quantiles=atoms, **options)
    return {"C51": c51.C51, "RainbowDQN": rainbow.RainbowDQN}[kind](policy=c51.C51Policy(**spaces, **ATOMS), **options)


@pytest.mark.parametrize("name", RELATIVES)
def test_tianshou_learns_on_a_pipeline(policy, name):
    pytest.importorskip("tianshou", reason='tianshou is not installed (it needs Python 3.11): pip install ".[rl]"')
    from tianshou.data import Collector, PrioritizedVectorReplayBuffer, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.trainer import OffPolicyTrainerParams

    relative = dict(RELATIVES[name])
    prioritised = relative.pop("prioritised", False)
    torch.manual_seed(0)
    env = discrete(policy)
    algorithm = agent_of(env, **relative)
    before = copy.deepcopy(algorithm.policy.state_dict())
    replay = PrioritizedVectorReplayBuffer(500, 1, alpha=0.6, beta=0.4) if prioritised else VectorReplayBuffer(500, 1)
    collector = Collector(algorithm, DummyVectorEnv([lambda: env]), replay, exploration_noise=True)
    collector.reset()
    collector.collect(n_step=24)
    steps = {"max_epochs": 1, "epoch_num_steps": STEPS, "collection_step_num_env_steps": 24, "update_step_num_gradient_steps_per_sample": 0.5}
    algorithm.run_training(OffPolicyTrainerParams(training_collector=collector, batch_size=16, verbose=False, show_progress=False, **steps))
    assert len(replay) >= STEPS and moved(before, algorithm.policy.state_dict())
    assert float(replay.rew[: len(replay)].max()) > 0
