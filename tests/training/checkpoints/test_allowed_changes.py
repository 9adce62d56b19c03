"""A resumed run and its checkpoint's flags: what is refused, what takes effect, what is free."""

import json
import sys
import threading
from typing import get_args

import pytest
import torch
from reward_servers import no_proxy  # noqa: F401
from script_tools import AnyArguments, Run
from small_run import resumed, train, weights

from diffusers_align.rewards import contents, remote
from diffusers_align.rewards.server import RewardServer
from diffusers_align.training.checkpoints import allowed_changes
from diffusers_align.training.flags.options import Resume, option

# --- hyper-parameters take effect ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, of_group",
    [
        ({"learning_rate": 0.01}, {"lr": 0.01}),
        ({"adam_weight_decay": 0.5}, {"weight_decay": 0.5}),
        ({"adam_beta1": 0.0}, {"betas": (0.0, 0.999)}),
        ({"adam_beta2": 0.5}, {"betas": (0.9, 0.5)}),
        ({"adam_epsilon": 0.1}, {"eps": 0.1}),
        ({"lr_scheduler": "linear"}, {"lr": 3e-4 * 0.8}),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 8}, {"lr": 3e-4 / 4}),
    ],
)
def test_a_changed_hyper_parameter_takes_effect_and_is_said(tmp_path, capsys, flags, of_group):
    train(tmp_path / "run", 2)
    run = resumed(tmp_path / "run", **flags)
    (group,) = run.optimizer.param_groups
    assert all(group[name] == pytest.approx(value) for name, value in of_group.items())
    printed = capsys.readouterr().out
    assert "Takes effect from here on: " in printed and all(f"--{name} was " in printed for name in flags)
    same = train(tmp_path / "run", 1, resume_from_checkpoint="checkpoint-2")
    other = train(tmp_path / "run", 1, resume_from_checkpoint="checkpoint-2", **flags)
    assert not torch.equal(weights(other), weights(same)) and other.optimizer_steps == 3


def test_the_rate_after_a_resume_is_that_of_a_run_with_these_flags(tmp_path):
    """The schedule's next step too: the checkpoint's last rate was that of the old schedule."""
    train(tmp_path / "run", 3)
    rates = []
    for number in (1, 2):
        run = train(tmp_path / "run", number, resume_from_checkpoint="checkpoint-3", lr_scheduler="linear", learning_rate=0.1)
        rates += [run.lr_scheduler.get_last_lr()[0]]
    assert rates == pytest.approx([0.1 * 0.6, 0.1 * 0.5]) and run.history[-1]["epoch"] == 5


def test_a_changed_decay_of_the_average_takes_effect(tmp_path):
    train(tmp_path / "run", 2, use_ema=True, ema_interval=1, ema_decay=0.9)
    run = resumed(tmp_path / "run", use_ema=True, ema_interval=1, ema_decay=0.5)
    assert run.ema.decay == 0.5 and run.ema.optimization_step == 2


def test_an_average_that_is_added_starts_where_the_weights_are(tmp_path, capsys):
    train(tmp_path / "run", 2)
    with pytest.raises(ValueError, match="--use_ema was false, now true"):
        resumed(tmp_path / "run", use_ema=True)
    run = resumed(tmp_path / "run", use_ema=True, allow_changes=True)
    assert torch.equal(run.ema.shadow_params[0], weights(run)) and "holds no moving average: it starts from here" in capsys.readouterr().out


# --- refused -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new",
    [
        ({"reward": "jpeg_compressibility"}, {"reward": "jpeg_incompressibility"}),
        ({"prompts": "mini_train"}, {"prompts": "mini_test"}),
        ({"seed": 42}, {"seed": 1}),
        ({"pretrained_model_name_or_path": "mini-sd"}, {"pretrained_model_name_or_path": "mini-sd3"}),
        ({"group_size": 2}, {"group_size": 4}),
        ({"num_inference_steps": 10}, {"num_inference_steps": 12}),
        ({"guidance_scale": None}, {"guidance_scale": 1.0}),
        ({"rank": 32}, {"rank": 4}),
        ({"lora_layers": None}, {"lora_layers": "to_q"}),
        ({"mixed_precision": "no"}, {"mixed_precision": "bf16"}),
        ({"a_flag_of_tomorrow": 1}, {"a_flag_of_tomorrow": 2}),
    ],
)
def test_what_is_learned_may_not_change(tmp_path, capsys, monkeypatch, old, new):
    ((name, was), (_, now)) = next(iter(old.items())), next(iter(new.items()))
    before, after = ({"algorithm": "A", "flags": flags, "contents": {}, "samples_a_step": 4, "processes": 1, "commands": []} for flags in (old, new))
    with pytest.raises(ValueError, match=f"(?s)checkpoint-2 was made with other flags.*--{name} was {was or 'null'}, now {now}.*--allow_changes"):
        allowed_changes.compare(before, after, False, "checkpoint-2", AnyArguments)
    assert allowed_changes.compare(before, after, True, "checkpoint-2", AnyArguments) == [
        f"Changed from here on (--allow_changes): --{name} was {was or 'null'}, now {now}."
    ]
    assert allowed_changes.compare(before, before, False, "checkpoint-2", AnyArguments) == []


def test_a_refused_run_leaves_the_folder_as_it_was(tmp_path):
    train(tmp_path / "run", 2).end()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="--seed was 42, now 7"):
        resumed(tmp_path / "run", seed=7)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_the_algorithm_never_changes(tmp_path):
    train(tmp_path / "run", 1)
    manifest = tmp_path / "run" / "checkpoint-1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"algorithm": "Test"', '"algorithm": "Flow-GRPO"'))
    with pytest.raises(ValueError, match="checkpoint-1 is of a run of Flow-GRPO, and this is Test: resume it with the script that made it"):
        resumed(tmp_path / "run", allow_changes=True)


def test_more_epochs_may_be_asked_for_and_fewer_than_are_done_not(tmp_path):
    train(tmp_path / "run", 3)
    assert resumed(tmp_path / "run", num_epochs=20).epoch == 3
    with pytest.raises(
        ValueError, match=r"checkpoint-3 has been trained for 3 epochs, and --num_epochs is 2: raise it, or name an earlier one .checkpoint-1, checkpoint-2"
    ):
        resumed(tmp_path / "run", num_epochs=2)


def test_the_batch_counts_by_the_samples_of_an_optimizer_step(tmp_path, monkeypatch, capsys):
    def run_of(batch, accumulation, **flags):
        monkeypatch.setattr("script_tools.Run.load_optimizer", lambda run, steps, load=load: (run.batches(8), load(run, steps)))
        return train(tmp_path / "run", train_batch_size=batch, gradient_accumulation_steps=accumulation, **flags)

    load = Run.load_optimizer
    run = run_of(2, 2)
    run.epoch = 1
    run.checkpoint()
    assert run_of(4, 1, resume_from_checkpoint="latest").epoch == 1
    assert "Changed without effect on what is learned: --gradient_accumulation_steps was 2, now 1; --train_batch_size was 2, now 4." in capsys.readouterr().out
    with pytest.raises(ValueError, match="samples of an optimizer step were 4, now 8 .--train_batch_size"):
        run_of(4, 2, resume_from_checkpoint="latest")


# --- the content of files ------------------------------------------------------------------------------------------------------


def test_an_edited_file_is_a_change_and_a_moved_one_is_none(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    train(tmp_path / "run", 1, prompts=str(prompts))
    prompts.rename(tmp_path / "moved.txt")
    assert resumed(tmp_path / "run", prompts=str(tmp_path / "moved.txt")).epoch == 1
    prompts.write_text("a dog\n")
    with pytest.raises(ValueError, match="--prompts: the content of .*prompts.txt is another one"):
        resumed(tmp_path / "run", prompts=str(prompts))


def test_the_code_of_a_reward_and_its_weights_count(tmp_path):
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b.py").write_text("one")
    spec = "{}:f*1.0+clip_score*{}"
    found = [contents.content(spec.format(tmp_path / name, weight)) for name, weight in (("a.py", 2), ("b.py", 2), ("a.py", 3))]
    assert found[0] == found[1] != found[2]
    (tmp_path / "a.py").write_text("two")
    assert contents.content(spec.format(tmp_path / "a.py", 2)) != found[0]
    assert contents.content(f"{tmp_path / 'a.py'}:f") != contents.content(f"{tmp_path / 'a.py'}:g")
    assert contents.content("clip_score*1+scene_score") is None and contents.content("http://host:1") is None and contents.content("x" * 5000) is None


def test_other_weights_of_the_same_size_are_another_model(tmp_path, monkeypatch):
    (tmp_path / "unet").mkdir()
    file = tmp_path / "unet" / "model.safetensors"
    monkeypatch.setattr(contents, "READ_BYTES", 1000)
    for named in (tmp_path, file):  # the folder, and a large file
        file.write_bytes(bytes(1_000_000))
        before = contents.content(str(named))
        assert contents.content(str(named)) == before
        file.write_bytes(bytes(500_000) + b"\x01" * 500_000)
        assert contents.content(str(named)) != before, named


def test_a_reward_of_a_module_is_known_by_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "of_mine").mkdir()
    (tmp_path / "of_mine" / "__init__.py").write_text("")
    file = tmp_path / "of_mine" / "taste.py"
    file.write_text("def f(images, prompts, **columns): return images.mean((1, 2, 3))")
    first = contents.content("of_mine.taste:f")
    assert first == contents.content("of_mine.taste:f") is not None
    assert contents.content("of_mine.taste:g") != first != contents.content("of_mine.taste:f*2")
    file.write_text("def f(images, prompts, **columns): return -images.mean((1, 2, 3))")
    assert contents.content("of_mine.taste:f") != first, "the sign is another one"
    (tmp_path / "of_mine" / "__init__.py").write_text("def f(): return +1")
    whole = contents.content("of_mine:f")
    (tmp_path / "of_mine" / "__init__.py").write_text("def f(): return -1")
    assert contents.content("of_mine:f") != whole, "a package is what it says, not a folder of so many bytes"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert contents.content("jpeg_compressibility*1+~/of_mine/taste.py:f") is not None
    assert contents.content("of_mine.none:f") is None and contents.content("no_such_module:f") is None


@pytest.mark.usefixtures("no_proxy")
def test_a_reward_on_a_server_is_known_by_what_is_served(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SERVED", {})
    found = []
    for text in ("images.mean((1, 2, 3))", "images.mean((1, 2, 3))", "-images.mean((1, 2, 3))"):
        (tmp_path / "taste.py").write_text(f"def f(images, prompts, **columns): return {text}")
        with RewardServer(None, content=contents.content(f"{tmp_path / 'taste.py'}:f")) as server:
            server.reward = lambda images, prompts: images.mean((1, 2, 3))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            remote.RemoteReward(server.url)
            found.append(contents.content(server.url) and remote.SERVED[server.url])
            server.shutdown()
    assert found[0] is not None and found[0] == found[1] != found[2]


def test_a_folder_counts_by_its_lists_and_sizes(tmp_path, monkeypatch):
    (tmp_path / "metadata.jsonl").write_text("{}")
    (tmp_path / "image.png").write_bytes(b"abc")
    first = contents.content(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text("[]")
    second = contents.content(str(tmp_path))
    (tmp_path / "image.png").write_bytes(b"abcd")
    third = contents.content(str(tmp_path))
    assert len({first, second, third}) == 3
    monkeypatch.setattr(contents, "MAX_FILES", 1)
    many = contents.content(str(tmp_path))
    (tmp_path / "image.png").write_bytes(b"abcde")
    assert contents.content(str(tmp_path)) == many, "of very many files the lists alone"


def test_no_secret_is_kept(tmp_path):
    run = train(
        tmp_path / "run", hub_token="hf_hunter2", reward="http://user:hunter2@host:1/score?api_key=hunter2&x=1", command="train --reward http://u:hunter2@h"
    )
    run.epoch = 1
    run.checkpoint()
    manifest = (tmp_path / "run" / "checkpoint-1" / "manifest.json").read_text()
    assert "hunter2" not in manifest and json.loads(manifest)["flags"]["reward"] == "http://***@host:1/score?api_key=***&x=1"


# --- what really ran -------------------------------------------------------------------------------------------------------------


def test_the_commands_that_made_a_run(tmp_path):
    train(tmp_path / "run", 2, command="first")
    train(tmp_path / "run", 2, command="second", resume_from_checkpoint="latest")
    run = resumed(tmp_path / "run", command="third")
    assert allowed_changes.commands(run) == "first\n\n# resumed after epoch 2\nsecond\n\n# resumed after epoch 4\nthird"
    again = train(tmp_path / "run", resume_from_checkpoint="checkpoint-2", command="fourth")
    assert allowed_changes.commands(again) == "first\n\n# resumed after epoch 2\nfourth", "nothing is left of the others"


# --- what the fields say ---------------------------------------------------------------------------------------------------------


def test_flags_of_a_checkpoint_under_their_old_names_are_compared_under_the_new(tmp_path):
    class Renamed(AnyArguments, was={"seed": "noise_seed", "prompts": "prompt_file"}):
        """A script whose flags have new names."""

    kept = {"algorithm": "A", "samples_a_step": 4, "processes": 1, "commands": []}
    before = {**kept, "flags": {"noise_seed": 1, "prompt_file": "p"}, "contents": {"prompt_file": "hash"}}
    now = {**kept, "flags": {"seed": 1, "prompts": "p"}, "contents": {"prompts": "hash"}}
    assert allowed_changes.compare(before, now, False, "checkpoint-2", Renamed) == []
    for change, said in (({"flags": {"seed": 2, "prompts": "p"}}, "--seed was 1, now 2"), ({"contents": {"prompts": "other"}}, "--prompts: the content of p")):
        with pytest.raises(ValueError, match=said):
            allowed_changes.compare(before, {**now, **change}, False, "checkpoint-2", Renamed)


def test_a_flag_that_says_nothing_is_refused_when_it_changes():
    class New(AnyArguments):
        """A script with a new flag."""

        quiet: int = option(0, "of tomorrow")

    assert allowed_changes.meanings(New)["quiet"] == "learned"
    assert set(allowed_changes.meanings(New).values()) == set(get_args(Resume)), "each meaning has flags"


@pytest.mark.parametrize("metric", [None, "reward"])
def test_what_is_measured_is_free_unless_an_early_stop_looks_at_it(metric):
    before, now = (
        {"algorithm": "A", "flags": {"early_stop_metric": metric, "num_eval_samples": n}, "contents": {}, "samples_a_step": 4, "processes": 1, "commands": []}
        for n in (4, 8)
    )
    if metric:
        with pytest.raises(ValueError, match="--num_eval_samples was 4, now 8"):
            allowed_changes.compare(before, now, False, "checkpoint-2", AnyArguments)
    else:
        assert allowed_changes.compare(before, now, False, "checkpoint-2", AnyArguments) == [
            "Changed without effect on what is learned: --num_eval_samples was 4, now 8."
        ]
