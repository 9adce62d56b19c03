"""A run that learns nothing says so, with the cause, and does not end as a success."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from script_tools import load_script, make_run, rows, run_script, write_task
from torch import nn

from diffusers_align.rewards import InvalidReward
from diffusers_align.training.offline import reward_fitting
from diffusers_align.training.online.sampling import Samples
from diffusers_align.training.report.pictures import reward_curve
from diffusers_align.training.run.health import PATIENCE, Health, Seen, Start

CONSTANT = "def constant(images, prompts, **columns):\n    return 0 * images.flatten(1).mean(1) + 0.5\n"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = write_task(tmp_path_factory.mktemp("task"))
    (folder / "constant.py").write_text(CONSTANT)
    return folder


# --- has anything moved ------------------------------------------------------------------------------------------------


def lora():
    return [nn.Parameter(torch.full((4, 8), 0.1)), nn.Parameter(torch.zeros(8, 4))]


@pytest.mark.parametrize("value, moved", [(0.0, False), (1e-30, False), (1e-9, False), (1e-7, True), (-1e-3, True), (torch.inf, True), (torch.nan, True)])
def test_a_move_counts_above_the_resolution_of_the_weights(value, moved):
    a, b = parameters = lora()
    start = Start(parameters)
    start.mark()
    b.data[3, 2] = value
    assert start.moved() == moved


def test_weight_decay_of_a_lora_that_learns_nothing_is_no_move():
    a, b = parameters = lora()
    start = Start(parameters)
    start.mark()
    a.data *= 0.5
    assert not start.moved()
    b.data += 0.1
    assert start.moved()


def test_a_resumed_run_is_measured_from_where_it_goes_on():
    a, b = parameters = lora()
    start = Start(parameters)
    b.data += 1  # what a checkpoint brings
    start.mark()
    assert not start.moved()
    b.data[0, 0] += 1e-3
    assert start.moved()


# --- what is said ------------------------------------------------------------------------------------------------------


def seen(row, made=2, skipped=0, rates=(1e-3,), moved=False, number=8, **args):
    flags = {"lr_scheduler": "constant", "lr_warmup_steps": 0, "learning_rate": 1e-3, "max_grad_norm": 1.0, "push_to_hub": False, **args}
    return Seen({"grad_norm": 0.1, **row}, SimpleNamespace(**flags), number, made, skipped, list(rates), moved)


@pytest.mark.parametrize(
    "look, message",
    [
        (seen({"zero_std": 1.0, "reward": 0.5, "grad_norm": 0}, group_size=4), r"no two rewards that are compared differ \(mean 0.5\).*black images"),
        (seen({"zero_std": 1.0}, num_samples_per_epoch=1), "--num_samples_per_epoch 1"),
        (seen({"pairs": 0, "zero_std": 0, "grad_norm": 0}, made=0, rates=(), min_margin=3.0), "by more than --min_margin 3"),
        (seen({"kept": 0, "score_gap": 0.01, "grad_norm": 0}, made=0, rates=(), threshold=0.3), r"--threshold 0.3 .*by 0.01 on average\). Raise --score_scale"),
        (seen({"accepted": 0, "kl": 3.0, "improvement": -1.0}, made=0, rates=(), max_kl=0.05), "line search found none within --max_kl 0.05"),
        (seen({"grad_norm": 0}, made=0, skipped=4, rates=()), "skipped all 4 optimizer steps.*bf16"),
        (seen({}, rates=(0.0,), lr_scheduler="linear", lr_warmup_steps=9), "--lr_scheduler linear with --lr_warmup_steps 9"),
        (seen({}, learning_rate=1e-30), r"norm 0.1\): steps of --learning_rate 1e-30"),
        (seen({}, max_grad_norm=1e-30), "--max_grad_norm 1e-30"),
        (seen({"grad_norm": 0}, reward_map="hinge", reward_target=-5), "above --reward_target -5"),
        (seen({"grad_norm": 0}), "does not depend on the weights"),
        (seen({"reward": 4.96}, moved=True, reward_map="distance", reward_target=1), r"mean, 4.96, lies above --reward_target 1, and .*--reward_map none"),
        (seen({"invalid_rewards": 4.0}, moved=True), r"4 of 8 rewards \(50%\) are missing"),
        (seen({"ratio_error": 4e-4}, moved=True), "ratio_error is 0.0004 and should be 0.*cache on the denoiser"),
        (seen({"ratio_error": float("nan")}, moved=True), "ratio_error is nan"),
    ],
)
def test_each_cause_is_named_alone(look, message):
    found = look.symptoms()
    assert len(found) == 1 and re.search(message, found[0], re.DOTALL), found


@pytest.mark.parametrize("row", [{}, {"zero_std": 0.9}, {"ratio_error": 1e-7}, {"invalid_rewards": 1.0}, {"pairs": 5, "kept": 0.1, "accepted": 1.0}])
def test_a_run_that_learns_is_left_alone(row):
    assert seen(row, moved=True).symptoms() == []


@pytest.mark.parametrize("reward_map, target, reward", [("distance", 1.0, 0.9), ("hinge", 1.0, 4.96), ("shortfall", 1.0, 4.96), ("none", None, 4.96)])
def test_rewards_that_are_raised_or_let_be_are_no_symptom(reward_map, target, reward):
    assert seen({"reward": reward}, moved=True, reward_map=reward_map, reward_target=target).symptoms() == []


def test_no_step_at_all_of_a_schedule_that_is_zero_for_a_while():
    """The weights moved in an earlier epoch: an end of a schedule at 0 is no fault."""
    assert seen({}, rates=(0.0,), moved=True, lr_scheduler="cosine").symptoms() == []


NOISE, LEARNED = {"logistic": 0.9}, {"logistic": 0.69}


@pytest.mark.parametrize(
    "rows, steps, said",
    [
        ([NOISE] * 3, 20, 1),
        ([NOISE] * 9, 20, 1),  # once
        ([NOISE] * 2, 20, 0),
        ([NOISE] * 3, 4, 0),  # so few steps say nothing
        ([NOISE, LEARNED, LEARNED, LEARNED], 20, 0),
        ([{"logistic": 0.6931}] * 5, 20, 0),  # a reference that has not moved
        ([{"loss": 3.0}] * 5, 20, 0),  # a loss without pairs
    ],
)
def test_pairs_that_are_told_apart_worse_than_by_a_coin(rows, steps, said):
    health, printed = trained([], moved=True)
    run = health.run
    run.args.beta, run.optimizer_steps = 200.0, steps
    for row in rows:
        run.history.append({"epoch": run.epoch, **ALIVE, **row})
        run.epoch += 1
        health.look()
    warnings = [text for text in printed if "above log 2" in text]
    assert len(warnings) == said
    if said:
        assert "0.900 over the last 3 epochs" in warnings[0] and "--beta (now 200) and --learning_rate (now 0.001)" in warnings[0]


def test_losses_of_pairs_that_are_not_logistic_are_left_alone():
    health, printed = trained([], moved=True)
    health.run.args.loss, health.run.optimizer_steps = "ipo", 20
    for _ in range(4):
        health.run.history.append({"epoch": health.run.epoch, **ALIVE, **NOISE})
        health.run.epoch += 1
        health.look()
    assert not any("above log 2" in text for text in printed)


# --- the verdict -------------------------------------------------------------------------------------------------------


def trained(rows_seen, moved, allow=False, compares_rewards=True, num_samples=None):
    """A run's health after epochs with these metrics."""
    printed = []
    run = SimpleNamespace(args=seen({}).args, history=[], epoch=0, optimizer_steps=0, skipped_steps=0, rates=[], division=None, output_dir="out", is_main=True)
    run.early_stop = None
    run.args.allow_no_signal, run.print = allow, lambda *values: printed.append(" ".join(map(str, values)))
    run.division = num_samples and SimpleNamespace(num_samples=num_samples)
    health, parameters = Health(run), lora()
    health.compares_rewards = compares_rewards
    health.watch(parameters)
    health.begin()
    for row in rows_seen:
        run.history.append({"epoch": run.epoch, **row})
        run.epoch, run.optimizer_steps = run.epoch + 1, run.optimizer_steps + 1
        parameters[1].data += 0.1 if moved else 0
        health.look()
    return health, printed


ALIVE, SILENT = {"zero_std": 0.5, "grad_norm": 0.1}, {"zero_std": 1.0, "grad_norm": 0.1}


@pytest.mark.parametrize(
    "rows_seen, moved, message",
    [
        ([ALIVE, ALIVE], False, "after 2 epochs the weights are those that it started from"),
        ([SILENT, SILENT], True, "in 2 epochs no two rewards that are compared differed"),
        ([{"grad_norm": 0.0}], True, "in 1 epoch every gradient was 0"),
    ],
)
def test_nothing_learned_ends_with_another_status(rows_seen, moved, message, capsys):
    health, printed = trained(rows_seen, moved)
    with pytest.raises(SystemExit) as end:
        health.verdict()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert f"NOTHING WAS LEARNED: {message}" in said and "The files in out are complete" in said and "--allow_no_signal" in said
    health, printed = trained(rows_seen, moved, allow=True)
    health.verdict()
    assert any("NOTHING WAS LEARNED" in line for line in printed)


@pytest.mark.parametrize("rows_seen", [[ALIVE], [SILENT, ALIVE], [ALIVE, SILENT], [{"loss": 1.0}], [{"grad_norm": 0.2}]])
def test_a_run_that_learned_ends_as_a_success(rows_seen):
    health, _ = trained(rows_seen, True)
    health.verdict()


@pytest.mark.parametrize("rows_seen", [[SILENT], [SILENT, SILENT]])
def test_equal_rewards_are_no_silence_where_a_method_compares_none(rows_seen):
    health, printed = trained(rows_seen, True, compares_rewards=False)
    health.verdict()
    assert printed == ["Health after epoch 1: gradient norm 0.1, 1 optimizer step, the weights have moved."]
    assert trained(rows_seen, False, compares_rewards=False)[0].learned_nothing, "weights that stand still are"


@pytest.mark.parametrize("rewards, learned", [([0.1, 0.3, 0.3], True), ([0.2, 0.2, 0.2], False), ([0.2], False)])
def test_one_sample_of_an_epoch_is_compared_with_those_of_other_epochs(rewards, learned):
    """By the value that is learned of them."""
    health, _ = trained([{**SILENT, "reward": reward} for reward in rewards], True, num_samples=1)
    assert health.learned_nothing != learned
    assert trained([{**SILENT, "reward": reward} for reward in rewards], True, num_samples=4)[0].learned_nothing


def test_an_early_stop_that_keeps_the_weights_before_training_is_said_aloud():
    health, printed = trained([ALIVE, ALIVE], True)
    health.run.early_stop = SimpleNamespace(epoch=0)
    health.verdict()
    assert "WARNING: no validation was better than that before training" in printed[-1]


def test_many_silent_epochs_are_counted():
    health, printed = trained([ALIVE, SILENT, SILENT], True)
    health.verdict()
    assert any("2 of 3 epochs had no signal" in line for line in printed)


def test_a_resumed_run_with_no_epoch_left_is_no_fault():
    health, _ = trained([], False)
    health.verdict()


def test_the_first_epoch_is_put_in_words():
    _, printed = trained([{**ALIVE, "ratio_error": 0.0}, ALIVE], True)
    numbers = "50% of the groups have rewards that differ, gradient norm 0.1, 1 optimizer step, ratio error 0, the weights have moved"
    assert printed == [f"Health after epoch 1: {numbers}."]
    _, printed = trained([SILENT], False)
    assert "WARNING: nothing was learned in this epoch." in printed[1]


def test_a_run_that_moves_nothing_ends_by_itself():
    assert not trained([SILENT] * (PATIENCE - 1), False)[0].hopeless and trained([SILENT] * PATIENCE, False)[0].hopeless
    assert not trained([SILENT] * PATIENCE, True)[0].hopeless and not trained([SILENT] * PATIENCE, False, allow=True)[0].hopeless


# --- in the scripts ----------------------------------------------------------------------------------------------------


GROUPS = {"num_prompts_per_epoch": 2, "group_size": 2}


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("flow_grpo", {**GROUPS, "reward": "constant"}, r"rewards that are compared differ \(mean 0.5\)"),
        ("nft", {**GROUPS, "reward": "constant", "num_train_timesteps": 1}, r"rewards that are compared differ \(mean 0.5\)"),
        ("d3po", {**GROUPS, "reward": "constant"}, r"rewards that are compared differ \(mean 0.5\)"),
        ("ddpo", {"num_samples_per_epoch": 4, "reward": "constant"}, r"rewards that are compared differ \(mean 0.5\)"),
        ("flow_grpo", {**GROUPS, "learning_rate": 1e-30}, "--learning_rate 1e-30"),
        ("flow_grpo", {**GROUPS, "gradient_accumulation_steps": 2, "lr_scheduler": "linear", "lr_warmup_steps": 5}, "--lr_warmup_steps 5"),
    ],
)
def test_a_script_that_learns_nothing_says_why_after_its_files_are_written(script, flags, message, task, tmp_path, capsys):
    if flags.get("reward") == "constant":
        flags = {**flags, "reward": f"{task / 'constant.py'}:constant"}
    if script == "ddpo":
        flags = {**flags, "pretrained_model_name_or_path": "mini-sd", "call_kwargs": "{}"}
    with pytest.raises(SystemExit) as end:
        run_script(script, tmp_path / "run", task, **flags)
    assert end.value.code == 1
    said = capsys.readouterr()
    assert re.search(message, said.err) and "NOTHING WAS LEARNED" in said.err and "WARNING: nothing was learned in this epoch" in said.out
    assert all((tmp_path / "run" / name).is_file() for name in (LORA, "README.md", "metrics.jsonl", "before_after.png"))
    assert "Nothing was learned: " in (tmp_path / "run" / "README.md").read_text()
    (row,) = rows(tmp_path / "run")
    assert row["zero_std"] == (1.0 if "learning_rate" not in flags and "lr_scheduler" not in flags else row["zero_std"])


@pytest.mark.parametrize(
    "script, flags",
    [
        ("spo", {"num_samples_per_epoch": 1, "train_batch_size": 1, "divert_start_step": 0, "threshold": 0.0}),
        ("adjoint_matching", {"num_prompts_per_epoch": 1, "train_batch_size": 1, "reward_scale": 300}),
    ],
)
def test_a_script_that_compares_no_rewards_learns_from_one_sample(script, flags, task, tmp_path, capsys):
    (row,) = rows(run_script(script, tmp_path / "run", task, **flags))
    assert row["zero_std"] == 1.0 and row["grad_norm"] > 0
    said = capsys.readouterr()
    assert "learned" not in said.out + said.err and "NOTHING" not in said.err


def test_it_may_be_allowed(task, tmp_path, capsys):
    run_script("flow_grpo", tmp_path / "run", task, **GROUPS, reward=f"{task / 'constant.py'}:constant", allow_no_signal=True)
    assert "NOTHING WAS LEARNED" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["nft", "awm"])
def test_one_noise_a_group_is_refused_where_steps_have_none(script, tmp_path, capsys):
    flags = ["--pretrained_model_name_or_path", "mini-sd3", "--prompts", "mini_train", "--reward", "clip_score", "--output_dir", str(tmp_path), "--same_latent"]
    with pytest.raises(SystemExit) as end:
        load_script(script).parse_args(flags)
    assert end.value.code == 2 and "--same_latent: this script samples without noise in its steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, targets", [("pair", [[0.5], [0.5]]), ("binary", [[1.0], [1.0]]), ("scored", [[3.0], [3.0]]), ("ranked", [[1.0, 1.0], [2.0, 2.0, 2.0]])]
)
def test_a_reward_is_not_fitted_to_data_that_prefers_nothing(kind, targets):
    examples = [SimpleNamespace(target=torch.tensor(target)) for target in targets]
    with pytest.raises(ValueError, match=f"nothing to learn from 2 examples of kind {kind}"):
        reward_fitting.check_signal(kind, reward_fitting.targets_of(examples))
    targets[0][0] = 0.0
    reward_fitting.check_signal(kind, reward_fitting.targets_of([SimpleNamespace(target=torch.tensor(target)) for target in targets]))


# --- zero_std ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups, rewards, expected",
    [
        ([0, 1, 2], [0.1, 0.2, 0.3], 1.0),  # each alone
        ([0, 0, 0], [0.1, 0.2, 0.3], 0.0),
        ([0, 0, 0], [0.2, 0.2, 0.2], 1.0),
        ([0, 0, 1, 1], [0.2, 0.2, 0.1, 0.3], 0.5),
        ([0, 0, 1, 1], [0.2, float("nan"), 0.1, 0.3], 0.5),  # what is left of a group is alone
    ],
)
def test_zero_std_is_always_there(groups, rewards, expected):
    rewards = torch.tensor(rewards)
    samples = Samples([], [], ["a"] * len(groups), torch.tensor(groups), rewards, {"reward": rewards}, [])
    assert samples.metrics()["zero_std"] == expected


# --- optimizer steps ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stepping(tmp_path):
    """A run on a parameter, with a cosine schedule of four steps and an average."""
    run = make_run(tmp_path / "run", lr_scheduler="linear", learning_rate=1e-2, use_ema=True, ema_interval=1)
    parameter = nn.Parameter(torch.zeros(3))
    run.train_parameters([parameter], lambda folder: None)
    run.load_optimizer(4)
    run.early_stop = None
    return run, parameter


def test_a_skipped_step_moves_nothing_on(stepping, monkeypatch):
    run, parameter = stepping
    parameter.grad = torch.ones(3)
    monkeypatch.setattr(type(run.optimizer), "step_was_skipped", property(lambda self: True))
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    run.optimizer_step()
    assert (run.optimizer_steps, run.skipped_steps, run.rates) == (0, 1, [])
    assert run.lr_scheduler.get_last_lr() == [1e-2] and run.ema.optimization_step == 0
    monkeypatch.undo()
    parameter.grad = torch.ones(3)
    run.optimizer_step()
    assert (run.optimizer_steps, run.skipped_steps, run.rates) == (1, 1, [1e-2]) and run.ema.optimization_step == 1


def test_the_logged_rate_is_the_one_that_the_epoch_used(stepping):
    run, parameter = stepping
    logged = []
    for run.epoch in range(2):
        run.rates.clear()
        for _ in range(2):
            parameter.grad = torch.ones(3)
            run.optimizer_step()
        logged.append(run.epoch_metrics(None, [], [1.0], {})["lr"])
    assert logged == pytest.approx([(1e-2 + 0.75e-2) / 2, (0.5e-2 + 0.25e-2) / 2])


def test_an_epoch_without_a_single_reward_stops(stepping):
    run, _ = stepping
    with pytest.raises(InvalidReward, match="Not one sample of epoch 0 has a reward"):
        run.epoch_metrics(None, [], [1.0], {"reward": []})
    assert "reward" not in run.epoch_metrics(None, [], [1.0], {"loss": [1.0]})


@pytest.mark.parametrize("history", [[{"reward": 1.0}, {}], [{}, {"reward": 1.0, "kl": 0.1}], [{"other": 1.0}], [{}], []])
def test_a_curve_with_gaps_ends_no_run(history, tmp_path):
    history = [{"epoch": i, **row} for i, row in enumerate(history)]
    reward_curve(history, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").is_file() == any("reward" in row for row in history)


def test_a_curve_that_cannot_be_drawn_ends_no_run(stepping, monkeypatch, capsys):
    run, _ = stepping
    monkeypatch.setattr("diffusers_align.training.run.metrics.reward_curve", lambda history, path: 1 / 0)
    run.log({"reward": 1.0})
    assert json.loads((run.output_dir / "metrics.jsonl").read_text()) == {"epoch": 0, "reward": 1.0}
    assert "reward_curve.png could not be drawn (ZeroDivisionError" in capsys.readouterr().out


# --- how the process ends ----------------------------------------------------------------------------------------------


def test_a_run_that_ended_has_finished(stepping):
    run, parameter = stepping
    assert not run.finished
    run.end()
    assert run.finished and isinstance(run.health, Health)
