"""`train_nft.py` and `train_awm.py`, on both kinds of model."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from script_tools import assert_same_lora, rows, run_script, run_script_on_two_processes, write_task

ROOT = Path(__file__).parents[2]


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


@pytest.mark.long
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
    rows = train(name, tmp_path / "run", model, num_epochs=8, learning_rate=1e-3, **flags, **own)
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
