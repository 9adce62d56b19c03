"""The pre-training loss on captioned images beside a reward: its gradient, that it is nothing at weight 0, that it resumes exactly."""

import json

import pytest
import torch
from PIL import Image
from script_tools import assert_same_lora, assert_same_run, load_script, make_run, rows, run_script, write_task
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.data.augment import to_tensor
from diffusers_align.training.gradient.pretraining import Pretraining

torch.set_num_threads(1)
FLAGS = {"num_samples_per_epoch": 4, "window": (0.3, 0.9), "reward_target": 5.0, "reward_scale": 1.0, "num_eval_samples": 2, "num_validation_images": 2}
CAPTIONS = ("a cat", "two dogs", "a green apple")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with prompts, rewards and captioned images."""
    folder, generator = write_task(tmp_path_factory.mktemp("task")), torch.Generator().manual_seed(0)
    lines = []
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()).save(folder / f"{i}.png")
        lines.append(json.dumps({"prompt": caption, "image": f"{i}.png"}) + "\n")
    (folder / "captioned.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def finished(task):
    """Two epochs of ReFL with the loss."""
    return run_script("refl", task / "run", task, **{**FLAGS, "num_epochs": 2}, pretrain_dataset_name=task / "captioned.jsonl")


def run_of(folder, task, **flags):
    """What the loss needs of a run, as the flags' defaults have it."""
    required = {"pretrained_model_name_or_path": "tiny", "prompts": "mini_train", "reward": "clip_score", "output_dir": folder}
    required |= {"pretrain_dataset_name": task / "captioned.jsonl", "proportion_empty_prompts": 0, "train_batch_size": 2, **flags}
    run = make_run(folder, **vars(load_script("refl").parse_args([word for key, value in required.items() for word in (f"--{key}", str(value))])))
    run.batches(4)
    return run


def test_its_gradient_is_that_of_plain_fine_tuning_times_the_weight(task, tmp_path):
    """Against ||v - (noise - x0)||^2 by hand, on top of a gradient that is there."""
    policy, run = Policy(FAMILIES["sd3"].build(), **FAMILIES["sd3"].call), run_of(tmp_path, task, pretrain_weight=0.5)
    parameters, logged = policy.add_lora(rank=2), {"pretrain_loss": []}
    torch.manual_seed(0)
    for parameter in parameters:
        parameter.data.normal_(std=0.3)
        parameter.grad = torch.randn_like(parameter)
    before, loss = [parameter.grad.clone() for parameter in parameters], Pretraining(run)
    loss.descend(policy, 1, range(2), logged)

    expected = []
    for b in range(2):
        index, noised = loss.examples.batch(1, b)
        pixels = torch.stack([to_tensor(loss.rows[i]["image"].open(), *loss.examples.latents.shape[-2:]) for i in index])
        x0, sigma = policy.encode(pixels), (noised.t / 1000).reshape(-1, 1, 1, 1)
        noise = (noised.x_t - (1 - sigma) * x0) / sigma
        assert list(noised.condition.prompts) == [loss.rows[i]["prompt"] for i in index] and 0.5 < noise.std() < 1.5
        expected.append((policy.predict(noised.x_t, noised.t, noised.condition) - (noise - x0)).square().flatten(1).mean(1))
    assert logged["pretrain_loss"] == pytest.approx([e.mean().item() for e in expected], rel=1e-4)
    gradients = torch.autograd.grad(0.5 * torch.cat(expected).mean(), parameters)
    for parameter, start, gradient in zip(parameters, before, gradients):
        torch.testing.assert_close(parameter.grad - start, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()) + 1e-6)


def test_without_weight_it_is_not_there(task, tmp_path, finished):
    plain = run_script("refl", tmp_path / "plain", task, **FLAGS)
    run_script("refl", tmp_path / "zero", task, **FLAGS, pretrain_dataset_name=task / "captioned.jsonl", pretrain_weight=0)
    assert_same_run(tmp_path / "zero", plain, "checkpoint-1")
    assert "pretrain_loss" not in rows(plain)[0] and all(row["pretrain_loss"] > 0 for row in rows(finished))
    with pytest.raises(AssertionError):
        assert_same_lora(plain, finished / "checkpoint-1")


def test_resumed_equals_uninterrupted(task, tmp_path, finished):
    flags = {**FLAGS, "pretrain_dataset_name": task / "captioned.jsonl"}
    run_script("refl", tmp_path / "run", task, **flags)
    run_script("refl", tmp_path / "run", task, **{**flags, "num_epochs": 2}, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "run", finished, "checkpoint-2")


@pytest.mark.parametrize("name, flags", [("draft", {"adjoint": True, "method": "draft"}), ("adjoint_matching", {"num_prompts_per_epoch": 4})])
def test_other_scripts_log_it(name, flags, task, tmp_path):
    flags = {"num_samples_per_epoch": 4, **flags} if name == "draft" else flags
    run_script(name, tmp_path / "run", task, **flags, num_eval_samples=2, pretrain_dataset_name=task / "captioned.jsonl", pretrain_weight=0.1)
    assert all(row["pretrain_loss"] > 0 and row["grad_norm"] > 0 for row in rows(tmp_path / "run"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--pretrain_weight", "1"], "--pretrain_dataset_name"),
        (["--pretrain_dataset_name", "x", "--pretrain_weight", "-1"], "--pretrain_weight must be a number from 0 to 1e9, got -1"),
        (["--pretrain_dataset_name", "x", "--proportion_empty_prompts", "2"], "--proportion_empty_prompts must be a number from 0 to 1, got 2"),
        (["--random_flip"], "--random_flip has no effect without --pretrain_dataset_name"),
    ],
)
def test_flags_that_make_no_sense(flags, message, tmp_path, capsys):
    required = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "clip_score", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        load_script("vader").parse_args([*required, *flags])
    assert message in capsys.readouterr().err


def test_a_data_set_that_does_not_exist_is_found_before_the_pipeline_is_loaded(task, tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.jsonl"):
        run_script("vader", tmp_path / "run", task, pretrained_model_name_or_path="no-such-model", pretrain_dataset_name=task / "nothing.jsonl")
