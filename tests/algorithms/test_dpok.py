"""DPOK: its loss and both forms of its KL, the learned baseline, the prompts' features, and its script."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from chain import STEPS, TARGETS, Chain, gradient, perturbed_chain
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES

from diffusers_align import GaussianTransition, Policy
from diffusers_align.algorithms.dpok import describe_kl, dpok_loss, output_mse, output_weight
from diffusers_align.rl.values import ValueBaseline, ValueNetwork, explained_variance, value_advantages
from diffusers_align.training.checkpoints.state_files import read_state

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
LORA = "pytorch_lora_weights.safetensors"


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the loss


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # 10 * surrogate + 0.01 * kl, with ratios exp(+-0.5/1024), exp(+-0.05/1024) and a clip of 1e-4
        ("ppo", [-20.002 + 0.003, -19.990236758797730787 + 0.003, 10.004884004786944731 + 0.003, 9.999 + 0.003, -20.000976586342245966 + 0.003]),
        ("clamp", [-20.002 + 0.003, -19.998 + 0.003, 10.001 + 0.003, 9.999 + 0.003, -20.000976586342245966 + 0.003]),
    ],
)
def test_loss_at_the_papers_defaults(mode, expected):
    log_ratio, advantage = float64(0.5, -0.5, 0.5, -0.5, 0.05), float64(2, 2, -1, -1, 2)
    loss = dpok_loss(log_ratio - 7, torch.full_like(log_ratio, -7), advantage, float64(0.3), per_dim=1024, clip_mode=mode)
    torch.testing.assert_close(loss, float64(*expected), rtol=1e-13, atol=0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [0.5, -0.5, 0.1])
def test_clamp_forgets_samples_beyond_the_clip_and_ppo_brings_back_those_on_the_wrong_side(log_ratio, advantage):
    gradients = {}
    for mode in ("ppo", "clamp"):
        log_prob = float64(log_ratio).requires_grad_()
        loss = dpok_loss(log_prob, float64(0), float64(advantage), per_dim=1, clip_range=0.2, clip_mode=mode, reward_weight=3.0)
        gradients[mode] = torch.autograd.grad(loss.sum(), log_prob)[0].item()
    bare, inside = -3 * advantage * math.exp(log_ratio), abs(log_ratio) < 0.2
    assert gradients["clamp"] == pytest.approx(bare if inside else 0.0)
    assert gradients["ppo"] == pytest.approx(bare if inside or log_ratio * advantage < 0 else 0.0)


def test_the_kl_has_its_own_weight_and_gradient():
    kl = float64(0.5, 2.0).requires_grad_()
    loss = dpok_loss(randn(2), randn(2), randn(2, seed=1), kl, per_dim=4, kl_weight=0.25)
    assert torch.autograd.grad(loss.sum(), kl)[0].tolist() == [0.25, 0.25]


# the two forms of the KL


def test_output_weight_and_mse_recover_what_the_mean_was_made_of():
    state, output, reference = randn(3, 2, 4), randn(3, 2, 4, seed=1), randn(3, 2, 4, seed=2)

    def mean(x, e):
        return 0.9 * x - 0.3 * e

    weight = output_weight(lambda e: mean(torch.zeros_like(e), e), 3)
    assert weight == pytest.approx(-0.3)
    found = output_mse(mean(state, output), mean(state, reference), weight)
    torch.testing.assert_close(found, (output - reference).square().mean((1, 2)), rtol=1e-6, atol=0)


def test_a_step_that_clips_has_no_output_weight():
    with pytest.raises(ValueError, match="not affine.*--kl_form paper"):
        output_weight(lambda e: 0.5 * e.clamp(-1, 1) + 0.1 * e, 4)


@pytest.mark.parametrize("family", ["sd15", "sd15_v", "sd3", "flux_true_cfg"])
def test_the_official_form_is_the_error_of_the_guided_outputs(family):
    """With guidance, at every step: from the means alone, without knowing what the model predicts."""
    policy = Policy(FAMILIES[family].build(), **FAMILIES[family].call)
    trajectory = policy.rollout(["a cat", "a large red dog"], seeds=[1, 2])
    torch.manual_seed(1)
    for parameter in policy.add_lora(rank=4):
        parameter.data.normal_(std=0.3)
    outputs: list[list[torch.Tensor]] = []

    def record(step):
        outputs[-1].append(step.model_output.float())
        return trajectory.actions[:, step.k]

    def means():
        outputs.append([])
        with torch.no_grad():
            policy.drive(trajectory.condition, record)
        return policy.transitions(trajectory)

    moved = means()
    with policy.reference():
        pretrained = means()
    scheduler = policy.scheduler
    assert list(moved) == list(pretrained) and len(moved) >= 2
    for k in moved:
        weight = output_weight(lambda e: scheduler.transition(e, trajectory.timesteps[k], torch.zeros_like(e)).mean, trajectory.final.ndim)  # noqa: B023
        expected = (outputs[0][k] - outputs[1][k]).square().flatten(1).mean(1)
        assert expected.min() > 1e-4
        torch.testing.assert_close(output_mse(moved[k].mean, pretrained[k].mean, weight), expected, rtol=2e-3, atol=1e-6)


def test_the_paper_form_is_the_official_one_at_another_scale():
    output, reference, weight, std = randn(2, 6), randn(2, 6, seed=1), -0.3, torch.full((1, 1), 0.4, dtype=torch.float64)
    mine, theirs = GaussianTransition(weight * output, std), GaussianTransition(weight * reference, std)
    paper, official = mine.kl(theirs) / 6, output_mse(mine.mean, theirs.mean, weight)
    scale = weight**2 / (2 * 0.4**2)
    torch.testing.assert_close(paper, (weight * (output - reference)).square().mean(1) / (2 * 0.4**2))
    torch.testing.assert_close(paper, scale * official)
    assert f"like {0.01 / scale:.3g} on the paper one" in describe_kl(0.01, "official", [scale, scale])
    assert f"like {0.01 * scale:.3g} on the official one" in describe_kl(0.01, "paper", [0.5 * scale, 1.5 * scale])


# the value network


def toy(number: int, seed: int = 0):
    """Transitions whose value depends on state, prompt and step together."""
    generator = torch.Generator().manual_seed(seed)
    states, prompts = torch.randn(number, 2, 3, generator=generator), torch.randn(number, 4, generator=generator)
    steps = torch.randint(3, (number,), generator=generator)
    sign = torch.tensor([1.0, -1.0, 0.0])[steps]
    return states, prompts, steps, 5 + sign * states[:, 0, 0] + prompts[:, 1]


def fitted(**options) -> ValueBaseline:
    values = ValueBaseline(3, learning_rate=3e-3, batch_size=128, accumulation_steps=1, buffer_size=600, **options)
    values.remember(*toy(600))
    return values


def test_the_network_learns_the_value_of_state_prompt_and_step():
    values = fitted()
    before, after = values.fit(1), values.fit(150)
    states, prompts, steps, rewards = toy(400, seed=1)
    assert before > 0.5 * rewards.var() and after < 0.1 * before
    error = (values(states, prompts, steps) - rewards).square().mean()
    assert error < 0.15 * rewards.var()
    for changed in ((states, prompts, (steps + 1) % 3), (states.flip(0), prompts, steps), (states, prompts.flip(0), steps)):
        assert (values(*changed) - rewards).square().mean() > 4 * error


def test_the_steps_gates_multiply_the_layers():
    torch.manual_seed(0)
    network = ValueNetwork(state_size=6, prompt_size=4, num_steps=3, width=8)
    states, prompts, steps, _ = toy(5)
    assert all(layer.gates.min() >= 0 and layer.gates.max() <= 1 and layer.gates.std() > 0.1 for layer in network.layers)
    x = torch.cat([states.flatten(1), prompts], 1)
    for layer in network.layers:
        x = (layer.linear(x) * torch.stack([layer.gates[k] for k in steps.tolist()])).relu()
    torch.testing.assert_close(network(states, prompts, steps), network.head(x)[:, 0])
    with torch.no_grad():
        network.layers[1].gates[2] = 0.0
        network.layers[2].linear.bias.zero_()
    closed = network(states, prompts, torch.full((5,), 2))
    assert torch.equal(closed, closed[:1].expand(5)) and network(states, prompts, torch.zeros(5, dtype=torch.long)).std() > 0


def test_the_first_forecast_is_near_the_mean_of_the_first_rewards():
    values = ValueBaseline(3)
    states, prompts, steps, rewards = toy(300)
    assert values(states, prompts, steps).tolist() == [0.0] * 300 and values.fit() == 0.0
    values.remember(states, prompts, steps, 100 + rewards)
    assert (values(states, prompts, steps) - 105).abs().max() < 1


def test_the_buffer_keeps_the_latest_and_leaves_out_what_could_not_be_scored():
    values = ValueBaseline(3, buffer_size=4)
    nan = torch.tensor([float("nan")] * 3)
    states, prompts, steps, _ = toy(3)
    values.remember(states, prompts, steps, nan)
    assert values.network is None and values.buffer == []
    for start in (0, 3):
        rewards = torch.arange(start, start + 3.0)
        rewards[1] = float("nan") if start else rewards[1]
        values.remember(states, prompts, steps, rewards)
    assert values.buffer[3].tolist() == [1, 2, 3, 5]
    assert torch.equal(values.buffer[0], states[[1, 2, 0, 2]]) and torch.equal(values.buffer[2], steps[[1, 2, 0, 2]])


def test_minibatches_accumulate_to_one_step_of_their_mean():
    whole, parts = (ValueBaseline(3, batch_size=b, accumulation_steps=n, learning_rate=1e-3) for b, n in ((24, 1), (24, 3)))
    for values in (whole, parts):
        values.remember(*toy(24))
        values.fit()
    # Each minibatch is the whole buffer, so three of them have the gradient of one.
    for mine, theirs in zip(parts.network.parameters(), whole.network.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)
    assert parts.optimizer.state_dict()["state"][0]["step"] == 1


def test_training_goes_on_bit_for_bit_from_a_saved_state(tmp_path):
    torch.manual_seed(0)
    whole, random_state = fitted(seed=3), torch.get_rng_state()
    assert torch.equal(random_state, torch.random.manual_seed(0).get_state()), "making the network leaves the global generator alone"
    whole.fit(3)
    torch.save(whole.state_dict(), tmp_path / "values.pt")
    torch.manual_seed(99)
    resumed = ValueBaseline(3, learning_rate=3e-3, batch_size=128, accumulation_steps=1, buffer_size=600, seed=3)
    resumed.load_state_dict(torch.load(tmp_path / "values.pt", weights_only=True))
    for values in (whole, resumed):
        values.remember(*toy(50, seed=2))
        values.fit(3)
    states, prompts, steps, _ = toy(20, seed=5)
    assert torch.equal(whole(states, prompts, steps), resumed(states, prompts, steps))
    assert all(torch.equal(a, b) for a, b in zip(whole.buffer, resumed.buffer))


def test_advantages_and_explained_variance():
    rewards, values = torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([[0.5, 1.0], [2.0, 3.0], [1.0, 1.0]])
    assert value_advantages(rewards, values).tolist() == [[0.5, 0.0], [1.0, 0.0], [0.0, 0.0]]
    # left: 0.5, 0, 1, 0 of variance 0.171875; rewards of variance 1
    assert explained_variance(rewards, values) == pytest.approx(1 - 0.171875)
    assert explained_variance(rewards, torch.full((3, 2), 7.0)) == pytest.approx(0.0)
    assert explained_variance(torch.ones(3), torch.rand(3, 2)) == 0.0


# what the baseline is for, on a chain whose values are known in closed form


def exact_values(chain: Chain, states: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """E[r | x_k, c], (N, K): the rest of a linear Gaussian chain has an affine mean and a variance of its own."""
    values = []
    with torch.no_grad():
        for k in range(STEPS):
            mean, variance = states[k], 0.0
            for j in range(k, STEPS):
                transition = chain.transition(j, mean, prompt)
                slope = chain.transition(j, mean + 1, prompt).mean[0, 0] - transition.mean[0, 0]
                mean, variance = transition.mean, slope**2 * variance + transition.std.item() ** 2
            values.append(chain_reward(mean, prompt) - mean.shape[1] * variance)
    return torch.stack(values, 1)


def chain_reward(final: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    return -(final - TARGETS[prompt]).square().sum(1)


def gradients(baseline, repeats=120, number=150) -> torch.Tensor:
    """Gradients of DPOK's surrogate, summed over steps, at ratio 1: one estimate a row."""
    chain, generator, rows = perturbed_chain(), torch.Generator().manual_seed(0), []
    for _ in range(repeats):
        states, old, prompt, rewards = chain.rollout(number, generator)
        advantage = value_advantages(rewards, baseline(chain, states, prompt))
        losses = [
            dpok_loss(chain.transition(k, states[k], prompt).log_prob(states[k + 1]), old[k], advantage[:, k], per_dim=1, reward_weight=1.0, clip_range=0.1)
            for k in range(STEPS)
        ]
        rows.append(-gradient(sum(losses).mean(), chain))
    return torch.stack(rows)


def test_the_expected_reward_as_a_baseline_keeps_the_gradient_and_lowers_its_variance():
    chain = perturbed_chain()
    exact = gradient(chain.objective(), chain)
    learned = gradients(exact_values)
    constant = gradients(lambda chain, states, prompt: chain.objective().detach().expand(states.shape[1], STEPS))
    z = (learned.mean(0) - exact) / (learned.std(0) / len(learned) ** 0.5)
    assert z.abs().max() < 4 and z.square().mean() < 2
    assert learned.var(0).sum() < 0.6 * constant.var(0).sum()


def test_a_value_network_takes_the_place_of_the_expected_reward():
    """Fitted to one chain's transitions, it forecasts others nearly as well as the closed form; trained with it, the chain climbs."""
    chain, generator = perturbed_chain(), torch.Generator().manual_seed(0)
    values = ValueBaseline(STEPS, learning_rate=3e-3, batch_size=256, accumulation_steps=1, buffer_size=8000)

    def transitions(number):
        states, _, prompt, rewards = chain.rollout(number, generator)
        prompts, steps = torch.eye(len(TARGETS))[prompt], torch.arange(STEPS).repeat_interleave(number)
        return states, prompt, rewards, (states[:STEPS].flatten(0, 1), prompts.repeat(STEPS, 1), steps, rewards.repeat(STEPS))

    values.remember(*transitions(2000)[3])
    values.fit(300)
    states, prompt, rewards, (flat, prompts, steps, _) = transitions(2000)
    learned = values(flat.float(), prompts, steps).reshape(STEPS, -1).T.double()
    best = explained_variance(rewards, exact_values(chain, states, prompt))
    assert best > 0.4 and explained_variance(rewards, learned) > 0.85 * best


# the prompts' features


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_features(family):
    """One row per sample, also with guidance; of the sample's own prompt, whatever else is in the batch."""
    policy = Policy(FAMILIES[family].build(), **FAMILIES[family].call)
    prompts = ["a cat", "a large red dog on a green hill", "a cat"]
    features = policy.prompt_features(policy.condition(prompts))
    assert features.shape[0] == 3 and features.ndim == 2 and features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features[0], features[2])
    assert (features[0] - features[1]).abs().max() > 1e-3 * features.abs().max()
    assert torch.equal(policy.prompt_features(policy.condition(["a cat"], seeds=[3]))[0], features[0])
    assert not {"encode_prompt", "_encode_prompt"} & set(vars(policy.pipeline)), "the pipeline has its own method back"
    unguided = {name: 1.0 for name in ("guidance_scale", "true_cfg_scale") if FAMILIES[family].call.get(name)}
    assert policy.prompt_features(policy.condition(prompts, **unguided)).shape == features.shape


def test_prompt_features_say_what_is_missing():
    policy = Policy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call)
    condition = policy.condition(["a cat"])
    policy.pipeline.encode_prompt = lambda *args, **kwargs: (None, torch.arange(3))
    with pytest.raises(ValueError, match="no sequence of vectors.*--no-value_baseline"):
        policy.prompt_features(condition)

    class Mute:
        components = {}

        def __call__(self):
            return None

        def maybe_free_model_hooks(self):
            return None

    mute = Policy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call)
    mute.pipeline = Mute()
    mute.parameters = {}
    with pytest.raises(ValueError, match="Mute has no encode_prompt.*--no-value_baseline"):
        mute.prompt_features(condition)
    Mute.encode_prompt = lambda self: None
    mute.call = lambda condition: {}
    with pytest.raises(ValueError, match="Mute's call does not use its encode_prompt.*--no-value_baseline"):
        mute.prompt_features(condition)


# the script

REWARD = """
import os
from pathlib import Path


def ranked(images, prompts, **columns):
    (Path(__file__).parent / f"rank-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}").touch()
    return brightness(images, prompts)


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1) - 0.5


def no_dogs(images, prompts, **columns):
    values = images.flatten(1).mean(1)
    return values + values.new_tensor([float("nan") if "dog" in prompt else 0.0 for prompt in prompts])


def terrible(images, prompts, **columns):
    return -1 - images.flatten(1).mean(1)
"""
SMALL = {
    "pretrained_model_name_or_path": "mini-sd",
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "num_samples_per_epoch": 4,
    "train_batch_size": 2,
    "learning_rate": 3e-3,
    "num_epochs": 2,
    "num_eval_samples": 2,
    "num_validation_images": 2,
    "checkpointing_epochs": 1,
}
VALUES = {
    "value_steps": 2,
    "value_learning_rate": 1e-3,
    "value_buffer_size": 16,
    "value_batch_size": 8,
}


def script():
    spec = importlib.util.spec_from_file_location("train_dpok", ROOT / "training_scripts" / "train_dpok.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(tmp_path):
    """train("name", flag=value): a run in a folder of its own; its metrics."""
    (tmp_path / "prompts.txt").write_text("a cat on a red background\ntwo dogs on a blue background\n")
    (tmp_path / "rewards.py").write_text(REWARD)

    def run(name, reward="brightness", **flags):
        task = {"prompts": tmp_path / "prompts.txt", "reward": f"{tmp_path / 'rewards.py'}:{reward}", "output_dir": tmp_path / name}
        learned = {} if "no-value_baseline" in flags else VALUES
        values = {**SMALL, **learned, **task, **flags}
        script().main([word for key, value in values.items() for word in (f"--{key}", *([] if value is True else [str(value)]))])
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    run.folder = tmp_path
    return run


def value_state(checkpoint):
    """What the value baseline left in a checkpoint."""
    return read_state(checkpoint, "value_baseline")


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train):
    expected = train("whole", num_epochs=3)
    train("parts", num_epochs=1)
    assert train("parts", num_epochs=3, resume_from_checkpoint="latest") == expected
    whole, parts = (load_file(train.folder / name / LORA) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    states = [value_state(train.folder / name / "checkpoint-3") for name in ("whole", "parts")]
    for key in ("generator", "buffer", "network"):
        mine, theirs = (list(s[key].values()) if isinstance(s[key], dict) else list(s[key]) for s in states)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), key
    assert len(states[0]["buffer"][0]) == 16 and states[0]["optimizer"]["state"][0]["step"] == 6
    assert expected[0]["ratio_error"] == expected[2]["ratio_error"] == 0.0
    assert all(row["grad_norm"] > 0 and row["value_error"] > 0 and math.isfinite(row["explained_variance"]) for row in expected)
    assert 0 <= expected[0]["kl"] < expected[2]["kl"]


@pytest.mark.long
def test_two_processes_train_what_one_does_with_the_same_value_network(train):
    """The same two samples make each optimizer step."""
    # Adam's own epsilon would make a full step of the rounding in a gradient of 0.
    ours = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "value_learning_rate": 1e-2, "learning_rate": 1e-3, "adam_epsilon": 1e-6}
    train("one", **ours)
    values = {**SMALL, **VALUES, **ours, "prompts": train.folder / "prompts.txt"}
    values |= {"reward": f"{train.folder / 'rewards.py'}:ranked", "output_dir": train.folder / "two"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "training_scripts" / "train_dpok.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    argv = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
    result = subprocess.run([*launch, *argv], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in train.folder.glob("rank-*")) == ["rank-0-of-2", "rank-1-of-2"]
    one, two = (load_file(train.folder / name / LORA) for name in ("one", "two"))
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one)
    assert max(value.abs().max() for key, value in one.items() if "lora.up" in key or "lora_B" in key) > 1e-4
    mine, theirs = (value_state(train.folder / name / "checkpoint-2") for name in ("two", "one"))
    for a, b in zip(mine["buffer"], theirs["buffer"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for key, weight in theirs["network"].items():
        torch.testing.assert_close(mine["network"][key], weight, rtol=0, atol=1e-3)


def test_the_papers_kl_the_official_clamp_and_guidance(train):
    rows = train("clamp", kl_form="paper", clip_mode="clamp", eta=0.8, guidance_scale=3.0)
    assert all(row["ratio_error"] == 0.0 for row in rows) and rows[1]["kl"] > 0


def test_without_value_and_kl_on_a_flow_pipeline(train):
    flow = {"pretrained_model_name_or_path": "mini-sd3", "call_kwargs": '{"max_sequence_length": 1}', "sde_type": "dance_grpo", "noise_level": 0.4}
    rows = train("flow", kl_weight=0, **{"no-value_baseline": True}, **flow)
    assert all(row["ratio_error"] == 0.0 and row["grad_norm"] > 0 and not {"kl", "value_error"} & row.keys() for row in rows)
    rows = train("flow_with_both", num_epochs=1, **flow)
    assert rows[0]["value_error"] > 0 and rows[0]["kl"] > 0


def test_masked_rewards_and_filtered_ones_teach_nothing(train):
    rows = train("masked", reward="no_dogs", invalid_rewards="mask", num_eval_samples=4, num_epochs=1)
    assert rows[0]["invalid_rewards"] > 0 and all(math.isfinite(value) for value in rows[0].values())
    # Every reward is below 0, so the filter leaves equal ones: the batch's advantage is 0, and so is the gradient.
    rows = train("filtered", reward="terrible", reward_filter=True, kl_weight=0, num_epochs=1, allow_no_signal=True, **{"no-value_baseline": True})
    assert rows[0]["reward"] < -1 and rows[0]["grad_norm"] == 0.0


def test_flags_of_the_other_kind_of_noise_are_refused(train):
    with pytest.raises(ValueError, match="DDIMSDEScheduler has no noise_level; its fields are eta"):
        train("wrong", noise_level=0.7)


@pytest.mark.parametrize("recipe", sorted((ROOT / "training_scripts" / "recipes").glob("dpok_*.yaml")), ids=lambda path: path.stem)
def test_recipes_parse(recipe):
    args = script().parse_args(["--config", str(recipe)])
    assert args.prompts and args.reward_weight == 10 and args.kl_weight == yaml.safe_load(recipe.read_text())["kl_weight"]


def test_the_weight_of_the_kl_goes_with_its_form():
    given = ["--config", str(ROOT / "training_scripts" / "recipes" / "dpok_sd15.yaml")]
    for form, weight in (("official", 0.01), ("paper", 0.05)):
        argv = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "jpeg", "--output_dir", "out", "--kl_form", form]
        assert script().parse_args(argv).kl_weight == weight
    assert script().parse_args([*given, "--kl_weight", "0.3"]).kl_weight == 0.3
