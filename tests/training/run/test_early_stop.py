"""The early stop: what it stops on, that the best weights are what is left, that it resumes exactly, and that processes stop together."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from script_tools import assert_same_lora, assert_same_run, load_script, rows, run_script, run_script_on_two_processes, write_task

from diffusers_align.data.prompts import Prompt
from diffusers_align.training.online.sampling import Evaluation
from diffusers_align.training.run.early_stop import EarlyStop, fall_in_errors

torch.set_num_threads(1)
PROMPTS = [Prompt("a"), Prompt("b")]
FLAGS = {"num_samples_per_epoch": 2, "num_epochs": 3, "validation_epochs": 1, "num_eval_samples": 2, "num_validation_images": 2, "num_inference_steps": 2}
WATCHED = {**FLAGS, "early_stop_metric": "reward", "early_stop_patience": 1, "use_ema": True, "ema_interval": 1}
# The held-out reward after so many epochs: it has a peak at 1, and who waits sees another.
PLAN = [0.0, 3.0, 1.0, 9.0]


# --- by hand --------------------------------------------------------------------------------------------------------------


def stop_of(number=4, prompts=PROMPTS, **flags):
    args = {"early_stop_metric": None, "early_stop_patience": 2, "early_stop_diversity": None, "early_stop_hacking": None}
    args |= {"eval_reward": "other", "num_eval_samples": number, **flags}
    parameters = [torch.nn.Parameter(torch.zeros(3))]
    return EarlyStop(SimpleNamespace(args=SimpleNamespace(**args), register=lambda name, it, fresh=None: None, parameters=parameters), prompts)


def look(stop, epoch, reward=0.0, other=0.0, spread=1.0):
    """After `epoch` epochs the weights are `epoch`; the two images of each prompt lie `spread` apart."""
    shown(partial(stop.look, epoch), stop, epoch, reward, other, spread)


def shown(to, stop, epoch, reward, other=0.0, spread=1.0):
    stop.run.parameters[0].data = torch.full((3,), float(epoch))
    images = [torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.full((3, 2, 2), spread), torch.full((3, 2, 2), spread)]
    others = other if isinstance(other, list) else [other, math.nan]
    rewards = {"reward": torch.tensor([reward, reward]), "other": torch.tensor(others)}
    to(Evaluation(["a", "b", "a", "b"], [0, 1, 2, 3], images, rewards))


def kept(stop):
    with stop.weights.applied():
        return stop.run.parameters[0][0].item()


@pytest.mark.parametrize(
    ("flags", "earliest"),
    [
        ({"early_stop_hacking": 3.0, "num_epochs": 20}, 20),
        ({"early_stop_hacking": 3.0, "num_epochs": 21}, None),
        ({"early_stop_metric": "reward", "num_epochs": 40}, 40),
        ({"early_stop_metric": "reward", "num_epochs": 41}, None),
        ({"early_stop_metric": "reward", "early_stop_diversity": 0.7, "num_epochs": 21}, None),
    ],
)
def test_validations_that_are_too_far_apart_are_said(flags, earliest):
    said, args = [], {"early_stop_metric": None, "early_stop_patience": 2, "early_stop_diversity": None, "early_stop_hacking": None}
    args = SimpleNamespace(**{**args, "eval_reward": "other", "num_eval_samples": 4, "validation_epochs": 20, **flags})
    run = SimpleNamespace(args=args, register=lambda name, it, fresh=None: None, explain_once=lambda *texts: said.extend(texts))
    assert EarlyStop.of_run(run, PROMPTS) is not None
    assert len(said) == (earliest is not None)
    assert not said or f"after epoch {earliest} at the earliest, and this one has {args.num_epochs}" in said[0] and "Lower --validation_epochs" in said[0]


@pytest.mark.parametrize("metric", ["reward", "eval_reward"])
def test_it_waits_for_its_patience_and_keeps_the_peak(metric):
    stop, name = stop_of(early_stop_metric=metric), {"reward": "reward", "eval_reward": "other"}[metric]
    reasons = []
    for epoch, value in enumerate([0.0, 1.0, 0.5, 3.0, 3.0, math.nan]):
        look(stop, epoch, **{name: value})
        reasons.append(stop.reason)
    assert reasons[:5] == [None] * 5 and "has not risen above 3 for 2 validations" in reasons[5]
    assert (stop.epoch, stop.seen, kept(stop)) == (3, 5, 3.0) and stop.run.parameters[0][0] == 5
    assert stop.summary().startswith("Stopped after epoch 5: ") and "after epoch 3, the best" in stop.summary()


def test_the_pretrained_model_may_be_the_best():
    stop = stop_of(early_stop_metric="reward")
    for epoch in range(3):
        look(stop, epoch, reward=-float(epoch))
    assert stop.reason and kept(stop) == 0.0 and "before training" in stop.summary()


def test_diversity_stops_at_once_and_keeps_what_came_before():
    stop = stop_of(early_stop_diversity=0.6)
    for epoch, spread in enumerate([2.0, 2.5, 1.3, 1.1]):
        look(stop, epoch, spread=spread)
        assert (stop.reason is None) == (epoch < 3) and stop.variety == pytest.approx(spread)
    assert kept(stop) == 2.0 and "fell to 1.1, below 0.6 of the pretrained model's 2" in stop.reason


def test_a_fall_is_in_standard_errors_of_the_paired_difference():
    before, change = torch.tensor([0.9, 0.1, 0.5, 0.3]), torch.tensor([-0.1, -0.3, -0.1, -0.3])
    assert fall_in_errors(before, before + change) == pytest.approx(0.2 / (change.std().item() / 2))
    assert fall_in_errors(before, before - change) < 0 and fall_in_errors(before, before) == 0
    assert fall_in_errors(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.25])) == math.inf
    assert math.isnan(fall_in_errors(before[:1], before[:1] - 1))


def test_a_hacked_reward_stops_the_run_and_what_came_before_is_kept():
    stop = stop_of(early_stop_hacking=3.0)
    for epoch, others in enumerate([[0.8, 0.6, 0.7], [0.7, 0.65, 0.7], [0.9, 0.5, 0.6], [0.41, 0.2, 0.3]]):
        look(stop, epoch, reward=float(epoch), other=others)
        assert (stop.reason is None) == (epoch < 3)
    assert kept(stop) == 2.0 and stop.reason == f"other fell by {stop.fall:.1f} standard errors below the pretrained model's, more than 3" and stop.fall > 3
    again = stop_of(early_stop_hacking=3.0)
    again.load_state_dict(stop.state_dict())
    assert again.reason == stop.reason
    again.args.early_stop_hacking = 1e9
    assert again.reason is None


def test_images_that_have_lost_their_score_are_no_gain():
    """What a mean over the survivors would call a rise: 0.5 before, 0.9 of the one image that can still be judged."""
    lost, four = [0.9, math.nan, math.nan, math.nan], [0.1, 0.3, 0.7, 0.9]
    for metric, patience in (("eval_reward", 2), (None, 2)):
        stop = stop_of(early_stop_metric=metric, early_stop_patience=patience, early_stop_hacking=None if metric else 3.0)
        look(stop, 0, other=four)
        look(stop, 1, other=[0.2, 0.4, 0.8, 1.0])
        look(stop, 2, other=lost)
        assert stop.lost == {"other": 0.75} and kept(stop) == 1.0
        assert stop.reason == (None if metric else "other has no score for 75% of the images that it could score before training")
        again = stop_of(early_stop_metric=metric, early_stop_hacking=stop.args.early_stop_hacking)
        again.load_state_dict(stop.state_dict())
        assert again.reason == stop.reason and torch.equal(again.first_scores["other"], torch.tensor(four).double())
    stop = stop_of(early_stop_hacking=3.0)
    look(stop, 0, other=[0.5, 0.4, math.nan])
    look(stop, 1, other=[math.nan] * 3)
    assert stop.reason is not None and math.isnan(stop.fall), "no fall can be measured, and that is no good sign"


def test_a_judge_that_sees_nothing_any_more_ends_the_run_also_where_the_trained_reward_has_lost_scores():
    stop = stop_of(early_stop_metric="reward", early_stop_hacking=3.0)
    for epoch, (reward, other) in enumerate([([0.1, 0.2], [0.5, 0.4]), ([0.3, math.nan], [math.nan] * 2)]):
        images = [torch.zeros(3, 2, 2)] * 4
        stop.look(epoch, Evaluation(["a", "b"] * 2, [0, 1, 2, 3], images, {"reward": torch.tensor(reward), "other": torch.tensor(other)}))
    assert stop.reason == "other has no score for 100% of the images that it could score before training"


def test_what_is_watched_anew_at_a_resume_is_compared_with_the_pretrained_model():
    first = stop_of(early_stop_metric="reward")
    look(first, 0, reward=0.1)
    resumed, old = stop_of(early_stop_metric="reward", early_stop_hacking=3.0), first.state_dict()
    del old["first_scores"]  # as in a checkpoint of a time when it had none
    resumed.load_state_dict({**old, "first_judged": None})
    shown(resumed.begin, resumed, 1, 0.1, [0.8, 0.9, 0.86, 0.84])
    look(resumed, 1, reward=5.0, other=[0.1, 0.2, 0.15, 0.1])
    assert "other fell by" in resumed.reason and resumed.epoch == 0
    varied = stop_of(early_stop_metric="reward", early_stop_diversity=0.5)
    varied.load_state_dict(first.state_dict())
    shown(varied.begin, varied, 1, 0.1, spread=2.0)
    look(varied, 1, reward=5.0, spread=0.5)
    assert "diversity fell to 0.5, below 0.5 of the pretrained model's 2" in varied.reason and varied.epoch == 0
    fewer = stop_of(early_stop_metric="eval_reward")
    shown(fewer.begin, fewer, 0, 0.0, [0.5, 0.5, 0.5])
    shown(fewer.begin, fewer, 0, 0.0, [0.5, 0.7])
    assert fewer.first_scores["other"].tolist() == pytest.approx([0.5, 0.7]), "of as many images as now"


def test_a_mean_over_fewer_images_is_compared_over_these():
    stop = stop_of(early_stop_metric="eval_reward")
    look(stop, 0, other=[0.1, 0.5, 0.5, 0.5, 0.9])
    look(stop, 1, other=[math.nan, 0.5, 0.5, 0.5, 0.9])  # a fifth: no matter of the model, and no rise
    assert stop.epoch == 0 and stop.best == pytest.approx(0.5)
    look(stop, 2, other=[math.nan, 0.6, 0.6, 0.6, 1.0])
    assert stop.epoch == 2 and stop.best == pytest.approx(0.6)


def test_pictures_that_are_alike_are_no_peak():
    stop = stop_of(early_stop_metric="reward", early_stop_diversity=0.5)
    look(stop, 0, reward=0.0)
    look(stop, 1, reward=1.0)
    look(stop, 2, reward=5.0, spread=0.1)
    assert "diversity" in stop.reason and kept(stop) == 1.0


def test_its_state_is_that_of_the_uninterrupted():
    values, whole, first, second = [0.0, 2.0, 1.0, 1.5], *(stop_of(early_stop_metric="reward", early_stop_diversity=0.5) for _ in range(3))
    for epoch, value in enumerate(values):
        look(whole, epoch, reward=value)
    for epoch in (0, 1, 2):
        look(first, epoch, reward=values[epoch])
    second.load_state_dict(first.state_dict())
    look(second, 3, reward=values[3])
    assert second.reason == whole.reason and second.reason is not None
    state, expected = second.state_dict(), whole.state_dict()
    assert torch.equal(state.pop("weights")["00000"], expected.pop("weights")["00000"]) and state == expected
    second.args.early_stop_patience = 3  # more patience, and it goes on
    assert second.reason is None


@pytest.mark.parametrize("values, kept_epoch", [([9.0, 1.0, 2.0, 0.0], 4), ([9.0, 3.0, 2.0, 0.0], 3)])
def test_one_that_begins_in_the_middle_keeps_no_weights_that_it_has_not_seen(values, kept_epoch):
    stop = stop_of(early_stop_metric="reward", early_stop_diversity=0.5)
    shown(stop.measure, stop, 3, values[0], spread=2.0)  # what the pretrained model makes, while the weights are those after epoch 3
    assert stop.seen is None and stop.weights is None and stop.first_variety == pytest.approx(2.0)
    for epoch, value in enumerate(values[1:], 3):
        look(stop, epoch, reward=value, spread=1.5)
    assert (stop.epoch, kept(stop)) == (kept_epoch, float(kept_epoch)) and f"after epoch {kept_epoch}, the best" in stop.summary()


def test_one_that_begins_with_pictures_that_are_alike_stops_at_once():
    stop = stop_of(early_stop_metric="reward", early_stop_diversity=0.5)
    shown(stop.measure, stop, 3, 0.0, spread=2.0)
    look(stop, 3, reward=1.0, spread=0.5)
    assert "diversity fell" in stop.reason and kept(stop) == 3.0, "there are no others"
    assert stop.summary().endswith("The weights are those after epoch 3, the first that were looked at; no validation was good.")


def test_one_instruction_on_two_pictures_is_two_tasks():
    stop = stop_of(prompts=[Prompt("x", inputs={"strength": 0.1}), Prompt("x", inputs={"strength": 0.9})], early_stop_diversity=0.5)
    images = [torch.zeros(3, 2, 2), torch.ones(3, 2, 2)] * 2
    stop.look(0, Evaluation(["x"] * 4, [0, 1, 2, 3], images, {"reward": torch.zeros(4)}))
    assert stop.variety == 0.0, "the samples of each are equal"


def test_diversity_needs_two_images_of_a_prompt():
    with pytest.raises(ValueError, match="gives 'b' only one. Raise it to 4"):
        stop_of(number=3, early_stop_diversity=0.5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--early_stop_metric", "eval_reward"], "needs --eval_reward"),
        (["--early_stop_hacking", "3"], "--early_stop_hacking has no effect without --eval_reward"),
        (["--early_stop_metric", "reward", "--early_stop_patience", "0"], "--early_stop_patience must be a whole number from 1 to 1e9, got 0"),
        (["--early_stop_diversity", "1.5"], "--early_stop_diversity must be a number above 0 and below 1, got 1.5"),
    ],
)
def test_flags_that_make_no_sense(flags, message, tmp_path, capsys):
    required = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "clip_score", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        load_script("ddpo").parse_args([*required, *flags])
    assert message in capsys.readouterr().err


# --- in a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(EarlyStop, "_value", lambda self, evaluation: PLAN[self.seen])


@pytest.fixture(scope="module")
def stopped(task):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyStop, "_value", lambda self, evaluation: PLAN[self.seen])
        return run_script("draft", task / "run", task, **WATCHED)


def test_a_run_stops_and_leaves_its_best_weights(stopped, task, tmp_path):
    assert [row["epoch"] for row in rows(stopped)] == [0, 1] and (stopped / "checkpoint-2").is_dir()
    assert "Stopped after epoch 2: reward has not risen above 3 for 1 validations. The weights are those after epoch 1" in (stopped / "README.md").read_text()
    one = run_script("draft", tmp_path / "one", task, **{**FLAGS, "num_epochs": 1}, use_ema=True, ema_interval=1)
    assert_same_lora(stopped, one)  # the average of a run of one epoch
    with pytest.raises(AssertionError):
        assert_same_lora(stopped, stopped / "checkpoint-2")


@pytest.mark.usefixtures("planned")
def test_resumed_equals_uninterrupted(stopped, task, tmp_path):
    run_script("draft", tmp_path / "run", task, **{**WATCHED, "num_epochs": 1})
    run_script("draft", tmp_path / "run", task, **WATCHED, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "run", stopped, "checkpoint-2")
    # Stopped is stopped, until there is more patience.
    run_script("draft", tmp_path / "run", task, **{**WATCHED, "early_stop_patience": 2}, resume_from_checkpoint="latest")
    assert len(rows(tmp_path / "run")) == 3 and "after epoch 3, the best" in (tmp_path / "run" / "README.md").read_text()


def test_the_end_is_looked_at_even_between_validations(task, tmp_path):
    flags = {**FLAGS, "num_epochs": 1, "validation_epochs": 5, "num_eval_samples": 6, "early_stop_diversity": 0.01}
    out = run_script("draft", tmp_path / "run", task, **flags)
    assert "after epoch 1, the best" in (out / "README.md").read_text()
    assert_same_lora(out, out / "checkpoint-1")


@pytest.mark.long
def test_processes_stop_together(task, tmp_path):
    flags = {**FLAGS, "train_batch_size": 1, "num_epochs": 6, "num_eval_samples": 6, "learning_rate": 0.1, "early_stop_diversity": 0.9}
    flags |= {"gradient_accumulation_steps": 2}
    run_script_on_two_processes("draft", task / "two", task, **flags)
    one = run_script("draft", tmp_path / "one", task, **{**flags, "reward": f"{task / 'rewards.py'}:recorded"})
    assert len(rows(task / "two")) == len(rows(one)) < 6 and "diversity fell" in (task / "two" / "README.md").read_text()
