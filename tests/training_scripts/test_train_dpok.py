"""`train_dpok.py`: resumed, on two processes, and by its flags."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, embedded, sde_twin
from diffusers_align.training.checkpoints.state_files import read_state

ROOT = Path(__file__).parents[2]
LORA = "pytorch_lora_weights.safetensors"


# the prompts' features


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_features(family):
    """One row per sample, also with guidance; of the sample's own prompt, whatever else is in the batch."""
    policy = Policy(FAMILIES[family].build(), **FAMILIES[family].call)
    prompts = ["a cat", "a large red dog on a green hill", "a cat"]
    features = policy.prompt_features(policy.condition(prompts))
    assert features.shape[0] == 3 and features.ndim == 2 and features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features[0], features[2])
    assert (features[0] - features[1]).abs().max() > 1e-3 * features.abs().max()
    assert torch.equal(policy.prompt_features(policy.condition(["a cat"], seeds=[3]))[0], features[0])
    assert not {"encode_prompt", "_encode_prompt"} & set(vars(policy.pipeline)), "the pipeline has its own method back"
    unguided = {name: 1.0 for name in ("guidance_scale", "true_cfg_scale") if FAMILIES[family].call.get(name)}
    assert policy.prompt_features(policy.condition(prompts, **unguided)).shape == features.shape


def test_prompts_are_encoded_once_for_their_features(monkeypatch):
    policy = Policy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call)
    encode, encoded = policy.pipeline.encode_prompt, []
    monkeypatch.setattr(policy.pipeline, "encode_prompt", lambda prompt, *args, **kwargs: (encoded.append(prompt), encode(prompt, *args, **kwargs))[1])
    policy.remember_prompts(1)
    asked = ((["a cat", "a dog", "a cat"], {}), (["a dog"], {}), (["a cat"], {"guidance_scale": 1.0}))
    conditions = [policy.condition(prompts, **own) for prompts, own in asked]
    encoded.clear()
    three, dog, _ = map(policy.prompt_features, conditions)  # cat, dog, cat; dog; cat without guidance
    assert torch.equal(dog, three[1:2]) and encoded == [["a cat"], ["a dog"], ["a cat"]], "the last is another call"


def test_features_are_those_of_the_encoder_of_now_where_no_prompts_are_remembered():
    policy = Policy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call)
    condition = policy.condition(["a cat"])
    before = policy.prompt_features(condition)
    with torch.no_grad():
        for parameter in policy.pipeline.text_encoder.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(policy.prompt_features(condition), before) and not policy.prompt_memory.features


def test_features_of_given_embeddings_are_not_remembered():
    """They may be others in the same place."""
    policy, embeds = Policy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call), torch.randn(1, 77, 32)
    policy.remember_prompts(1)
    given = policy.condition(None, prompt_embeds=embeds, negative_prompt_embeds=0 * embeds)
    before = policy.prompt_features(given)
    given.per_sample["prompt_embeds"].mul_(2)
    assert torch.equal(policy.prompt_features(given), 2 * before)


def test_prompt_features_say_what_is_missing():
    policy = Policy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call)
    condition = policy.condition(["a cat"])
    policy.pipeline.encode_prompt = lambda *args, **kwargs: (None, torch.arange(3))
    with pytest.raises(ValueError, match="no sequence of vectors.*another --advantage"):
        policy.prompt_features(condition)

    class Mute:
        components = {}

        def __call__(self):
            return None

        def maybe_free_model_hooks(self):
            return None

    mute = Policy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call)
    mute.pipeline = Mute()
    mute.parameters = {}
    with pytest.raises(ValueError, match="Mute has no encode_prompt.*another --advantage"):
        mute.prompt_features(condition)
    Mute.encode_prompt = lambda self: None
    mute.call = lambda condition: {}
    with pytest.raises(ValueError, match="Mute's call does not use its encode_prompt.*another --advantage"):
        mute.prompt_features(condition)


# the script


REWARD = """
import os
from pathlib import Path


def ranked(images, prompts, **columns):
    (Path(__file__).parent / f"rank-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}").touch()
    return brightness(images, prompts)


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1) - 0.5


def no_dogs(images, prompts, **columns):
    values = images.flatten(1).mean(1)
    return values + values.new_tensor([float("nan") if "dog" in prompt else 0.0 for prompt in prompts])


def terrible(images, prompts, **columns):
    return -1 - images.flatten(1).mean(1)
"""
SMALL = {
    "pretrained_model_name_or_path": "mini-sd",
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "num_samples_per_epoch": 4,
    "train_batch_size": 2,
    "learning_rate": 3e-3,
    "num_epochs": 2,
    "num_eval_samples": 2,
    "num_validation_images": 2,
    "checkpointing_epochs": 1,
}
VALUES = {
    "value_steps": 2,
    "value_learning_rate": 1e-3,
    "value_buffer_size": 16,
    "value_batch_size": 8,
}


def script():
    spec = importlib.util.spec_from_file_location("train_dpok", ROOT / "training_scripts" / "train_dpok.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(tmp_path):
    """train("name", flag=value): a run in a folder of its own; its metrics."""
    (tmp_path / "prompts.txt").write_text("a cat on a red background\ntwo dogs on a blue background\n")
    (tmp_path / "rewards.py").write_text(REWARD)

    def run(name, reward="brightness", **flags):
        task = {"prompts": tmp_path / "prompts.txt", "reward": f"{tmp_path / 'rewards.py'}:{reward}", "output_dir": tmp_path / name}
        learned = {} if flags.get("advantage") == "batch" else VALUES
        values = {**SMALL, **learned, **task, **flags}
        script().main([word for key, value in values.items() for word in (f"--{key}", *([] if value is True else [str(value)]))])
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    run.folder = tmp_path
    return run


def value_state(checkpoint):
    """What the value baseline left in a checkpoint."""
    return read_state(checkpoint, "value_baseline")


@pytest.mark.long
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train):
    expected = train("whole", num_epochs=3)
    train("parts", num_epochs=1)
    assert train("parts", num_epochs=3, resume_from_checkpoint="latest") == expected
    whole, parts = (load_file(train.folder / name / LORA) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    states = [value_state(train.folder / name / "checkpoint-3") for name in ("whole", "parts")]
    for key in ("generator", "buffer", "network"):
        mine, theirs = (list(s[key].values()) if isinstance(s[key], dict) else list(s[key]) for s in states)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), key
    assert len(states[0]["buffer"][0]) == 16 and states[0]["optimizer"]["state"][0]["step"] == 6
    assert expected[0]["ratio_error"] == expected[2]["ratio_error"] == 0.0
    assert all(row["grad_norm"] > 0 and row["value_error"] > 0 and math.isfinite(row["explained_variance"]) for row in expected)
    assert 0 <= expected[0]["kl"] < expected[2]["kl"]


@pytest.mark.long
def test_two_processes_train_what_one_does_with_the_same_value_network(train):
    """The same two samples make each optimizer step."""
    # Adam's own epsilon would make a full step of the rounding in a gradient of 0.
    ours = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "value_learning_rate": 1e-2, "learning_rate": 1e-3, "adam_epsilon": 1e-6}
    train("one", **ours)
    values = {**SMALL, **VALUES, **ours, "prompts": train.folder / "prompts.txt"}
    values |= {"reward": f"{train.folder / 'rewards.py'}:ranked", "output_dir": train.folder / "two"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "training_scripts" / "train_dpok.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    argv = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
    result = subprocess.run([*launch, *argv], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in train.folder.glob("rank-*")) == ["rank-0-of-2", "rank-1-of-2"]
    one, two = (load_file(train.folder / name / LORA) for name in ("one", "two"))
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one)
    assert max(value.abs().max() for key, value in one.items() if "lora.up" in key or "lora_B" in key) > 1e-4
    mine, theirs = (value_state(train.folder / name / "checkpoint-2") for name in ("two", "one"))
    for a, b in zip(mine["buffer"], theirs["buffer"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for key, weight in theirs["network"].items():
        torch.testing.assert_close(mine["network"][key], weight, rtol=0, atol=1e-3)


def test_where_outputs_cannot_be_told_from_means_the_papers_kl_alone_is_taken(train):
    """A scheduler that clips (by quantiles); and one whose model answers with its variance too (DeepFloyd IF)."""
    clipping = Path(shutil.copytree(embedded.path("mini-sd"), train.folder / "clipping"))
    config = clipping / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "thresholding": True}))
    flags = {"pretrained_model_name_or_path": clipping, "num_epochs": 1, "advantage": "batch"}
    with pytest.raises(ValueError, match="it clips.*--kl_form paper"):
        train("official", **flags)
    (row,) = train("paper", **flags, kl_form="paper")
    assert row["kl"] >= 0 and row["grad_norm"] > 0
    (row,) = train("none", **flags, kl_weight=0)
    assert row["grad_norm"] > 0
    learned = SimpleNamespace(scheduler=sde_twin(DDPMScheduler(variance_type="learned_range")))
    with pytest.raises(ValueError, match="hold the variance of a step too: use --kl_form paper"):
        script().output_weights(learned, None)


def test_generalised_advantages_resume_bit_for_bit_and_their_targets_hold_later_values(train):
    """The first epoch's targets are rewards; the second's are part of the network's own later values."""
    expected = train("whole_gae", advantage="gae", gae_lambda=0.5)
    train("parts_gae", advantage="gae", gae_lambda=0.5, num_epochs=1)
    first = value_state(train.folder / "parts_gae" / "checkpoint-1")["buffer"][3]
    assert train("parts_gae", advantage="gae", gae_lambda=0.5, resume_from_checkpoint="latest") == expected
    states = [value_state(train.folder / name / "checkpoint-2") for name in ("whole_gae", "parts_gae")]
    assert all(torch.equal(a, b) for a, b in zip(states[0]["buffer"], states[1]["buffer"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states[0]["network"].values(), states[1]["network"].values(), strict=True))
    assert all(row["value_error"] > 0 and math.isfinite(row["explained_variance"]) and row["ratio_error"] == 0.0 for row in expected)
    later = states[0]["buffer"][3][len(first) :]
    assert len(first.unique()) <= 4, "one reward a sample, at each of its steps"
    assert len(later) == 0 or len(later.unique()) > 4


def test_the_flag_that_advantage_was(capsys):
    base = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "jpeg", "--output_dir", "out"]
    for old, advantage, lam in (
        (["--no-value_baseline"], "batch", 0.95), (["--value_baseline"], "value", 0.95), (["--value_baseline", "--gae_lambda", "0.5"], "gae", 0.5),
        (["--value_baseline", "--gae_lambda", "1"], "value", 0.95), ([], "value", 0.95), (["--advantage", "gae"], "gae", 0.95),
    ):  # fmt: skip
        args = script().parse_args([*base, *old])
        assert (args.advantage, args.gae_lambda) == (advantage, lam)
    for flags, message in (
        (["--gae_lambda", "0.5"], "--gae_lambda has no effect without --advantage gae"),
        (["--no-value_baseline", "--advantage", "gae"], "--no-value_baseline is --advantage batch now"),
        (["--no-value_baseline", "--gae_lambda", "0.5"], "--no-value_baseline is --advantage batch now"),
        (["--advantage", "batch", "--value_steps", "3"], "--value_steps has no effect without --advantage gae"),
        (["--advantage", "batch", "--num_samples_per_epoch", "1", "--train_batch_size", "1"], "--advantage batch compares the samples of an epoch"),
    ):
        with pytest.raises(SystemExit):
            script().parse_args([*base, *flags])
        assert message in capsys.readouterr().err


def test_the_papers_kl_the_official_clamp_and_guidance(train):
    rows = train("clamp", kl_form="paper", clip_mode="clamp", eta=0.8, guidance_scale=3.0)
    assert all(row["ratio_error"] == 0.0 for row in rows) and rows[1]["kl"] > 0


def test_without_value_and_kl_on_a_flow_pipeline(train):
    flow = {"pretrained_model_name_or_path": "mini-sd3", "call_kwargs": '{"max_sequence_length": 1}', "sde_type": "dance_grpo", "noise_level": 0.4}
    rows = train("flow", kl_weight=0, advantage="batch", **flow)
    assert all(row["ratio_error"] == 0.0 and row["grad_norm"] > 0 and not {"kl", "value_error"} & row.keys() for row in rows)
    rows = train("flow_with_both", num_epochs=1, **flow)
    assert rows[0]["value_error"] > 0 and rows[0]["kl"] > 0


def test_masked_rewards_and_filtered_ones_teach_nothing(train):
    rows = train("masked", reward="no_dogs", invalid_rewards="mask", num_eval_samples=4, num_epochs=1)
    assert rows[0]["invalid_rewards"] > 0 and all(math.isfinite(value) for value in rows[0].values())
    # Every reward is below 0, so the filter leaves equal ones: the batch's advantage is 0, and so is the gradient.
    rows = train("filtered", reward="terrible", reward_filter=True, kl_weight=0, num_epochs=1, allow_no_signal=True, advantage="batch")
    assert rows[0]["reward"] < -1 and rows[0]["grad_norm"] == 0.0


def test_flags_of_the_other_kind_of_noise_are_refused(train):
    with pytest.raises(ValueError, match="DDIMSDEScheduler has no noise_level; its fields are eta"):
        train("wrong", noise_level=0.7)


@pytest.mark.parametrize("recipe", sorted((ROOT / "training_scripts" / "recipes").glob("dpok_*.yaml")), ids=lambda path: path.stem)
def test_recipes_parse(recipe):
    args = script().parse_args(["--config", str(recipe)])
    assert args.prompts and args.reward_weight == 10 and args.kl_weight == yaml.safe_load(recipe.read_text())["kl_weight"]


def test_the_weight_of_the_kl_goes_with_its_form():
    given = ["--config", str(ROOT / "training_scripts" / "recipes" / "dpok_sd15.yaml")]
    for form, weight in (("official", 0.01), ("paper", 0.05)):
        argv = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "jpeg", "--output_dir", "out", "--kl_form", form]
        assert script().parse_args(argv).kl_weight == weight
    assert script().parse_args([*given, "--kl_weight", "0.3"]).kl_weight == 0.3
