"""Every training script in bfloat16, and those whose losses differ in float16, for one tiny epoch: it ends, it learns, and its replayed steps are its own."""

import json
import math

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from script_runs import PROMPTS
from script_tools import RECIPES, load_script, rows, run_script, write_task

torch.set_num_threads(1)
LORA = "pytorch_lora_weights.safetensors"
TINY = {
    "num_inference_steps": 2,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_eval_samples": 2,
    "num_validation_images": 2,
    "validation_epochs": 100,
    "lora_layers": "to_q,to_v",
}
MINI_SD = {"pretrained_model_name_or_path": "mini-sd", "call_kwargs": "{}"}
GROUP = {"num_prompts_per_epoch": 1, "group_size": 2}
TWO = {"num_samples_per_epoch": 2}
# One run for each way through the code that a dtype can go; the LoRA starts at 0, so one step of any method moves it.
ONLINE = {
    "flow_grpo": ("flow_grpo", GROUP),
    "flow_grpo_cps": ("flow_grpo", {**GROUP, "sde_type": "cps", "kl_weight": 0.1, "sde_window": (0, 1)}),
    "mv_grpo": ("mv_grpo", {**GROUP, "num_views": 1, "views": "views.json", "sde_window": (0, 1)}),
    "dense_grpo": ("dense_grpo", {**GROUP, "calibration_rounds": 1, "sde_window": (0, 1)}),
    "ddpo": ("ddpo", {**TWO, **MINI_SD}),
    "dpok": ("dpok", {**TWO, **MINI_SD, "value_steps": 1, "value_batch_size": 2}),
    "d3po": ("d3po", {**GROUP, **MINI_SD}),
    "spo": (
        "spo",
        {**TWO, "num_candidates": 2, "divert_start_step": 0, "sde_window": (0, 1), "score_scale": 10000, "threshold": 0.0, "num_inference_steps": 3},
    ),
    "nft": ("nft", {**GROUP, "num_train_timesteps": 1}),
    "awm": ("awm", {**GROUP, **MINI_SD, "num_train_timesteps": 1}),
    "adjoint_matching": ("adjoint_matching", {"num_prompts_per_epoch": 2, "last_steps": 1, "random_steps": 0, "num_inference_steps": 3}),
}
THROUGH_SAMPLING = {
    "draft": ("draft", {**TWO, "kl_weight": 0.1}),
    "draft_lv": ("draft", {**TWO, "method": "draft_lv", "num_renoised": 1}),
    "srpo": ("draft", {**TWO, **MINI_SD, "method": "srpo", "reward_map": "hinge", "reward_target": 3.0, "num_inference_steps": 3}),
    "drtune": ("draft", {**TWO, "method": "drtune", "num_trained_steps": 1, "skip_last_steps": 1}),
    "adjoint": ("draft", {**TWO, "method": "draft", "adjoint": True}),
    "refl": ("refl", {**TWO, **MINI_SD, "window": (0.3, 0.9), "reward_target": 5.0, "reward_scale": 1.0}),
    "alignprop": ("alignprop", {**TWO, **MINI_SD, "truncation_schedule": "uniform", "reward_scale": 1.0}),
    "vader": ("vader", {**TWO, **MINI_SD, "backprop_mode": "random"}),
}
OFFLINE = {
    "dpo": ("dpo", {**TWO, "dataset_name": "pair.jsonl"}),
    "dspo": ("dspo", {**TWO, **MINI_SD, "dataset_name": "pair.jsonl"}),
    "kto": ("kto", {**TWO, "dataset_name": "binary.jsonl"}),
    "rwr": ("rwr", {**TWO, **MINI_SD, "dataset_name": "scored.jsonl"}),
}
RUNS = {**ONLINE, **THROUGH_SAMPLING, **OFFLINE}
# Replayed steps have the log-probabilities that they were drawn with.
WITH_RATIOS = ("flow_grpo", "flow_grpo_cps", "mv_grpo", "dense_grpo", "ddpo", "dpok", "awm")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with prompts, a reward, and a data set of each kind, of two prompts."""
    folder = write_task(tmp_path_factory.mktemp("task"))
    sets = {name: [] for name in ("pair", "binary", "scored")}
    for i, prompt in enumerate(("a cat", "two dogs", "a green apple", "three birds")):
        for name, color in (("w", (20, 20, 220)), ("l", (200, 60, 20))):
            Image.new("RGB", (32, 32), color).save(folder / f"{i}{name}.png")
            sets["binary"].append({"prompt": prompt, "image": f"{i}{name}.png", "label": name == "w"})
            sets["scored"].append({"prompt": prompt, "image": f"{i}{name}.png", "reward": float(name == "w")})
        sets["pair"].append({"prompt": prompt, "image_0": f"{i}w.png", "image_1": f"{i}l.png", "label_0": 1})
    for name, found in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "views.json").write_text(json.dumps({prompt: [f"a picture of {prompt}"] for prompt, _ in PROMPTS}))
    return folder


@pytest.fixture(autouse=True)
def a_precision_of_its_own():
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def train(name, out, task, precision):
    script, flags = RUNS[name]
    files = {key: task / flags[key] for key in ("dataset_name", "views") if key in flags}
    tiny = {key: value for key, value in TINY.items() if (script, key) != ("d3po", "gradient_accumulation_steps")}  # its steps are of all samples
    return run_script(script, out, task, **{**tiny, **flags, **files, "mixed_precision": precision})


# In float16 those whose losses differ; each has a loss scaler.
FLOAT16 = ("flow_grpo", "ddpo", "spo", "nft", "adjoint_matching", "draft", "refl", "dpo", "kto", "rwr")


@pytest.mark.long
@pytest.mark.parametrize("name, precision", [*((name, "bf16") for name in RUNS), *((name, "fp16") for name in FLOAT16)])
def test_scripts_train(name, precision, task, tmp_path):
    out = train(name, tmp_path / "run", task, precision)
    (row,) = rows(out)
    assert all(math.isfinite(value) for value in row.values())
    assert row["grad_norm"] > 0
    assert ("ratio_error" in row) == (name in WITH_RATIOS) and row.get("ratio_error", 0.0) == 0.0
    weights = load_file(out / LORA)
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(weight.any() for key, weight in weights.items() if "lora_B" in key or "lora.up" in key)


def test_every_script_is_among_them():
    scripts = {path.stem.removeprefix("train_") for path in RECIPES.parent.glob("train_*.py")}
    assert {script for script, _ in RUNS.values()} | {"pfm", "reward", "value_steering"} == scripts


def test_a_preference_flow_trains_in_bf16(task, tmp_path):
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8, "train_batch_size": 2, "held_out": 0.5, "num_inference_steps": 1}
    values = {"dataset_name": task / "pair.jsonl", "output_dir": tmp_path / "flow", "num_epochs": 1, "validation_epochs": 100}
    values |= {"num_validation_images": 2, **small}
    values |= {"reward": f"{task / 'rewards.py'}:brightness", "pretrained_model_name_or_path": "mini-sd", "mixed_precision": "bf16"}
    argv = [word for key, value in values.items() for word in (f"--{key}", *map(str, value if isinstance(value, tuple) else [value]))]
    load_script("pfm").main(argv)
    (row,) = rows(tmp_path / "flow")
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0


@pytest.mark.long
def test_a_value_that_steers_trains_in_bf16(task, tmp_path):
    """Its network is in float32 whatever the pipeline is in."""
    values = {"output_dir": tmp_path / "run", "prompts": task / "prompts.jsonl", "reward": f"{task / 'rewards.py'}:brightness", "num_epochs": 1}
    values |= {"pretrained_model_name_or_path": "mini-sd", "mixed_precision": "bf16", "num_inference_steps": 2, "train_batch_size": 2, "num_updates": 2}
    values |= {"num_samples_per_epoch": 2, "num_noises": 2, "num_eval_samples": 2, "num_validation_images": 2, "value_width": 8, "num_own_epochs": 1}
    load_script("value_steering").main([word for key, value in values.items() for word in (f"--{key}", str(value))])
    (row,) = rows(tmp_path / "run")
    assert math.isfinite(row["value_loss"]) and row["grad_norm"] > 0
    weights = load_file(tmp_path / "run" / "value" / "diffusion_pytorch_model.safetensors")
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())


@pytest.mark.long
def test_a_reward_trains_in_bf16(task, tmp_path):
    """On images that the model predicts in bf16, where there is a generator to make them."""
    argv = ["--dataset_name", task / "pair.jsonl", "--kind", "pair", "--model", "mini-clip", "--output_dir", tmp_path / "mine", "--num_epochs", "2"]
    noisy = ["--step_aware", "--num_noise_levels", "1", "--pretrained_model_name_or_path", "mini-sd", "--mixed_precision", "bf16"]
    load_script("reward").main([str(word) for word in (*argv, *noisy)])
    config = json.loads((tmp_path / "mine" / "learned_reward.json").read_text())
    assert math.isfinite(config["metrics"]["train"]["loss"])
