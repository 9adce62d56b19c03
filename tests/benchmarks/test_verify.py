"""`make verify`: what counts as the same, what a pass keeps, and what it writes."""

import json
import sys
from pathlib import Path

import pytest
from script_tools import load_script, script

from benchmarks.one_thread import Failed, named
from benchmarks.verify import __main__ as verify
from benchmarks.verify import comparison, running
from diffusers_align.files import levels

RECIPE = "draft_mini_sd3"
ROWS = [{"epoch": i, "reward": 0.1 * i, "grad_norm": 2.0 + 0.01 * i} for i in range(6)]


def changed(share, name="reward"):
    """The rows with a metric moved by this share of its spread over the run."""
    spread = max(row[name] for row in ROWS) - min(row[name] for row in ROWS)
    return [{**row, name: row[name] + share * spread} for row in ROWS]


# comparison


def test_equal_runs_differ_in_nothing():
    assert comparison.compare(comparison.columns(ROWS), comparison.columns([dict(row) for row in ROWS])) == []
    missing = [{**row, "kl": float("nan")} for row in ROWS]
    assert comparison.compare(comparison.columns(missing), comparison.columns(missing)) == [], "NaN is NaN again"


@pytest.mark.parametrize(("share", "inside"), [(1e-9, True), (0.24, True), (0.26, False)])
def test_the_band_is_a_share_of_what_a_metric_spans(share, inside):
    (difference,) = comparison.compare(comparison.columns(ROWS), comparison.columns(changed(share)))
    assert difference.metric == "reward" and (difference.share <= 1) is inside
    assert difference.share == pytest.approx(share / comparison.BAND)
    assert "from epoch 0 on: 0 is committed" in difference.what


def test_a_metric_that_hardly_moves_has_the_band_of_its_size():
    (difference,) = comparison.compare(comparison.columns(ROWS), comparison.columns([{**row, "grad_norm": row["grad_norm"] * 1.01} for row in ROWS]))
    assert difference.share == pytest.approx(0.5, rel=0.02)


def test_a_third_of_the_epochs_is_enough_to_leave_the_band():
    late = [{**row, "reward": row["reward"] + (0.2 if row["epoch"] >= 4 else 0)} for row in ROWS]
    (difference,) = comparison.compare(comparison.columns(ROWS), comparison.columns(late))
    assert difference.share > 1 and "from epoch 4 on" in difference.what and "part 3 of 3" in difference.what


def test_what_cannot_be_compared_is_outside_the_band():
    other = [{"epoch": row["epoch"], "reward": row["reward"], "kl": 0.0} for row in ROWS]
    told = {d.metric: d for d in comparison.compare(comparison.columns(ROWS), comparison.columns(other))}
    assert "no longer logged" in told["grad_norm"].what and "does not have it" in told["kl"].what
    (short,) = comparison.compare({"reward": [0.0, 1.0]}, {"reward": [0.0]})
    (gone,) = comparison.compare({"reward": [0.0, 1.0]}, {"reward": [0.0, None]})
    assert {d.share for d in (*told.values(), short, gone)} == {float("inf")}
    assert "has 1 epochs" in short.what and "no number" in gone.what


# the command


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """`bench(rows, *words)` runs the command with a training that logs these rows; returns what was printed and the status."""
    monkeypatch.setattr(verify, "curve_file", lambda name: tmp_path / "curves" / f"{name}.json")
    monkeypatch.setattr(levels, "curve_file", lambda name: tmp_path / "curves" / f"{name}.json")
    bench_runs = []

    def bench(rows, *words):
        def run(recipe, place, say):
            bench_runs.append(recipe)
            if isinstance(rows, BaseException):
                raise rows
            return rows

        monkeypatch.setattr(verify, "run", run)
        with pytest.raises(SystemExit) as end:
            verify.main([*words, "--output_dir", str(tmp_path / "out")])
        captured = capsys.readouterr()
        return captured.out + captured.err, end.value.code

    bench.runs = bench_runs
    return bench


def test_recorded_then_reproduced_then_green_again(bench):
    told, status = bench(ROWS, RECIPE, "--record")
    assert status == 0 and "recorded" in told and "level: runs" in told
    told, status = bench(ROWS, RECIPE)
    assert status == 0 and "bit for bit" in told and "level: verified" in told and "commit it" in told
    told, status = bench(ROWS)
    assert status == 0 and "commit it" not in told and "Without a curve" in told
    assert len(bench.runs) == 3, "each pass trains"


def test_one_bit_fails_on_the_same_machine_and_the_band_holds_elsewhere(bench, monkeypatch):
    bench(ROWS, RECIPE, "--record")
    told, status = bench(changed(1e-12), RECIPE)
    assert "1 of 1 recipes did not pass" in status and "Recorded on this type of machine; within the band all the same" in told
    monkeypatch.setattr(verify, "machine_type", lambda: {"torch": "other"})
    told, status = bench(changed(0.1), RECIPE)
    assert status == 0 and "within the band (40% of it used)" in told and "level: verified" in told
    told, status = bench(changed(0.3), RECIPE)
    assert "did not pass" in status and "outside the band" in told and "reward from epoch 0 on" in told


def test_a_curve_of_other_settings_or_models_is_out_of_date(bench, tmp_path):
    told, status = bench(ROWS, RECIPE)
    assert "no curve" in told and "did not pass" in status
    bench(ROWS, RECIPE, "--record")
    file = tmp_path / "curves" / f"{RECIPE}.json"
    curve = json.loads(file.read_text())
    file.write_text(json.dumps({**curve, "inputs": {**curve["inputs"], "mini-sd3": "older weights"}}))
    told, status = bench(ROWS, RECIPE)
    assert "out of date" in told and "mini-sd3 changed since" in told and "did not pass" in status
    told, status = bench(changed(0.1), RECIPE, "--record")
    assert status == 0 and "reward from epoch 0 on" in told, "a new curve says what it changes"


def test_an_interrupted_pass_goes_on_and_is_not_taken_for_a_second_run(bench, monkeypatch):
    told, status = bench(KeyboardInterrupt(), RECIPE, "--record")
    assert status == 130 and "goes on from here" in told
    monkeypatch.setattr(verify, "end", lambda place: None)  # as if another recipe had been interrupted
    bench(ROWS, RECIPE, "--record")
    told, _ = bench(ROWS, RECIPE)
    assert "recorded" in told and "level: runs" in told, "the recorded run itself reproduces nothing"
    assert len(bench.runs) == 2, "the interrupted one and the next; then the outcome is known"
    monkeypatch.setattr(verify, "source_digest", lambda: "other code")
    told, _ = bench(ROWS, RECIPE)
    assert "begins anew" in told and "level: verified" in told


def test_a_run_that_fails_is_told_and_tried_again(bench):
    told, status = bench(Failed("train_draft.py ended with status 1"), RECIPE)
    assert "did not pass" in status and "ended with status 1" in told
    bench(ROWS, RECIPE, "--record")
    assert len(bench.runs) == 2


def test_names_that_are_no_mini_recipe_are_refused(bench):
    assert bench(ROWS, "ddpo_sd15")[1] == 2
    told, status = bench(ROWS)
    assert status == 2 and "no mini recipe has a curve yet" in told


# running


def test_data_commands_run_with_this_interpreter():
    (command,) = running.data_commands("dpo_mini_sd3")
    assert command[1] == str(script("any").parent / "make_preferences.py") and command[-2:] == ["--output_dir", "runs/likes_blue"]
    assert command[command.index("--call_kwargs") + 1] == '{"max_sequence_length": 1}'
    assert running.data_commands(RECIPE) == []
    (command,) = running.data_commands("flow_grpo_edit_mini_sd3")
    assert command[:3] == [sys.executable, "-m", "diffusers_align.embedded.edits"] and named(command) == "diffusers_align.embedded.edits"


def in_this_process(command, log, place, progress=None):
    """What `call` does in a process of its own, which takes seconds to import what is here."""
    load_script(Path(command[1]).stem.removeprefix("train_")).main(command[2:])


@pytest.mark.long
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_numbers(tmp_path, monkeypatch):
    small = ("--num_samples_per_epoch", "4", "--train_batch_size", "2", "--num_eval_samples", "4", "--num_validation_images", "2")
    flags = (*small, "--num_inference_steps", "2", "--eval_num_inference_steps", "2", "--truncation", "1", "--num_epochs", "2")
    told = []
    with monkeypatch.context() as here:
        here.setattr(running, "call", in_this_process)
        whole = running.run(RECIPE, tmp_path / "whole", told.append, flags)
        assert [row["epoch"] for row in whole] == [0, 1]
        running.run(RECIPE, tmp_path / "cut", told.append, (*flags, "--num_epochs", "1"))
    assert running.run(RECIPE, tmp_path / "cut", told.append, flags) == whole
    with pytest.raises(Failed, match="train_draft.py ended with status 2; its output is in .*log"):
        running.run(RECIPE, tmp_path / "refused", told.append, ("--nonsense",))
