"""The scripts on the embedded models: what a run leaves behind, that it resumes exactly, and what its errors say."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from fake_hub import FakeHub
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file
from script_runs import COMMON, LORA, ROOT, SCRIPTS, STATEFUL, arguments, assert_same_run, draw, rows, script, train
from script_runs import task as task  # noqa: F401 - a fixture

from diffusers_align import embedded
from diffusers_align.rewards.base import InvalidReward
from diffusers_align.training.report.model_card import public

torch.set_num_threads(1)
NAMES = tuple(SCRIPTS)


def uninterrupted(name, task):
    flags = {"num_epochs": 4, "validation_epochs": 2, "checkpoints_total_limit": 2, "eval_reward": f"{task / 'rewards.py'}:redness"}
    return STATEFUL[name] | flags


@pytest.fixture(scope="module")
def finished(tmp_path_factory, task):
    """Four epochs of a script, run once: finished("ddpo")."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = train(name, tmp_path_factory.mktemp(name) / "run", task, **uninterrupted(name, task))
        return folders[name]

    return get


# --- what a run leaves behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_metrics(finished, name):
    metrics = rows(finished(name))
    assert [row["epoch"] for row in metrics] == [0, 1, 2, 3]
    assert all(row["ratio_error"] == 0.0 for row in metrics), "the replay is the rollout, bit for bit"
    assert all(row["grad_norm"] > 0 and row["reward_se"] > 0 for row in metrics)
    rate = [row["lr"] for row in metrics]
    warming = [3e-3 * (2 * epoch + 0.5) / 6 for epoch in range(3)]  # two steps per epoch, the first of all at 0
    assert rate[:3] == pytest.approx(warming) and rate[3] == pytest.approx(3e-3 * (0.75 if name == "flow_grpo" else 1))
    if name == "flow_grpo":
        assert metrics[0]["kl"] < metrics[-1]["kl"] and metrics[0]["zero_std"] == 0.0


def check_sheet(sheet, rows):
    """Each validation image has a cell (before and after: two), and no cell is blank or another one's copy."""
    number = COMMON["num_validation_images"]
    cells = [sheet.crop(box) for box in json.loads(sheet.info["cells"])]
    assert len(cells) == rows * number and len(json.loads(sheet.info["captions"])) == number
    assert len({cell.tobytes() for cell in cells}) == len(cells) and all(len(cell.convert("L").getcolors()) > 3 for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_files(finished, name):
    folder = finished(name)
    for picture in ("reward_curve.png", "before_after.png", "samples/epoch-0002.png", "samples/epoch-0004.png"):
        with Image.open(folder / picture) as image:
            assert image.format == "PNG" and min(image.size) > 100 and len(image.convert("L").getcolors()) > 10
            if picture != "reward_curve.png":
                check_sheet(image, 2 if picture == "before_after.png" else 1)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert not list(folder.rglob(".*")), "nothing half-written is left"


@pytest.mark.parametrize("name", NAMES)
def test_model_card(finished, task, name):
    card = (finished(name) / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"
    assert "load_lora_weights(" in card and "![before after](before_after.png)" in card and "![reward curve](reward_curve.png)" in card
    for result in ("reward, before", "reward, after", "reward, paired gain", ":redness, paired gain"):
        assert f"{result} | " in card
    command = next(line for line in card.splitlines() if line.startswith("accelerate launch"))
    given = [public(word) for word in arguments(name, finished(name), task, **uninterrupted(name, task))]
    assert shlex.split(command)[3:] == given, "the command can be pasted into a shell"
    assert str(task) not in card and str(finished(name)) not in card and str(ROOT) not in card
    config = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert config["num_epochs"] == 4 and config["learning_rate"] == 3e-3 and config["seed"] == 42


def test_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = finished("flow_grpo")
    events = EventAccumulator(str(folder / "logs" / folder.name)).Reload()
    assert [event.value for event in events.Scalars("reward")] == pytest.approx([row["reward"] for row in rows(folder)])
    assert len(events.Images("samples")) == 2


@pytest.mark.parametrize("name, scale", [("flow_grpo", 2.0), ("ddpo", 1.0)])
def test_the_lora_loads_into_a_stock_pipeline(finished, name, scale):
    pipe = DiffusionPipeline.from_pretrained(embedded.path(SCRIPTS[name]["pretrained_model_name_or_path"]))
    before = draw(pipe, name)
    pipe.load_lora_weights(finished(name))
    layer = next(m for m in (pipe.transformer if name == "flow_grpo" else pipe.unet).modules() if isinstance(m, BaseTunerLayer))
    assert set(layer.scaling.values()) == {scale}, "the alpha travels along"
    assert (draw(pipe, name) - before).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, name), before)


def test_the_average_is_published_and_the_live_weights_are_kept(finished):
    published, live = load_file(finished("flow_grpo") / LORA), load_file(finished("flow_grpo") / "checkpoint-4" / LORA)
    assert published.keys() == live.keys() and any(not torch.equal(published[key], live[key]) for key in live)


# --- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, checkpoint", [("flow_grpo", "latest"), ("ddpo", "checkpoint-2")])
def test_resumed_equals_uninterrupted(finished, task, tmp_path, name, checkpoint):
    train(name, tmp_path / "run", task, num_epochs=2, **STATEFUL[name])
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0, 1]
    train(name, tmp_path / "run", task, num_epochs=4, resume_from_checkpoint=checkpoint, **STATEFUL[name])
    assert_same_run(tmp_path / "run", finished(name), "checkpoint-4")
    first, second = re.findall(r"^(?:# resumed after epoch 2\n)?accelerate launch .*$", (tmp_path / "run" / "README.md").read_text(), re.MULTILINE)
    assert "--num_epochs 2 " in first and second.startswith("# resumed") and f"--resume_from_checkpoint {checkpoint}" in second


# --- variants ----------------------------------------------------------------------------------------------------------


def test_flow_grpo_with_cps_a_window_and_the_official_kl(task, tmp_path):
    flags = {"sde_type": "cps", "sde_window_size": 1, "num_inference_steps": 4, "kl_form": "official", "no-global_std": True}
    train("flow_grpo", tmp_path / "run", task, num_epochs=2, kl_weight=0.1, **flags)
    assert all(row["ratio_error"] == 0.0 and row["grad_norm"] > 0 for row in rows(tmp_path / "run"))
    assert rows(tmp_path / "run")[1]["kl"] > 0


def test_ddpo_with_the_score_function_pushed_to_the_hub(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with FakeHub().running() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        push = {"push_to_hub": True, "hub_model_id": "bright-cats", "hub_token": "hf_secret"}
        out = train("ddpo", tmp_path / "run", task, estimator="sf", **{"no-per_prompt_stat_tracking": True}, **push)
        assert "bounds the true ratio" not in capsys.readouterr().out, "the score function has no clip"

        files = hub.repositories["tester/bright-cats"]
        local = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert set(files) - {".gitattributes"} == {path for path in local if not path.startswith("checkpoint-")} and LORA in files
        assert "checkpoint-1/optimizer.safetensors" in local
        assert not any(b"hf_secret" in content for content in files.values())
        assert b'load_lora_weights("tester/bright-cats"' in files["README.md"]

        pipe = DiffusionPipeline.from_pretrained(embedded.path("mini-sd"))
        pipe.load_lora_weights("tester/bright-cats", weight_name=LORA, cache_dir=tmp_path / "cache")
        pushed = draw(pipe, "ddpo")
        pipe.unload_lora_weights()
        pipe.load_lora_weights(out)
        assert torch.equal(draw(pipe, "ddpo"), pushed)
    metrics = rows(out)
    assert metrics[0]["ratio_error"] == 0.0 and metrics[0]["clip_fraction"] == 0.0, "one optimizer step per epoch"


# --- errors ------------------------------------------------------------------------------------------------------------


def test_an_invalid_reward_stops_with_its_prompt_or_is_masked(task, tmp_path):
    reward = f"{task / 'rewards.py'}:no_dogs"
    with pytest.raises(InvalidReward, match="(?s)'no_dogs' is NaN .*two dogs on a blue background.*--invalid_rewards mask"):
        train("flow_grpo", tmp_path / "run", task, reward=reward, num_epochs=2)
    train("flow_grpo", tmp_path / "run", task, reward=reward, num_epochs=2, invalid_rewards="mask")
    metrics = rows(tmp_path / "run")
    assert sum(row.get("invalid_rewards", 0) for row in metrics) >= 2
    assert all(value == value for row in metrics for value in row.values())
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "run" / LORA).values())


@pytest.mark.parametrize(
    "error, message, flags",
    [
        (ValueError, "(?s)clip_scoer.*clip_score", {"reward": "clip_scoer"}),
        (ValueError, "4 samples per epoch .* do not divide into batches of 3. Change --train_batch_size to one that fits .1, 2, 4.", {"train_batch_size": 3}),
        (ValueError, "empty.txt holds no prompts", {"prompts": "empty.txt"}),
        (ValueError, "No prompt file 'mini_trian'", {"prompts": "mini_trian"}),
        (OSError, "Cannot write to --output_dir empty.txt/run", {"output_dir": "empty.txt/run"}),
        (FileNotFoundError, "No checkpoint 'checkpoint-3'; .* has none", {"resume_from_checkpoint": "checkpoint-3"}),
    ],
)
def test_errors_say_what_to_do(task, tmp_path, monkeypatch, error, message, flags):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    with pytest.raises(error, match=message):
        train("ddpo", tmp_path / "run", task, **flags)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_parse(name):
    spec = importlib.util.spec_from_file_location(f"train_{name}", script(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipes = sorted((ROOT / "training_scripts" / "recipes").glob(f"{name}_*.yaml"))
    assert len(recipes) >= 2
    for recipe in recipes:
        assert module.parse_args(["--config", str(recipe)]).prompts
