"""The variants of Flow-GRPO: their losses against their formulas, their windows and selections, and their runs."""

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_align import FlowMatchSDEScheduler, GaussianTransition
from diffusers_align.algorithms.dance_grpo import best_and_worst
from diffusers_align.algorithms.flow_cps import cps_log_ratio, flow_cps_loss
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss, gaussian_kl, kl_penalty, official_kl
from diffusers_align.algorithms.grpo_guard import grpo_guard_loss, guard_log_ratio
from diffusers_align.algorithms.mix_grpo import window_at
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.rewards.base import WeightedSum
from diffusers_align.rl import group_advantages, multi_reward_advantages, ratio_diagnostics
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.policy_gradient import ReplayedStep, policy_gradient_epoch
from diffusers_align.training.online.sampling import Samples
from diffusers_align.training.online.trained_steps import trained_steps
from diffusers_align.trajectory import Condition, Trajectory

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
SHAPE, D = (6, 3, 2, 2), 12


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(std: float = 0.4, shift: float = 0.03, rows: int = 6, std_rows: int = 1):
    """A policy that moved a little from the one that sampled: (transition, old transition, actions)."""
    spread = torch.linspace(std, 1.5 * std, std_rows, dtype=torch.float64).reshape(-1, 1, 1, 1)
    old = GaussianTransition(randn(rows, 3, 2, 2), spread)
    new = GaussianTransition((old.mean + shift * randn(rows, 3, 2, 2, seed=1)).requires_grad_(), spread)
    return new, old, old.mean + spread * randn(rows, 3, 2, 2, seed=2)


def gradient(loss, mean):
    return torch.autograd.grad(loss.sum(), mean)[0]


# --- Flow-CPS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std_rows", [1, 6])
def test_the_cps_ratio_is_the_official_one(std_rows):
    new, old, action = step(std_rows=std_rows)
    # IamCreateAI/FlowCPS: log_prob = -((prev_sample - prev_sample_mean) ** 2).mean(non-batch)
    official = (action - old.mean).square().mean((1, 2, 3)) - (action - new.mean).square().mean((1, 2, 3))
    torch.testing.assert_close(cps_log_ratio(new.log_prob(action), old.log_prob(action), new.std, per_dim=D), official, rtol=1e-9, atol=1e-12)


def test_the_cps_loss_at_its_published_clip_range():
    log_prob, old, std = (
        torch.tensor([0.6, -0.6, 1.2e-4], dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        torch.full((1, 1), 0.5, dtype=torch.float64),
    )
    advantage = torch.tensor([2.0, 2.0, -1.0], dtype=torch.float64)
    ratio = [math.exp(2 * 0.25 * x / 12) for x in (0.6, -0.6, 1.2e-4)]
    expected = torch.tensor([-2 * (1 + 1e-5), -2 * ratio[1], ratio[2]], dtype=torch.float64)  # clipped; wrong side; within the range
    torch.testing.assert_close(flow_cps_loss(log_prob, old, advantage, std, per_dim=12), expected, rtol=1e-12, atol=0)


# --- GRPO-Guard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std_rows", [1, 6])
def test_the_guard_ratio_is_the_published_one_for_each_sample(std_rows):
    new, old, action = step(std_rows=std_rows)
    actual = guard_log_ratio(new.log_prob(action), old.log_prob(action), new.mean, old.mean, new.std, per_dim=D)
    assert actual.shape == (6,)
    for i in range(6):
        s = new.std.flatten()[i if std_rows > 1 else 0]
        log_prob, old_log_prob = (torch.distributions.Normal(t.mean[i], s).log_prob(action[i]).mean() for t in (new, old))
        expected = (log_prob - old_log_prob + (new.mean[i] - old.mean[i]).square().mean() / (2 * s**2)) * s
        torch.testing.assert_close(actual[i], expected, rtol=1e-9, atol=1e-12)


def test_ratio_norm_takes_bias_and_scale_out_of_every_step():
    spreads, means = [], []
    for std in (0.05, 0.4, 1.0):
        old = GaussianTransition(torch.zeros(4000, 3, 2, 2, dtype=torch.float64), torch.full((1, 1, 1, 1), std, dtype=torch.float64))
        new = GaussianTransition(old.mean + 0.02, old.std)
        action = std * randn(4000, 3, 2, 2)
        plain = (new.log_prob(action) - old.log_prob(action)) / D
        normalised = guard_log_ratio(new.log_prob(action), old.log_prob(action), new.mean, old.mean, new.std, per_dim=D)
        assert plain.mean() < -0.5 * 0.02**2 / (2 * std**2), "the bias that RatioNorm removes"
        assert normalised.mean().abs() < 4 * normalised.std() / 4000**0.5
        spreads.append(normalised.std())
        means.append(normalised.mean())
    torch.testing.assert_close(spreads[0], spreads[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(means[0], means[2], rtol=1e-6, atol=1e-9)


def test_guard_gradients_are_alike_at_every_step_of_a_schedule():
    """d loss / d velocity of one advantage: 30 times apart for Flow-GRPO over ten steps, within the spread of 1 - sigma for the guard."""
    scheduler = FlowMatchSDEScheduler(shift=3.0, noise_level=0.7)
    scheduler.set_timesteps(10)
    sizes, plain, guarded = scheduler.sigmas.diff().abs().tolist(), [], []
    for k in range(9):
        velocity = torch.zeros(64, 12, requires_grad=True)
        transition = scheduler.transition(velocity, scheduler.timesteps[k], randn(64, 12).float())
        action, old = (transition.mean + transition.std * randn(64, 12, seed=k).float()).detach(), transition.mean.detach()
        log_prob, advantage = transition.log_prob(action), torch.ones(64, dtype=torch.float64)
        plain.append(gradient(reinforce_loss(log_prob, advantage, per_dim=12), velocity).norm())
        log_prob = scheduler.transition(velocity, scheduler.timesteps[k], randn(64, 12).float())
        log_ratio = guard_log_ratio(log_prob.log_prob(action), transition.log_prob(action).detach(), log_prob.mean, old, log_prob.std, per_dim=12)
        guarded.append(gradient(grpo_guard_loss(log_ratio, advantage, sizes[k], clip_range=1.0), velocity).norm())
    assert max(plain) / min(plain) > 20
    assert max(guarded) / min(guarded) < 5


def test_the_guard_loss_at_its_published_clip_range():
    log_ratio, advantage = torch.tensor([1e-4, -1e-4, 1e-6], dtype=torch.float64), torch.tensor([3.0, 3.0, -2.0], dtype=torch.float64)
    expected = torch.tensor([-3 * (1 + 2e-6), -3 * math.exp(-1e-4), 2 * math.exp(1e-6)], dtype=torch.float64) / 0.125
    torch.testing.assert_close(grpo_guard_loss(log_ratio, advantage, 0.125), expected, rtol=1e-14, atol=0)


# --- what they share ---------------------------------------------------------------------------------------------------


def test_before_an_update_each_variant_has_a_multiple_of_reinforces_gradient():
    transition, _, action = step(shift=0.0)
    advantage, std = randn(6, seed=3), 0.4
    new = lambda: transition.log_prob(action)  # noqa: E731
    base, old = gradient(reinforce_loss(new(), advantage, per_dim=D), transition.mean), new().detach()
    assert base.abs().min() > 0
    torch.testing.assert_close(gradient(flow_grpo_loss(new(), old, advantage, per_dim=D), transition.mean), base)
    torch.testing.assert_close(gradient(flow_cps_loss(new(), old, advantage, transition.std, per_dim=D), transition.mean), 2 * std**2 * base)
    log_ratio = guard_log_ratio(new(), old, transition.mean, transition.mean.detach(), transition.std, per_dim=D)
    torch.testing.assert_close(gradient(grpo_guard_loss(log_ratio, advantage, 0.1), transition.mean), std / 0.1 * base)


def test_the_kl_penalty_has_three_forms():
    mean, reference, std = randn(*SHAPE), randn(*SHAPE, seed=1), torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    assert torch.equal(kl_penalty(mean, reference, std, 0.1, form="gaussian"), gaussian_kl(mean, reference, std))
    assert torch.equal(kl_penalty(mean, reference, std, 0.1), official_kl(mean, reference, std, 0.1))
    published = ((mean - reference) ** 2).mean(dim=tuple(range(1, mean.ndim)))  # FlowCPS, b402c7a, train_sd3.py
    torch.testing.assert_close(kl_penalty(mean, reference, std, 0.1, form="mean_squared"), published)
    torch.testing.assert_close(gaussian_kl(mean, reference, std), published / (2 * 0.4**2))
    with pytest.raises(ValueError, match="Unknown form 'exact' of the KL; choose one of official, gaussian, mean_squared"):
        kl_penalty(mean, reference, std, 0.1, form="exact")


def test_flow_grpos_kl_would_weigh_the_last_step_of_cps_a_thousandfold():
    scheduler = FlowMatchSDEScheduler(shift=3.0, sde_type="cps", noise_level=0.8)
    scheduler.set_timesteps(10)
    sigmas, factors = scheduler.sigmas.tolist(), []
    for sigma, after in zip(sigmas[:9], sigmas[1:10]):
        mean, reference, std = randn(*SHAPE), randn(*SHAPE, seed=1), torch.full((1, 1, 1, 1), after * math.sin(0.4 * math.pi), dtype=torch.float64)
        official, squared = (kl_penalty(mean, reference, std, sigma - after, form=form) for form in ("official", "mean_squared"))
        factors.append(float((official / squared).mean()))
    assert factors == pytest.approx([0.024, 0.031, 0.042, 0.060, 0.092, 0.16, 0.35, 1.34, 1870], rel=0.03)


def test_cps_comes_with_its_own_penalty(tmp_path):
    free = {name: value for name, value in TINY.items() if name != "kl_weight"}
    parse = lambda **flags: script().parse_args([w for n, v in {**free, "output_dir": tmp_path, **flags}.items() for w in (f"--{n}", str(v))])  # noqa: E731
    args = parse(sde_type="cps", loss="flow_cps")
    assert (args.kl_form, args.kl_weight) == ("mean_squared", 0.01)
    assert parse(sde_type="cps", kl_form="gaussian", kl_weight=0.1).kl_form == "gaussian"
    args = parse()
    assert (args.kl_form, args.kl_weight) == ("official", 0.04)
    recipe = str(ROOT / "training_scripts" / "recipes" / "flow_grpo_cps_sd35.yaml")
    args = script().parse_args(["--config", recipe])
    assert (args.noise_level, args.clip_range, args.kl_form, args.kl_weight, args.sde_window_size) == (0.7, 1e-4, "mean_squared", 0.01, None)


# --- DanceGRPO: best and worst -----------------------------------------------------------------------------------------


def test_best_and_worst_keeps_both_ends_of_each_group():
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    advantages = torch.tensor([3.0, -6, 1, -5, 2, -4, -1, 4, -2, 5, -3, 6])
    kept = best_and_worst(advantages, groups, 4)
    assert kept.tolist() == [4.5, -9, 0, -7.5, 3, 0, 0, 0, -3, 7.5, -4.5, 9]
    assert torch.equal(best_and_worst(advantages, groups, 6), advantages)


def test_best_and_worst_of_ties_and_bad_numbers():
    assert (best_and_worst(torch.zeros(8), torch.zeros(8, dtype=torch.long), 4) == 0).all()
    for keep in (0, 3, 10):
        with pytest.raises(ValueError, match="even, at least 2 and at most the group's size"):
            best_and_worst(torch.zeros(8), torch.zeros(8, dtype=torch.long), keep)


def test_dance_advantages_are_the_official_ones():
    rewards, groups = randn(24).float(), torch.arange(2).repeat_interleave(12)
    expected = torch.cat([(r - r.mean()) / (r.std() + 1e-8) for r in rewards.double().chunk(2)])  # torch's std: ddof 1
    torch.testing.assert_close(group_advantages(rewards, groups, global_std=False, eps=1e-8, ddof=1).double(), expected, rtol=1e-6, atol=1e-6)


# --- MixGRPO: windows --------------------------------------------------------------------------------------------------


def test_the_progressive_window_slides_and_rolls_back():
    windows = [window_at(i, size=4, first=0, end=8, interval=3) for i in range(16)]
    assert windows[:15] == [(s, s + 4) for s in range(5) for _ in range(3)]
    assert windows[15] == (0, 4)
    assert window_at(3, size=2, first=1, end=8, interval=3, stride=2) == (3, 5)


def test_the_published_schedule_stays_shorter_behind_the_threshold():
    total = sum(int(np.ceil(25 * np.exp(-0.1 * max(0, p - 13)))) for p in range(22))
    one_round = Counter(window_at(i, size=4, first=0, end=25, strategy="exp_decay")[0] for i in range(total))
    assert [one_round[p] for p in (13, 14, 15, 18, 20, 21)] == [25, 23, 21, 16, 13, 12]
    assert window_at(total, size=4, first=0, end=25, strategy="exp_decay") == (0, 4)


def test_random_windows_depend_on_seed_and_iteration_alone_and_visit_every_place():
    draw = [window_at(i, size=2, first=1, end=5, strategy="random", seed=3) for i in range(200)]
    assert draw == [window_at(i, size=2, first=1, end=5, strategy="random", seed=3) for i in range(200)]
    assert set(draw) == {(1, 3), (2, 4), (3, 5)}
    assert draw != [window_at(i, size=2, first=1, end=5, strategy="random", seed=4) for i in range(200)]


def test_windows_without_room_or_strategy():
    with pytest.raises(ValueError, match="no room for a window of 4"):
        window_at(0, size=4, first=2, end=5)
    with pytest.raises(ValueError, match="Unknown strategy 'best'"):
        window_at(0, size=1, first=0, end=5, strategy="best")


# --- advantages from the flags -----------------------------------------------------------------------------------------


def asked(**flags):
    import argparse

    return argparse.Namespace(**{"multi_reward": "sum", "baseline": "group", "global_std": True, "std_ddof": 0, "adv_clip_max": 5.0, **flags})


def samples_of(**components):
    groups = torch.arange(2).repeat_interleave(6)
    rewards = components["first"] + 0.5 * components["second"]
    return Samples([], [], ["a"] * 12, groups, rewards, {"reward": rewards, **components}, [])


def scored():
    first, second = randn(12).float(), 100 * randn(12, seed=1).float()
    reward = WeightedSum([(lambda images, prompts: first, 1.0, "first"), (lambda images, prompts: second, 0.5, "second")])
    return samples_of(first=first, second=second), reward


def test_gdpo_gives_each_reward_its_weight_whatever_its_scale():
    samples, reward = scored()
    actual = advantages_of(samples, asked(multi_reward="gdpo"), reward)
    parts = torch.stack([samples.components["first"], samples.components["second"]])
    torch.testing.assert_close(actual, multi_reward_advantages(parts, torch.tensor([1.0, 0.5]), samples.groups))
    rescaled = samples_of(first=samples.components["first"], second=samples.components["second"] / 1000)
    torch.testing.assert_close(advantages_of(rescaled, asked(multi_reward="gdpo"), reward), actual, rtol=1e-2, atol=1e-2)
    correlation = torch.corrcoef(torch.stack([advantages_of(samples, asked(), reward), samples.components["second"]]))[0, 1]
    assert correlation > 0.8, "summed first, the larger scale drowns the other"


@pytest.mark.parametrize("flags", [{}, {"global_std": False}, {"std_ddof": 1}, {"global_std": False, "std_ddof": 1}])
def test_the_flags_choose_whose_std_divides(flags):
    samples, reward = scored()
    expected = group_advantages(samples.rewards, samples.groups, global_std=flags.get("global_std", True), ddof=flags.get("std_ddof", 0))
    assert torch.equal(advantages_of(samples, asked(**flags), reward), expected)
    assert not flags or not torch.allclose(expected, group_advantages(samples.rewards, samples.groups))


def test_the_others_can_be_the_baseline():
    samples, reward = scored()
    actual = advantages_of(samples, asked(baseline="leave_one_out", adv_clip_max=1e6), reward)
    others = (samples.rewards[:6].sum() - samples.rewards[:6]) / 5
    torch.testing.assert_close(actual[:6], samples.rewards[:6] - others)
    with pytest.raises(ValueError, match="leave out --baseline"):
        advantages_of(samples, asked(baseline="leave_one_out", multi_reward="gdpo"), reward)


def test_advantages_are_clamped_and_shaped_like_the_rewards():
    samples, reward = scored()
    assert advantages_of(samples, asked(adv_clip_max=0.5), reward).abs().max() == 0.5
    assert advantages_of(samples, asked(), reward, randn(12, 3).float()).shape == (12, 3)
    with pytest.raises(ValueError, match="gdpo needs a sum of rewards"):
        advantages_of(samples, asked(multi_reward="gdpo"), lambda images, prompts: None)


# --- runs --------------------------------------------------------------------------------------------------------------

TINY = {
    "pretrained_model_name_or_path": "mini-sd3", "prompts": "simple_animals", "reward": "jpeg_compressibility", "call_kwargs": '{"max_sequence_length": 1}',
    "num_inference_steps": 5, "guidance_scale": 1.0, "num_prompts_per_epoch": 2, "group_size": 4, "train_batch_size": 4, "rank": 4, "num_epochs": 2,
    "learning_rate": 3e-3, "num_eval_samples": 4, "num_validation_images": 4, "checkpointing_epochs": 2, "kl_weight": 0,
}  # fmt: skip
VARIANTS = {
    "dance": {
        "sde_type": "dance_grpo",
        "noise_level": 0.3,
        "same_latent": True,
        "std_ddof": 1,
        "best_of_n": 2,
        "random_timestep_fraction": 0.5,
    },
    "mix": {"sde_window_size": 2, "sde_window": "0 4", "sde_window_strategy": "progressive", "sde_window_interval": 1},
    "guard": {"loss": "grpo_guard", "kl_weight": 0.01},
    "cps": {"sde_type": "cps", "noise_level": 0.8, "loss": "flow_cps", "reward": "jpeg_compressibility*1+background_color*1", "multi_reward": "gdpo"},
}
TRAINED = {"dance": 2, "mix": 2, "guard": 4, "cps": 4}


def script():
    spec = importlib.util.spec_from_file_location("train_flow_grpo", ROOT / "training_scripts" / "train_flow_grpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(out, **flags):
    words = []
    for name, value in {**TINY, "output_dir": out, **flags}.items():
        words += [f"--{name}"] if value is True else [f"--{name}", *(str(value).split() if name == "sde_window" else [str(value)])]
    return words


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_each_variant(variant, tmp_path, monkeypatch):
    from diffusers_align.policy import Policy

    replayed, replay = [], Policy.replay
    monkeypatch.setattr(
        Policy,
        "replay",
        lambda self, trajectory, on_step, steps=None, condition=None: (replayed.append(steps), replay(self, trajectory, on_step, steps, condition)),
    )
    flags = dict(VARIANTS[variant])
    if variant == "cps":  # background_color has a column of its own
        flags["prompts"] = "likes_blue_train"
    script().main(command(tmp_path, **flags))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["ratio_error"] for row in rows] == [0.0, 0.0], "the replay is the rollout, bit for bit"
    assert all(len(steps) == TRAINED[variant] and 4 not in steps for steps in replayed), "the last step is not trained"
    if variant == "mix":
        assert {tuple(steps) for steps in replayed} == {(0, 1), (1, 2)}
    assert any(value.abs().max() > 0 for name, value in load_file(tmp_path / "pytorch_lora_weights.safetensors").items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"loss": "flow_cps"}, "scales the ratio of --sde_type cps"),
        ({"best_of_n": 3}, "must be even"),
        ({"best_of_n": 6}, "at most --group_size 4"),
        ({"sde_window_size": 3, "sde_window": "1 3"}, "has no room for a window"),
        ({"sde_window_size": 1, "sde_window": "-2 2"}, "2 values, each a whole number from 0 to 1000, got -2 2"),
        ({"sde_window_size": 0}, "--sde_window_size must be a whole number from 1 to 1000, got 0"),
        ({"sde_window_size": 1, "sde_window_interval": 0}, "--sde_window_interval must be a whole number from 1 to 1e9, got 0"),
        ({"sde_window_size": 1, "sde_window_interval": 2}, "no effect without --sde_window_strategy progressive or exp_decay"),
        ({"sde_window": "3 5"}, "the steps that are trained, 0 to 3: end it at 4"),
        ({"sde_window": "2 6"}, "--sde_window 2 6 must be a first step and a later end within the 5 solver steps"),
        ({"eta": 1.0, "sde_window": "0 2"}, "--eta is the noise of diffusion, --sde_window that of flow matching"),
        ({"eta": 1.0, "sde_window_size": 1}, "leave out one of the two"),
        ({"eta": 1.0, "loss": "grpo_guard"}, "go by the lengths of flow matching's steps"),
        ({"eta": 1.0, "kl_form": "official", "kl_weight": 0.1}, "go by the lengths of flow matching's steps"),
        ({"sde_type": "cps", "noise_level": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"sde_window_size": 1, "sde_window": "3 5"}, "the steps that are trained, 0 to 3: end it at 4"),
        ({"sde_window_size": 1, "sde_window": "3 5", "timestep_fraction": 1.0}, "0 to 3: end it at 4"),
        ({"sde_window_size": 1, "sde_window": "3 5", "random_timestep_fraction": 0.5}, "0 to 3: end it at 4"),
        ({"sde_window_size": 2, "sde_window": "0 3", "timestep_fraction": 0.4}, "0 to 1: end it at 2"),
        ({"timestep_fraction": 0.0}, "a number above 0 and at most 1, got 0.0"),
        ({"timestep_fraction": 1.5}, "a number above 0 and at most 1, got 1.5"),
    ],
)
def test_combinations_that_make_no_sense(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script().parse_args(command(tmp_path, **flags))
    assert message in capsys.readouterr().err


def rolled_out(scheduler):
    """A trajectory with the scheduler's steps, of one sample of one number."""
    steps, path = len(scheduler.timesteps), torch.zeros(1, len(scheduler.timesteps), 1)
    return Trajectory(path, path, scheduler.timesteps, scheduler.sigmas[:steps], scheduler.stochastic_steps, path[..., 0].double(), Condition(["a fox"]))


@pytest.mark.parametrize("strategy", ["random", "progressive", "exp_decay"])
@pytest.mark.parametrize("sde_type", ["flow_grpo", "dance_grpo", "cps", "memoryless", "memoryless_em"])
def test_every_window_of_a_run_has_noise_at_each_of_its_steps(sde_type, strategy, tmp_path):
    """The widest range that the script takes, over the epochs of two rounds."""
    flags = {"sde_type": sde_type, "sde_window_size": 2, "sde_window": "0 4", "sde_window_strategy": strategy}
    flags |= {} if strategy == "random" else {"sde_window_interval": 2}
    args, module = script().parse_args(command(tmp_path, timestep_fraction=1.0, **flags)), script()
    policy = SimpleNamespace(scheduler=FlowMatchSDEScheduler(shift=3.0, sde_type=sde_type, noise_level=0.7))
    windows = set()
    for epoch in range(12):
        module.place_window(policy, args, epoch)
        policy.scheduler.set_timesteps(args.num_inference_steps)
        steps = trained_steps(rolled_out(policy.scheduler), args.timestep_fraction, args.random_timestep_fraction, f"{args.seed}/{epoch}/steps")
        assert steps == list(range(*policy.scheduler.config.sde_window))
        windows.add(tuple(steps))
    assert windows == {(0, 1), (1, 2), (2, 3)}


@pytest.mark.parametrize(("clip_range", "log_ratio", "said"), [(1e-4, None, "1.108"), ((1e-4, 2e-4), None, "1.227"), (1e-4, lambda step: None, "")])
def test_the_clip_is_explained_where_one_number_says_it(clip_range, log_ratio, said):
    """A scaled ratio's clip leaves each step another share of the true ratio: no one number."""
    lines, final = [], torch.zeros(1, 1024)
    run = SimpleNamespace(explain_once=lines.append, division=SimpleNamespace(batches_a_step=1), chunks=lambda *_: [], epoch_metrics=lambda *_: {})
    samples = SimpleNamespace(batches=[SimpleNamespace(final=final)])
    policy_gradient_epoch(run, None, samples, [0], None, clip_range=clip_range, log_ratio=log_ratio)
    assert len(lines) == bool(said) and all(said in line for line in lines), "(1 + c)^1024"


def test_each_loss_comes_with_its_published_clip_range(tmp_path):
    for loss, clip_range in (("flow_grpo", 1e-4), ("grpo_guard", 2e-6)):
        assert script().parse_args(command(tmp_path, loss=loss)).clip_range == clip_range
    assert script().parse_args(command(tmp_path, loss="flow_cps", sde_type="cps")).clip_range == 1e-5
    assert script().parse_args(command(tmp_path, clip_range=0.5)).clip_range == 0.5


@pytest.mark.parametrize(("loss", "sde_type"), [("flow_grpo", "flow_grpo"), ("grpo_guard", "flow_grpo"), ("flow_cps", "cps")])
def test_a_wider_clip_above_one_leaves_gains_their_gradient(loss, sde_type, tmp_path):
    """A ratio above 1 + clip_range with a positive advantage: cut at equal ranges, alive at a wider one; below 1 nothing changes."""
    module, (new, old, action) = script(), step()
    ratios, gradients = {}, {}
    for name, flags in (("equal", {}), ("wide", {"clip_range_high": 10.0})):
        args = module.parse_args(command(tmp_path, loss=loss, sde_type=sde_type, clip_range=1e-6, **flags))
        replayed = ReplayedStep(0, new, action, new.log_prob(action), old.log_prob(action), torch.arange(6), 0, 0.1, old)
        value, log_ratio = module.loss(args, torch.ones(6, dtype=torch.float64), replayed), module.log_ratio(args, replayed)
        numbers = ratio_diagnostics(log_ratio, torch.zeros_like(log_ratio), (args.clip_range, args.clip_range_high))
        gradients[name] = gradient(value, new.mean).flatten(1).norm(dim=1)
        ratios[name] = (numbers["clip_low"], numbers["clip_high"])
    assert ratios["equal"][1] > 0 and ratios["wide"][1] == 0 and ratios["equal"][0] == ratios["wide"][0]
    assert (gradients["wide"] > 0).all()
    assert (gradients["equal"] == 0).double().mean() == ratios["equal"][1]
    with pytest.raises(SystemExit):
        module.parse_args(command(tmp_path, clip_range_high=0.0))


def test_gdpo_leaves_out_what_the_sum_leaves_out():
    """A component that is infinite, or NaN with weight 0, has masked the sample's reward: it must not come back as an advantage."""
    samples, reward = scored()
    clean = advantages_of(samples, asked(multi_reward="gdpo"), reward)
    for broken in (float("inf"), float("-inf"), float("nan")):
        second = samples.components["second"].clone()
        second[3] = broken
        masked = samples_of(first=samples.components["first"], second=second)
        masked.rewards[3] = torch.nan
        advantages = advantages_of(masked, asked(multi_reward="gdpo"), reward)
        assert advantages[3] == 0 and advantages.isfinite().all()
        torch.testing.assert_close(advantages[6:], clean[6:], rtol=0.2, atol=0.2)
    masked, _ = scored()
    masked.rewards[0] = torch.nan
    assert advantages_of(masked, asked(multi_reward="gdpo"), reward)[0] == 0


def test_kernels_and_windows_come_with_their_published_defaults(tmp_path):
    def parsed(**flags):
        tiny = {name: value for name, value in TINY.items() if name != "kl_weight"}
        words = [w for n, v in {**tiny, "output_dir": tmp_path, **flags}.items() for w in (f"--{n}", str(v))]
        return script().parse_args(words)

    assert (parsed().noise_level, parsed().kl_weight, parsed().loss) == (0.7, 0.04, "flow_grpo")
    assert parsed(sde_type="dance_grpo").noise_level == 0.3
    assert (parsed(sde_type="cps").noise_level, parsed(sde_type="cps").loss) == (0.8, "flow_cps")
    assert parsed(sde_window_size=2).kl_weight == 0.0 and parsed(loss="grpo_guard").kl_weight == 0.0
    assert parsed(sde_window_size=2, kl_weight=0.1).kl_weight == 0.1


# --- trained steps ------------------------------------------------------------------------------------------------------


def test_the_trained_steps_are_one_rule():
    scheduler = FlowMatchSDEScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    trajectory = rolled_out(scheduler)
    noisy = trajectory.noisy_steps
    assert trained_steps(trajectory) == noisy and trained_steps(trajectory, 0.99) == [k for k in noisy if k < 9]
    assert trained_steps(trajectory, 0.01) == [0], "at least one"
    drawn = [trained_steps(trajectory, 0.99, 0.6, f"7/{epoch}/steps") for epoch in range(40)]
    assert {len(steps) for steps in drawn} == {round(0.6 * 9)} and all(steps == sorted(set(steps)) for steps in drawn)
    assert {k for steps in drawn for k in steps} == set(range(9)) and drawn[0] == trained_steps(trajectory, 0.99, 0.6, "7/0/steps") != drawn[1]
    assert len(trained_steps(trajectory, 1.0, 0.01)) == 1


def test_the_lengths_of_steps_are_the_trajectorys_own():
    for inverted in (False, True):
        scheduler = FlowMatchSDEScheduler(shift=3.0, invert_sigmas=inverted)
        scheduler.set_timesteps(5)
        trajectory = rolled_out(scheduler)
        lengths = scheduler.sigmas.diff().abs().tolist()
        scheduler.set_timesteps(7)  # a later call, of an evaluation
        assert trajectory.step_sizes == lengths
    nowhere = torch.full((5,), torch.nan)
    assert all(
        math.isnan(length) for length in Trajectory(*[torch.zeros(1, 5, 1)] * 2, nowhere, nowhere, nowhere > 0, torch.zeros(1, 5), Condition(["a"])).step_sizes
    )


def test_old_flags_are_read_as_todays(tmp_path, capsys):
    old = ["--random_timesteps", "--timestep_fraction", "0.6", "--sde_window_range", "0", "3", "--sde_window_size", "2", "--kl_beta", "0.2"]
    words = command(tmp_path)
    words[words.index("--kl_weight") : words.index("--kl_weight") + 2] = []
    args = script().parse_args([*words, *old])
    assert (args.timestep_fraction, args.random_timestep_fraction, args.sde_window, args.kl_weight) == (0.99, 0.6, (0, 3), 0.2)
    assert "--random_timesteps" in (said := capsys.readouterr().err) and "--kl_weight" in said
