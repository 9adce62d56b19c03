"""DenseGRPO: credit, calibration, the completions on a real pipeline, and the script."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline
from script_tools import RECIPES, assert_same_lora, assert_same_run, load_script, make_run, rows, run_script, run_script_on_two_processes, write_task

from diffusers_align import Policy, embedded, sde_twin
from diffusers_align.algorithms.dense_grpo import calibrate, gain_metrics, step_gains
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss
from diffusers_align.data.prompts import Prompt
from diffusers_align.rl import group_advantages
from diffusers_align.training.online.sampling import Samples
from diffusers_align.training.online.step_rewards import NoiseLevels, calibrate_noise, completion_rewards

torch.set_num_threads(1)
NAN = float("nan")
PROMPTS = ["a cat", "a cat", "two dogs", "two dogs"]
STEPS = 4


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# --- credit ------------------------------------------------------------------------------------------------------------


def test_gains_are_the_differences_of_neighbouring_rewards():
    assert torch.equal(step_gains(double([[0, 1, 3], [0.5, 0, 1]])), double([[1, 2], [-0.5, 1]]))


def test_the_loss_at_the_papers_defaults():
    rewards = double([[0, 1, 3], [0, 0, 1], [0, 2, 2], [5, 5, 5], [5, 5, 6], [5, 5, 4]])
    advantages = group_advantages(step_gains(rewards), torch.tensor([0, 0, 0, 1, 1, 1]), global_std=False)
    a = 1.2245948897605  # 1 / (sqrt(2 / 3) + 1e-4): gains of 0, 1, 2 or -1, 0, 1
    expected = double([[0, a], [-a, 0], [a, -a], [0, 0], [0, a], [0, -a]])
    torch.testing.assert_close(advantages, expected, rtol=1e-9, atol=1e-12)

    log_ratio = 1024 * double([2e-4, 2e-4, 2e-4, 0, -2e-4, -2e-4])
    loss = flow_grpo_loss(log_ratio, torch.zeros(6, dtype=torch.float64), advantages[:, 1], per_dim=1024)
    # exp(+-2e-4) = 1.00020002, 0.99980002: clipped to 1 +- 1e-4 where that is the worse of the two
    expected = double([-1.2247173492494883, 0, 1.2248398332319952, 0, -1.2243499952728254, 1.2244724302715364])
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def test_a_missing_reward_masks_the_steps_on_either_side_and_no_others():
    rewards = double([[0, NAN, 3, 4], [0, 1, 2, 2], [0, 2, 2, 5]])
    gains = step_gains(rewards)
    assert gains.isnan().tolist() == [[True, True, False], [False] * 3, [False] * 3]
    advantages = group_advantages(gains, torch.zeros(3, dtype=torch.long), global_std=False)
    assert advantages[0].tolist()[:2] == [0, 0] and advantages.isfinite().all()
    assert advantages[1, 0] == -advantages[2, 0] != 0, "the others are compared with each other"
    assert (advantages[:, 2] != 0).all()


def test_metrics_name_the_steps_that_have_gains():
    metrics = gain_metrics(torch.tensor([[1.0, NAN, -1.0], [2.0, NAN, NAN]]))
    assert metrics == {"gain/0": 1.5, "gained/0": 1.0, "gain/2": -1.0, "gained/2": 0.0}


# --- calibration -------------------------------------------------------------------------------------------------------


def test_one_round_by_hand():
    #                 even  +3 -1  all NaN  +1, three ties  +2 -1  -1 (NaN elsewhere)
    gains = double([[+1, +1, NAN, +1, +1, -1], [+1, +1, NAN, 0, +1, NAN], [-1, +1, NAN, 0, -1, NAN], [-1, -1, NAN, 0, NAN, NAN]])
    psi = calibrate(torch.full((6,), 0.3, dtype=torch.float64), gains)
    torch.testing.assert_close(psi, double([0.31, 0.29, 0.3, 0.31, 0.31, 0.31]), rtol=0, atol=1e-12)


def test_psi_stays_above_zero():
    gains = -torch.ones(5, 2)
    psi = torch.tensor([0.015, 0.01])
    assert torch.equal(calibrate(psi, gains), torch.tensor([0.01, 0.01]))
    torch.testing.assert_close(calibrate(psi + 1, gains, increment=0.25), torch.tensor([0.765, 0.76]))


def test_rounds_settle_where_gains_and_losses_just_balance():
    # A step's noise gains psi z and costs c psi^2 (z normal), so fewer than half gain; each c has its own psi that 100 samples
    # still call even: 45 of them gain while c psi is below the normal's quantile at 0.555.
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(100, dtype=torch.float64) + 0.5) / 100)[:, None]
    cost = double([0.2, 0.4, 0.8])
    balanced = 0.13830420796 / cost
    for start in (0.1, 1.0):
        psi = torch.full((3,), start, dtype=torch.float64)
        for _ in range(120):
            psi = calibrate(psi, psi * z - cost * psi**2, tolerance=11)
        assert ((psi - balanced).abs() <= 0.011).all(), (start, psi)


# --- completions on a pipeline -----------------------------------------------------------------------------------------


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


def make_policy(window=None):
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    scheduler = sde_twin(pipeline.scheduler, sde_type="dance_grpo", noise_level=[0.8] * STEPS, sde_window=window)
    return Policy(pipeline, scheduler, num_inference_steps=STEPS, guidance_scale=1.0, max_sequence_length=1)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "out")


@torch.no_grad()
def sample(policy, reward=brightness) -> Samples:
    """Two batches of two, which share their initial noise within a group."""
    batches = [policy.rollout(PROMPTS[b : b + 2], seeds=[b, b], step_seeds=[10 + b, 11 + b]) for b in (0, 2)]
    rewards = torch.cat([reward(policy.decode(t.final, t.condition).float(), t.condition.prompts) for t in batches])
    index, groups = [torch.tensor([0, 1]), torch.tensor([2, 3])], torch.tensor([0, 0, 1, 1])
    return Samples(batches, index, PROMPTS, groups, rewards, {"reward": rewards}, [Prompt(text) for text in PROMPTS])


@torch.no_grad()
def rewards_of_rollouts(policy, seeds):
    trajectories = [policy.rollout(PROMPTS[b : b + 2], seeds=[s, s], deterministic=True) for b, s in zip((0, 2), seeds)]
    return torch.cat([brightness(policy.decode(t.final, t.condition).float(), t.condition.prompts) for t in trajectories])


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def test_gains_telescope_from_the_ode_of_the_same_initial_noise_to_the_sample(policy, run):
    samples = sample(policy)
    rewards = completion_rewards(run, policy, brightness, samples, list(range(STEPS)))
    assert rewards.shape == (4, STEPS + 1) and rewards.isfinite().all()
    assert torch.equal(rewards[:, -1], samples.rewards), "the last state is the sample"
    assert torch.equal(rewards[:, 0], rewards_of_rollouts(policy, [0, 2])), "the first completion is the ODE's own rollout, bit for bit"
    gains = step_gains(rewards)
    torch.testing.assert_close(gains.sum(1), samples.rewards - rewards_of_rollouts(policy, [0, 2]), rtol=0, atol=1e-6)
    assert (gains.abs() > 1e-5).all(), "every step has its noise"
    # The baseline is the trajectory's own: with another initial noise it would differ by more than any step gains.
    assert (rewards[:, 0] - rewards_of_rollouts(policy, [5, 6])).abs().min() > 1e-3
    assert rewards[0, 0] == rewards[1, 0] and rewards[2, 0] == rewards[3, 0], "one noise a group, one baseline"


def test_only_states_around_trained_steps_are_completed_and_calls_are_as_many_as_said(policy, run):
    calls = []
    policy.pipeline.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for window, steps, completed, expected in [(None, [0, 1, 2], [0, 1, 2, 3], 10), ([0, 2], [0, 1], [0, 1, 2], 7), ([1, 3], [1], [1, 2], 5)]:
        policy.scheduler.register_to_config(sde_window=window)
        samples = sample(policy)
        calls.clear()
        rewards = completion_rewards(run, policy, brightness, samples, steps)
        assert len(calls) == expected * len(samples.batches), "T (T + 1) / 2, or w (T - s) - w (w - 1) / 2"
        assert [i for i in range(STEPS + 1) if rewards[0, i].isfinite()] == completed
    policy.scheduler.register_to_config(sde_window=None)


def test_states_behind_the_last_noisy_step_lead_to_the_sample(run):
    policy = make_policy(window=[0, 2])
    samples = sample(policy)
    for trajectory in samples.batches:
        assert torch.equal(policy.complete(trajectory, 2), trajectory.final)
        assert not torch.equal(policy.complete(trajectory, 1), trajectory.final)
    rewards = completion_rewards(run, policy, brightness, samples, [0, 1])
    assert torch.equal(rewards[:, 2], samples.rewards)


def test_rounds_of_calibration_set_the_schedulers_noise(policy, tmp_path):
    calibration = {"calibration_rounds": 2, "calibration_tolerance": 5, "calibration_increment": 0.125}
    run = make_run(tmp_path / "out", num_prompts_per_epoch=2, group_size=2, same_latent=True, **calibration)
    levels = NoiseLevels(0.5, STEPS)
    calibrate_noise(run, policy, brightness, [Prompt("a cat"), Prompt("two dogs")], levels)
    # four samples never differ by five, so psi rises twice
    assert levels.rounds == 2 and levels.psi.tolist() == [0.75] * STEPS == list(policy.scheduler.config.noise_level)
    sigmas = policy.scheduler.sigmas.tolist()
    for k in range(STEPS):
        assert policy.scheduler.kernel(k).std == pytest.approx(0.75 * math.sqrt(sigmas[k] - sigmas[k + 1]), rel=1e-6)

    restored = NoiseLevels(9.0, STEPS)
    restored.load_state_dict(levels.state_dict())
    run.args.calibration_tolerance = -1
    calibrate_noise(run, policy, brightness, [], restored)
    assert restored.psi.tolist() == [0.75] * STEPS, "all rounds are done: none is left to sample"
    with pytest.raises(ValueError, match="--num_inference_steps is 6, but this pipeline takes 4 steps"):
        calibrate_noise(run, policy, brightness, [Prompt("a cat"), Prompt("two dogs")], NoiseLevels(0.5, 6))


# --- the script --------------------------------------------------------------------------------------------------------

FLAGS = {
    "num_prompts_per_epoch": 2,
    "group_size": 2,
    "calibration_rounds": 1,
    "calibration_increment": 0.1,
    "sde_window": (0, 2),
    "gradient_accumulation_steps": 2,
}
FIXED = {name: value for name, value in FLAGS.items() if name != "calibration_increment"} | {"calibration_rounds": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    task = write_task(tmp_path_factory.mktemp("task"))
    return task, run_script("dense_grpo", tmp_path_factory.mktemp("dense") / "run", task, num_epochs=2, **FLAGS)


def test_the_script_trains_and_logs_gains(finished):
    metrics = rows(finished[1])
    assert [row["epoch"] for row in metrics] == [0, 1]
    for row in metrics:
        assert row["ratio_error"] == 0.0 and row["grad_norm"] > 0
        assert {name for name in row if name.startswith("gain/")} == {"gain/0", "gain/1"} and row["gain/0"] != 0 != row["gain/1"]
    assert metrics[0]["kl"] == 0 < metrics[1]["kl"], "one update per epoch: the first starts at the reference"


def test_resumed_equals_uninterrupted_with_the_calibration_of_the_checkpoint(finished, tmp_path, capsys):
    task, expected = finished
    run_script("dense_grpo", tmp_path / "run", task, num_epochs=1, **FLAGS)
    calibrated = [line for line in capsys.readouterr().out.splitlines() if line.startswith("psi after 1 rounds")]
    assert len(calibrated) == 1 and calibrated[0].endswith(", 0.300") and "0.300, 0.300" not in calibrated[0], "the window's steps moved"
    # Another psi_init: what counts is the checkpoint's.
    run_script("dense_grpo", tmp_path / "run", task, num_epochs=2, **FLAGS, psi_init=0.9, resume_from_checkpoint="latest", allow_changes=True)
    assert calibrated[0] in capsys.readouterr().out
    assert_same_run(tmp_path / "run", expected, "checkpoint-2")


def test_each_step_is_trained_on_its_own_advantage(finished, tmp_path, monkeypatch):
    def only_step(k):
        return lambda samples, args, reward, gains: torch.zeros_like(gains).index_fill(1, torch.tensor(k), 1.0)

    for k, trained in ((1, True), (2, False)):  # 2 is behind the window
        monkeypatch.setattr("diffusers_align.training.online.group_advantages.advantages_of", only_step(k))
        out = run_script("dense_grpo", tmp_path / str(k), finished[0], **{**FIXED, "kl_weight": 0, "allow_no_signal": True})
        assert (rows(out)[0]["grad_norm"] > 0) is trained


@pytest.mark.parametrize("recipe", ["dense_grpo_sd35", "dense_grpo_mini_sd3"])
def test_recipes_parse(recipe):
    args = load_script("dense_grpo").parse_args(["--config", str(RECIPES / f"{recipe}.yaml")])
    assert args.prompts and args.global_std is False and args.psi_init > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"psi_init": 0}, "--psi_init must be a number above 0"),
        ({"sde_window": (2, 1)}, "--sde_window 2 1 must be a first step and a later end"),
        ({"multi_reward": "gdpo"}, "for each step"),
    ],
)
def test_flags_that_make_no_sense(finished, tmp_path, capsys, flags, message):
    with pytest.raises((SystemExit, ValueError)) as error:
        run_script("dense_grpo", tmp_path / "run", finished[0], num_epochs=1, **{**FLAGS, **flags})
    assert message in capsys.readouterr().err + str(error.value)


@pytest.mark.long
def test_two_processes_train_what_one_does(tmp_path):
    """Gains, calibration and advantages are of the samples of all processes."""
    task = write_task(tmp_path)
    flags = {
        **FLAGS,
        "num_epochs": 2,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "seed": 43,
    }  # with this seed, both groups straddle the processes
    two = run_script_on_two_processes("dense_grpo", tmp_path / "two", task, **flags)
    one = run_script("dense_grpo", tmp_path / "one", task, **flags, reward=f"{task / 'rewards.py'}:recorded")
    assert_same_lora(two, one, rtol=0, atol=1e-5)
    for mine, theirs in zip(rows(two), rows(one)):
        assert mine["ratio_error"] == 0.0 and all(mine[key] == pytest.approx(theirs[key], abs=1e-5) for key in ("reward", "gain/0", "gained/1"))
