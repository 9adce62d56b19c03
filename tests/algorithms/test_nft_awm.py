"""DiffusionNFT and AWM: the losses against their formulas, the policy that lags behind, and the scripts on both kinds of model."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from script_tools import assert_same_lora, rows, run_script, run_script_on_two_processes, write_task
from torch import nn

from diffusers_align import sde_twin
from diffusers_align.algorithms.advantage_weighted_matching import WEIGHTINGS, awm_loss, lagging_decay, pseudo_log_prob, unit_advantages
from diffusers_align.algorithms.diffusion_nft import ADVANTAGE_MODES, nft_loss, old_policy_decay, optimality
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.rl.matching import matching_error
from diffusers_align.training.run.weight_copies import LaggingWeights

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
PROCESSES = {
    "flow": ForwardProcess(sde_twin(FlowMatchEulerDiscreteScheduler(shift=3.0))),
    **{kind: ForwardProcess(sde_twin(DDIMScheduler(prediction_type=kind))) for kind in ("epsilon", "v_prediction", "sample")},
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


# --- DiffusionNFT ------------------------------------------------------------------------------------------------------


def test_nft_by_hand():
    x0_hat, old, x0 = (torch.tensor([row], dtype=torch.float64) for row in ([1, -3], [0, 1], [0, 0]))
    # v+ predicts (1, -3), with mean square 5 and mean size 2; v- predicts (-1, 5): 13 and 3.
    assert_equal(nft_loss(x0_hat, old, x0, torch.tensor([0.75])), [5 * (0.75 * 5 / 2 + 0.25 * 13 / 3)])
    assert_equal(nft_loss(x0_hat, old, x0, torch.tensor([0.75]), adaptive=False), [5 * (0.75 * 5 + 0.25 * 13)])


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_is_the_official_formula_in_velocities(beta):
    forward, r, t = PROCESSES["flow"], torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([900.0, 500.0, 30.0]).double()
    x0, noise, v, v_old = random(4, 3, 2, 4, 4)
    x_t, s = forward.add_noise(x0, noise, t), (t / 1000).reshape(3, 1, 1, 1)
    expected = 0
    for weight, velocity in ((r, beta * v + (1 - beta) * v_old), (1 - r, (1 + beta) * v_old - beta * v)):
        error = (x_t - s * velocity) - x0
        expected = expected + weight * (error**2 / error.abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)).mean((1, 2, 3)) / beta * 5
    assert_equal(nft_loss(forward.to_x0(v, x_t, t), forward.to_x0(v_old, x_t, t), x0, r, beta=beta), expected)


def gradient_of_nft(forward, x0, noise, t, output, old, r, **options):
    x_t, output = forward.add_noise(x0, noise, t), output.clone().requires_grad_()
    loss = nft_loss(forward.to_x0(output, x_t, t), forward.to_x0(old, x_t, t), x0, r, **options)
    return torch.autograd.grad(loss.sum(), output)[0]


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_the_optimum_lies_from_the_old_policy_towards_the_sample_or_away_from_it(kind, beta):
    forward, r, t = PROCESSES[kind], torch.tensor([0.0, 0.3, 1.0]).double(), torch.tensor([900, 500, 30])
    x0, noise, old = random(3, 3, 2, 3)
    target = forward.target(x0, noise, t)
    optimum = old + (2 * r[:, None, None] - 1) * (target - old) / beta
    assert gradient_of_nft(forward, x0, noise, t, optimum, old, r, beta=beta, adaptive=False).abs().max() < 1e-9
    assert gradient_of_nft(forward, x0, noise, t, old, old, r, beta=beta, adaptive=False).abs().max() > 1e-3


@pytest.mark.parametrize("kind", PROCESSES)
def test_an_average_sample_leaves_the_old_policy_where_it_is(kind):
    forward, t = PROCESSES[kind], torch.tensor([900, 500, 30])
    x0, noise, old = random(3, 3, 2, 3)
    assert gradient_of_nft(forward, x0, noise, t, old, old, torch.full((3,), 0.5).double()).abs().max() < 1e-12
    better = gradient_of_nft(forward, x0, noise, t, old, old, torch.full((3,), 0.6).double())
    assert ((better * (forward.target(x0, noise, t) - old)).sum((1, 2)) < 0).all(), "descent goes towards the sample"


def test_the_adaptive_weight_has_no_gradient_and_a_floor():
    x0 = random(2, 3)
    x0_hat = x0.clone().requires_grad_()
    loss = nft_loss(x0_hat, x0, x0, torch.ones(2).double())
    assert loss.abs().max() == 0 and torch.autograd.grad(loss.sum(), x0_hat)[0].abs().max() == 0
    shifted = (x0 + 0.3).requires_grad_()
    # (x+ - x0)^2 / w with w held: 2 * 0.3 / 0.3 over three dimensions, times 5.
    assert_equal(torch.autograd.grad(nft_loss(shifted, x0, x0, torch.ones(2).double()).sum(), shifted)[0], torch.full((2, 3), 10 / 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("all", [0, 0.3, 0.5, 0.6, 1]),
        ("positive_only", [0.5, 0.5, 0.5, 0.6, 1]),
        ("negative_only", [0, 0.3, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_optimality(mode, expected):
    assert mode in ADVANTAGE_MODES
    assert_equal(optimality(torch.tensor([-9.0, -2, 0, 1, 7]).double(), mode=mode), expected)


def test_decays():
    assert [old_policy_decay(step) for step in (0, 100, 500, 900)] == [0, 0.1, 0.5, 0.5]
    assert [old_policy_decay(step, "type2") for step in (75, 76, 1000)] == [0, 0.0075, 0.999]
    assert old_policy_decay(1000, "type0") == 0
    assert [lagging_decay(step) for step in (0, 100, 900)] == [0, 0.1, 0.3]


# --- AWM ---------------------------------------------------------------------------------------------------------------


def test_pseudo_log_prob_by_hand():
    output, target, time = torch.tensor([[1.0, 3.0]]).double(), torch.tensor([[0.0, 0.0]]).double(), torch.tensor([0.5])
    expected = {"uniform": -5, "t": -2.5, "t2": -1.25, "huber": -0.5 * math.sqrt(5), "ghuber": -0.5 * (5**0.25 - 1e-10**0.25) / 0.25}
    for weighting in WEIGHTINGS:
        assert_equal(pseudo_log_prob(output, target, time, weighting=weighting), [expected[weighting]], atol=1.1e-5 if weighting == "huber" else 1e-9)
    assert_equal(pseudo_log_prob(output, target, time), [expected["ghuber"]], atol=1e-9)
    assert_equal(pseudo_log_prob(output, target, time, ghuber_power=1.0), [-2.5], atol=1e-9)
    assert_equal(pseudo_log_prob(output.float().bfloat16(), target, time, weighting="t"), [-2.5])
    for weighting in ("huber", "ghuber"):
        at_zero = target.clone().requires_grad_()
        value = pseudo_log_prob(at_zero, target, time, weighting=weighting)
        assert value.abs() < 1e-12 and torch.autograd.grad(value.sum(), at_zero)[0].isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_first_update_is_the_advantage_weighted_pretraining_gradient(weighting):
    output, target, time, advantage = random(4, 3).requires_grad_(), random(4, 3, seed=1), torch.rand(4).double(), random(4, seed=2)
    log_prob = pseudo_log_prob(output, target, time, weighting=weighting)
    actual = torch.autograd.grad(awm_loss(log_prob, log_prob.detach(), advantage).sum(), output, retain_graph=True)[0]
    assert_equal(actual, -torch.autograd.grad((advantage * log_prob).sum(), output)[0])
    assert actual.abs().max() > 1e-3


def test_only_ratios_above_two_are_clipped():
    log_ratio = torch.tensor([-5.0, 0.6, 0.8, 0.8], dtype=torch.float64, requires_grad=True)
    loss = awm_loss(log_ratio, torch.zeros(4).double(), torch.tensor([1.0, 1, 1, -1]).double())
    assert_equal(loss, [-math.exp(-5), -math.exp(0.6), -2, math.exp(0.8)])
    assert (torch.autograd.grad(loss.sum(), log_ratio)[0] != 0).tolist() == [True, True, False, True]


def test_unit_advantages():
    assert_equal(unit_advantages(torch.tensor([-7.0, 2.5, 5.0]).double()), [-1, 0.5, 1])


def test_matching_error_is_in_float32_at_least():
    output, target = torch.full((2, 3, 4), 1.0, dtype=torch.bfloat16), torch.zeros(2, 3, 4)
    output[1] = 3
    error = matching_error(output, target)
    assert error.dtype == torch.float32 and error.tolist() == [1.0, 9.0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: optimality(x, mode="some"), "Unknown mode 'some'; choose one of all"),
        (lambda x: old_policy_decay(1, "type3"), "Unknown schedule 'type3'; choose type0"),
        (lambda x: pseudo_log_prob(x, x, x, weighting="snr"), "Unknown weighting 'snr'; choose one of uniform"),
    ],
)
def test_unknown_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1))


# --- the policy that lags behind ---------------------------------------------------------------------------------------


def test_lagging_weights():
    layer = nn.Linear(2, 1, bias=False)
    first = layer.weight.detach().clone()
    lagging = LaggingWeights(list(layer.parameters()))
    with torch.no_grad():
        layer.weight.add_(1)
    lagging.update(0.75)
    saved = lagging.state_dict()
    loss = layer.weight.square().sum()
    with pytest.raises(KeyError), lagging.applied():
        assert torch.allclose(layer.weight, first + 0.25)
        raise KeyError
    assert torch.equal(layer.weight, first + 1), "the live weights are back"
    loss.backward()
    assert torch.equal(layer.weight.grad, 2 * (first + 1)), "a graph that was built before is still theirs"
    lagging.update(0.0)
    assert torch.equal(lagging.values[0], layer.weight)
    lagging.load_state_dict(saved)
    assert torch.allclose(lagging.values[0], first + 0.25) and torch.equal(layer.weight, first + 1)


# --- scripts -----------------------------------------------------------------------------------------------------------

MODELS = {"mini-sd3": {"call_kwargs": '{"max_sequence_length": 1}'}, "mini-sd": {}}
SMALL = {
    "prompts": "likes_blue_train",
    "reward": "background_color",
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "num_prompts_per_epoch": 2,
    "group_size": 2,
    "train_batch_size": 2,
    "rank": 4,
    "learning_rate": 1e-2,
    "num_eval_samples": 2,
    "num_validation_images": 2,
    "checkpointing_epochs": 1,
    "validation_epochs": 100,
    "num_train_timesteps": 2,
}


def train(name, out, model="mini-sd3", **flags):
    spec = importlib.util.spec_from_file_location(name, ROOT / "training_scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    values = {**SMALL, "pretrained_model_name_or_path": model, **MODELS[model], "output_dir": out, **flags}
    script.main([word for key, value in values.items() for word in (f"--{key}", *([] if value is True else [str(value)]))])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name, flags", [("train_nft", {"kl_weight": 0.1, "beta": 0.5}), ("train_awm", {"kl_weight": 0.1, "lag_decay": 0.2})])
def test_a_script_trains_flow_and_diffusion_models_and_resumes_exactly(tmp_path, name, flags, model):
    flags |= {"gradient_accumulation_steps": 1}  # two updates per epoch: the second is off-policy
    rows = train(name, tmp_path / "whole", model, num_epochs=3, **flags)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["grad_norm"] > 0 and row["kl"] > 0 for row in rows)
    if name == "train_nft":
        assert [row["decay"] for row in rows] == [0.002, 0.004, 0.006] and rows[0]["old_deviation"] > 0
    else:
        assert all(row["ratio_error"] == 0 and row["approx_kl"] > 0 and row["ema_kl"] > 0 for row in rows), "the second update is off-policy"
    train(name, tmp_path / "parts", model, num_epochs=2, **flags)
    train(name, tmp_path / "parts", model, num_epochs=3, resume_from_checkpoint="latest", **flags)
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    mine, theirs = (load_file(tmp_path / part / "pytorch_lora_weights.safetensors") for part in ("parts", "whole"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["train_nft", "train_awm"])
def test_the_batch_size_changes_nothing(tmp_path, name):
    # A large epsilon, so that Adam does not blow up the rounding of gradients near 0.
    flags = {"num_epochs": 2, "timestep_scheme": "logit_normal", "adam_epsilon": 0.1}
    one = train(name, tmp_path / "one", train_batch_size=4, **flags)
    two = train(name, tmp_path / "two", train_batch_size=2, gradient_accumulation_steps=2, **flags)
    mine, theirs = (load_file(tmp_path / part / "pytorch_lora_weights.safetensors") for part in ("one", "two"))
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-5)
    assert any(value.abs().max() > 1e-4 for key, value in theirs.items() if "lora_B" in key or ".up." in key), "something was learned"
    assert one[1]["reward"] == pytest.approx(two[1]["reward"], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["train_nft", "train_awm"])
def test_the_reward_rises(tmp_path, name, model):
    flags = {"num_inference_steps": 6, "num_prompts_per_epoch": 6, "group_size": 8, "train_batch_size": 24, "rank": 16, "num_train_timesteps": 3}
    own = {"beta": 0.5, "shared_timesteps": True} if name == "train_nft" else {"ema_beta": 0.1}
    rows = train(name, tmp_path / "run", model, num_epochs=5, learning_rate=1e-3, **flags, **own)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.05 > rows[0]["reward"] + rows[0]["reward_se"]


def test_recipes_parse():
    for name in ("nft", "awm"):
        spec = importlib.util.spec_from_file_location(name, ROOT / "training_scripts" / f"train_{name}.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        recipes = sorted((ROOT / "training_scripts" / "recipes").glob(f"{name}_*.yaml"))
        assert len(recipes) >= 2
        assert all(script.parse_args(["--config", str(recipe)]).guidance_scale == 1.0 for recipe in recipes), "guidance is distilled into the weights"


@pytest.mark.long
@pytest.mark.parametrize("name", ["nft", "awm"])
def test_two_processes_train_what_one_does(tmp_path, name):
    task = write_task(tmp_path)
    # A large epsilon, so that Adam does not blow up the rounding of gradients near 0.
    flags = {"num_epochs": 2, "num_prompts_per_epoch": 2, "group_size": 4, "num_train_timesteps": 2, "learning_rate": 1e-2, "adam_epsilon": 0.1}
    flags |= {"train_batch_size": 1, "gradient_accumulation_steps": 4}
    two = run_script_on_two_processes(name, tmp_path / "two", task, **flags)
    one = run_script(name, tmp_path / "one", task, **flags, reward=f"{task / 'rewards.py'}:recorded")
    assert_same_lora(two, one, rtol=0, atol=1e-5)
    assert [row["reward"] for row in rows(two)] == pytest.approx([row["reward"] for row in rows(one)], abs=1e-4)
