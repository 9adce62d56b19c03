"""Checkpoints: data and never code, found damaged before they are read, and one run at a time in a folder."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from script_tools import make_run
from small_run import SIZES, resumed, train, weights
from states import same

from diffusers_align.rl.advantages import PromptStatistics
from diffusers_align.training.checkpoints import checkpoints
from diffusers_align.training.checkpoints.state_files import read_state
from diffusers_align.training.run import failures


def test_an_average_that_would_never_begin_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--ema_interval 11 optimizer steps, and the run makes 10: the average would never begin"):
        train(tmp_path, use_ema=True, ema_interval=11)


def test_an_average_stands_in_from_its_first_update_on(tmp_path):
    """Whatever --ema_interval a resumed run has, or whether it has an average at all before."""
    train(tmp_path / "run", 4, use_ema=True, ema_interval=2)
    run = resumed(tmp_path / "run", use_ema=True, ema_interval=8)
    average, live = run.ema.shadow_params[0].clone(), weights(run)
    with run.averaged():
        assert torch.equal(weights(run), average) and not torch.equal(average, live)

    train(tmp_path / "none", 4)
    run = train(tmp_path / "none", 1, resume_from_checkpoint="latest", allow_changes=True, use_ema=True, ema_interval=3)
    live, before = weights(run), run.ema.shadow_params[0]
    with run.averaged():
        assert torch.equal(weights(run), live) and not torch.equal(before, live), "the average is the checkpoint's weights as yet"


# --- data, not code --------------------------------------------------------------------------------------------------------


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_planted_pickle_is_not_executed(tmp_path):
    run = train(tmp_path / "run", 2, use_ema=True)
    written = [path for path in (tmp_path / "run" / "checkpoint-2").rglob("*") if path.name != "weights.of.users"]
    assert {path.suffix for path in written} == {".json", ".safetensors"}
    names = ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "scaler.pt", "weights.pkl", "run.pkl"]
    for name in names:
        (tmp_path / "run" / "checkpoint-2" / name).write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    assert torch.equal(weights(resumed(tmp_path / "run", use_ema=True)), weights(run))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["optimizer.json", "optimizer.safetensors", "random_states.json", "manifest.json"])
def test_a_pickle_in_the_place_of_a_file_is_not_executed(tmp_path, name):
    train(tmp_path / "run", 2)
    path = tmp_path / "run" / "checkpoint-2" / name
    path.write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    assert resumed(tmp_path / "run").epoch == 1, "the one before is taken"
    assert not (tmp_path / "executed").exists()


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", 4, use_ema=True, ema_interval=1, lr_scheduler="cosine")
    train(tmp_path / "parts", 2, use_ema=True, ema_interval=1, lr_scheduler="cosine")
    parts = train(tmp_path / "parts", 2, use_ema=True, ema_interval=1, lr_scheduler="cosine", resume_from_checkpoint="latest")
    assert torch.equal(weights(parts), weights(whole)) and parts.history == whole.history
    for name in parts.registered:
        assert same(*(read_state(tmp_path / where / "checkpoint-4", name) for where in ("parts", "whole"))), name


def test_random_generators_go_on_where_they_were(tmp_path):
    import random

    import numpy as np

    run = train(tmp_path / "run", 1)
    expected = [random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    run.args.resume_from_checkpoint = "latest"
    run.resume()
    assert [random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()] == expected


# --- damage ----------------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def empty(path):
    shutil.rmtree(path.parent)
    path.parent.mkdir()


DAMAGES = [
    ("optimizer.safetensors", truncate, "optimizer.safetensors has .* bytes, of"),
    ("weights.safetensors", os.remove, "weights.safetensors is missing"),
    ("run.json", os.remove, "run.json is missing"),
    ("costs.json", truncate, "costs.json has .* bytes, of"),
    ("optimizer.safetensors", flip, "the content of optimizer.safetensors has changed"),
    ("manifest.json", os.remove, "manifest.json is missing"),
    ("manifest.json", truncate, "manifest.json cannot be read"),
    ("optimizer.json", empty, "the folder is empty"),
]


@pytest.mark.parametrize("name, damage, message", DAMAGES)
def test_latest_names_the_damaged_file_and_takes_the_last_complete_one(tmp_path, capsys, name, damage, message):
    train(tmp_path / "run", 3)
    before = weights(train(tmp_path / "other", 2))
    damage(tmp_path / "run" / "checkpoint-3" / name)
    run = resumed(tmp_path / "run")
    assert run.epoch == 2 and torch.equal(weights(run), before)
    printed = capsys.readouterr().out
    assert re.search(f"checkpoint-3 is damaged: {message}.*Using checkpoint-2, the last complete one, in its stead", printed)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1", "checkpoint-2"] and (tmp_path / "run" / ".previous-checkpoint-3").is_dir()


@pytest.mark.parametrize("name, damage, message", DAMAGES)
def test_a_damaged_checkpoint_that_was_named_is_an_error(tmp_path, name, damage, message):
    train(tmp_path / "run", 3)
    damage(tmp_path / "run" / "checkpoint-3" / name)
    for wanted in ("checkpoint-3", str(tmp_path / "run" / "checkpoint-3")):
        with pytest.raises(OSError, match=f"checkpoint-3 cannot be resumed from: {message}.*The last complete one is .*checkpoint-2: name it"):
            train(tmp_path / "run", resume_from_checkpoint=wanted)


def test_no_complete_checkpoint_is_an_error_that_names_each(tmp_path):
    train(tmp_path / "run", 2)
    for number in (1, 2):
        os.remove(tmp_path / "run" / f"checkpoint-{number}" / "run.json")
    with pytest.raises(OSError, match="checkpoint-2 is damaged: run.json is missing; checkpoint-1 is damaged: run.json is missing. Leave out --resume"):
        resumed(tmp_path / "run")


def test_the_folder_of_a_run_is_no_checkpoint(tmp_path):
    train(tmp_path / "run", 2)
    with pytest.raises(OSError, match="manifest.json is missing. The last complete one is .*checkpoint-2"):
        train(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run"))


def test_an_error_that_is_none_of_the_disk_stays_what_it_is(tmp_path):
    run = train(tmp_path / "run", 1)
    run.epoch = 2
    errors = (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError("NCCL communicator was aborted"), failures.Interrupted(130))
    for error in errors:

        def save(folder, error=error):
            raise error

        run.save_weights = save
        with pytest.raises(type(error), match=r"^(CUDA|NCCL|130)"):
            run.checkpoint()
        assert [path.name for path in run.output_dir.glob("*checkpoint-*")] == ["checkpoint-1"]


def test_an_object_that_the_checkpoint_does_not_hold_is_named(tmp_path):
    train(tmp_path / "run", 1)
    run = make_run(tmp_path / "run", **SIZES, resume_from_checkpoint="latest")
    run.train_parameters([torch.nn.Parameter(torch.zeros(3))], lambda folder: None)
    run.load_optimizer(10)
    run.register("prompt_statistics", PromptStatistics())
    with pytest.raises(ValueError, match="checkpoint-1 holds no prompt statistics, which this run needs"):
        run.resume()


def test_weights_of_another_shape_are_named(tmp_path):
    train(tmp_path / "run", 1)
    with pytest.raises(ValueError, match="other shapes: resume with the model, --rank and --lora_layers"):
        resumed(tmp_path / "run", size=4)


# --- a folder with the results of an earlier run -------------------------------------------------------------------------------


def test_a_new_run_sets_the_earlier_one_aside_and_says_so(tmp_path, capsys):
    folder = tmp_path / "run"
    train(folder, 2).end()
    for name in ("README.md", "pytorch_lora_weights.safetensors", "notes.txt"):
        (folder / name).write_text("first")
    for place in ("transformer_2/pytorch_lora_weights.safetensors", "value/config.json", "vector_field/config.json", "widget/4.png"):
        (folder / place).parent.mkdir()
        (folder / place).write_text("first")
    metrics = (folder / "metrics.jsonl").read_text()
    train(folder, 1).end()
    assert "holds an earlier run: checkpoint-1, checkpoint-2, README.md, costs.json" in capsys.readouterr().out
    assert (folder / ".previous-metrics.jsonl").read_text() == metrics and (folder / ".previous-checkpoint-2").is_dir()
    assert (folder / ".previous-README.md").read_text() == "first" and (folder / ".previous-transformer_2").is_dir()
    assert all((folder / f".previous-{place}").read_text() == "first" for place in ("value/config.json", "vector_field/config.json", "widget/4.png"))
    assert (folder / "notes.txt").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) == 1

    train(folder).end()
    assert "those that were set aside before it are deleted" in capsys.readouterr().out
    aside = {path.name for path in folder.glob(".previous-*")}
    assert {".previous-checkpoint-1", ".previous-metrics.jsonl"} <= aside and ".previous-checkpoint-2" not in aside


def test_checkpoints_that_are_trained_again_are_set_aside_and_said(tmp_path, capsys):
    train(tmp_path / "run", 3)
    run = train(tmp_path / "run", resume_from_checkpoint="checkpoint-1")
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1"] and (tmp_path / "run" / ".previous-checkpoint-3").is_dir()
    assert "epochs that are now trained again: checkpoint-2, checkpoint-3 renamed to .previous-*." in capsys.readouterr().out


def test_the_logs_of_an_earlier_run_are_not_continued(tmp_path, capsys):
    flags = {"report_to": "tensorboard", "run_name": "x"}
    for expected in (1, 1):
        train(tmp_path / "run", **flags).end()
        assert len(list((tmp_path / "run" / "logs" / "x").glob("events*"))) == expected
    logs, aside = (tmp_path / "run" / name / "x" for name in ("logs", ".previous-logs"))
    assert f"{logs} is of an earlier run: renamed to {aside}." in capsys.readouterr().out and aside.is_dir()


def test_a_run_that_goes_on_from_another_folder_sets_aside_what_is_in_its_own(tmp_path, capsys):
    train(tmp_path / "a", 2).end()
    train(tmp_path / "b", 3).end()
    before = (tmp_path / "b" / "metrics.jsonl").read_text()
    run = train(tmp_path / "b", 1, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert run.epoch == 3 and [path.name for path in run.checkpoints()] == ["checkpoint-3"], "those of the other run are not taken for its own"
    assert (tmp_path / "b" / ".previous-metrics.jsonl").read_text() == before and (tmp_path / "b" / ".previous-checkpoint-1").is_dir()
    assert "holds an earlier run: checkpoint-1, checkpoint-2, checkpoint-3, costs.json, metrics.jsonl are renamed" in capsys.readouterr().out
    assert (tmp_path / "a" / "checkpoint-2").is_dir()


def test_runs_in_folders_of_their_own_are_not_touched_by_one_in_the_folder_above(tmp_path):
    for name in ("a", "transformer_trials"):
        train(tmp_path / name, 1).end()
        (tmp_path / name / "pytorch_lora_weights.safetensors").write_text(name)
    (tmp_path / "logs" / "others").mkdir(parents=True)
    for _ in range(3):
        train(tmp_path, 1, report_to="tensorboard", run_name="x").end()
    for name in ("a", "transformer_trials"):
        assert (tmp_path / name / "pytorch_lora_weights.safetensors").read_text() == name and (tmp_path / name / "checkpoint-1").is_dir()
    assert (tmp_path / "logs" / "others").is_dir() and (tmp_path / ".previous-logs" / "x").is_dir()


@pytest.mark.parametrize("name", ["README.md", "model_index.json", "samples/1.png", "checkpoint-500/optimizer.bin"])
def test_what_is_of_no_run_is_not_overwritten(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OSError, match=f"holds {name.partition('/')[0]}, and neither metrics.jsonl nor a checkpoint of a run.*Choose another folder"):
        train(tmp_path, 1)
    assert (tmp_path / name).read_text() == "mine"


def test_a_checkpoint_that_was_moved_to_another_disk_is_pruned(tmp_path):
    folder = tmp_path / "run"
    train(folder, 1).end()
    (folder / "checkpoint-1").rename(tmp_path / "moved")
    (folder / "checkpoint-1").symlink_to(tmp_path / "moved")
    train(folder, 1, resume_from_checkpoint="latest", checkpoints_total_limit=1).end()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"] and (tmp_path / "moved").is_dir()


def test_trackers_get_the_current_folders_name_and_no_password(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    train(".", report_to="tensorboard", eval_reward="http://me:hidden@host:80?token=hidden").end()
    assert list((tmp_path / "mine" / "logs" / "mine").glob("events*"))
    (flags,) = (tmp_path / "mine" / "logs").rglob("hparams.yml")
    assert "eval_reward: http://***@host:80?token=***" in flags.read_text() and "hidden" not in flags.read_text()


def test_a_run_that_was_set_aside_can_be_resumed(tmp_path, capsys):
    folder = tmp_path / "run"
    expected = weights(train(folder, 2))
    train(folder)
    resumed(folder)
    assert "To go on with the run that was set aside, name its checkpoint: .previous-checkpoint-1, .previous-checkpoint-2." in capsys.readouterr().out
    run = train(folder, resume_from_checkpoint=".previous-checkpoint-2")
    assert run.epoch == 2 and torch.equal(weights(run), expected)


def test_a_full_disk_names_what_was_set_aside(tmp_path, monkeypatch):
    run = train(tmp_path / "run", 1)
    (tmp_path / "run" / ".previous-checkpoint-9").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (lambda **kw: type("Disk", (), kw))(free=0))
    with pytest.raises(OSError, match="Of an earlier run there is still .previous-checkpoint-9, which may be deleted"):
        failures.check_free_space(run)


def test_metrics_that_cannot_be_written_say_how_to_resume(tmp_path, monkeypatch):
    run = train(tmp_path / "run", 2)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_align.training.run.run.write_history", full)
    with pytest.raises(OSError, match="could not be written in epoch 2: .*No space left.*checkpoint-2 is complete .2 of 10 epochs.*--resume_from_checkpoint"):
        run.log({"reward": 1.0})


def test_manifest_lists_every_file(tmp_path):
    train(tmp_path / "run", 1)
    folder = tmp_path / "run" / "checkpoint-1"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) == {path.name for path in folder.iterdir()} - {"manifest.json"} and checkpoints.fault(folder) is None


def test_nothing_is_kept_but_by_the_run():
    """accelerate's own checkpoints are pickles."""
    root = Path(__file__).parents[3]
    sources = [*(root / "diffusers_align").rglob("*.py"), *(root / "training_scripts").glob("*.py")]
    assert len(sources) > 100
    unpickling = re.compile(r"register_for_checkpointing|accelerator\.(save|load)_state|import pickle|torch\.load\((?!.*weights_only=True)")
    assert [path.name for path in sources if unpickling.search(path.read_text())] == []


@pytest.mark.parametrize("field, value", [("flags", None), ("contents", []), ("commands", [])])
def test_a_manifest_that_does_not_say_how_it_was_made_is_a_fault(tmp_path, field, value):
    train(tmp_path, 1)
    file = tmp_path / "checkpoint-1" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    assert checkpoints.fault(tmp_path / "checkpoint-1") == "manifest.json does not say how it was made"


def test_a_file_of_a_checkpoints_name_is_none(tmp_path):
    train(tmp_path, 1)
    (tmp_path / "checkpoint-2").write_text("x")
    assert [path.name for path in checkpoints.found(tmp_path)] == ["checkpoint-1"]
