"""`train_pfm.py` on a closed generator's images."""

import functools
import hashlib
import json
import shlex

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DModel
from fake_hub import FakeHub
from PIL import Image
from safetensors.torch import load_file
from script_runs import assert_same_state
from script_tools import RECIPES, load_script, rows

from diffusers_align import embedded
from diffusers_align.data import LazyImage
from diffusers_align.pipelines.preference_flow import PreferenceFlowPipeline
from diffusers_align.training.checkpoints.state_files import read_state
from diffusers_align.training.report.model_card import public
from diffusers_align.training.report.pictures import to_pil

# --- the pipeline ----------------------------------------------------------------------------------------------------------


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "two dogs on a red background"]


def run_flow(pipe, images=IMAGES, prompt=PROMPTS, **call):
    return pipe(images, prompt, **{"num_inference_steps": 2, "output_type": "pt", **call}).images


# --- the script, on a generator that is a black box --------------------------------------------------------------------------


def weights_hash(pipeline):
    digest = hashlib.sha256()
    for name in ("unet", "vae", "text_encoder"):
        for key, value in getattr(pipeline, name).state_dict().items():
            digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def generator():
    pipe = StableDiffusionPipeline.from_pretrained(embedded.path("mini-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(generator, tmp_path_factory):
    """Pairs that prefer brighter images of a generator's samples, its fresh outputs, and rewards."""
    folder, prompts = tmp_path_factory.mktemp("task"), [f"a {name}" for name in ("cat", "dog", "fox", "lemon")]
    images = generator([prompt for prompt in prompts for _ in range(4)], num_inference_steps=2, output_type="pt").images
    pairs, outputs = [], []
    for i, image in enumerate(images):
        to_pil(image * 0.5).save(folder / f"{i}-dark.png")
        to_pil(image * 0.5 + 0.5).save(folder / f"{i}-light.png")
        names = [f"{i}-dark.png", f"{i}-light.png"]
        pairs.append({"prompt": prompts[i // 4], "image_0": names[i % 2], "image_1": names[1 - i % 2], "label_0": i % 2})
        outputs.append({"prompt": prompts[i // 4], "image": f"{i}-dark.png"})
    for name, written in (("pairs", pairs), ("outputs", outputs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt, "sign": 1 - 2 * (i == 3)}) + "\n" for i, prompt in enumerate(prompts)))
    (folder / "rewards.py").write_text(
        "def brightness(images, prompts, **columns):\n    return images.flatten(1).mean(1)\n\n\n"
        "def signed(images, prompts, sign, **columns):\n    return images.flatten(1).mean(1) * images.new_tensor(sign)\n"
    )
    return folder


SMALL = {
    "pretrained_model_name_or_path": "mini-sd", "block_out_channels": (16, 32), "layers_per_block": 1, "attention_head_dim": 8, "train_batch_size": 4,
    "learning_rate": 3e-3, "held_out": 0.25, "num_inference_steps": 2, "num_validation_images": 4, "checkpointing_epochs": 1, "validation_epochs": 2,
}  # fmt: skip


def arguments(folder, out, **flags):
    argv, values = (
        [],
        {"dataset_name": folder / "pairs.jsonl", "reward": f"{folder / 'rewards.py'}:brightness", "output_dir": out, "num_epochs": 4, **SMALL, **flags},
    )
    for name, value in values.items():
        if value is not None:
            argv += [f"--{name}", *([] if value is True else map(str, value if isinstance(value, tuple) else [value]))]
    return argv


def train(folder, out, **flags):
    load_script("pfm").main(arguments(folder, out, **flags))
    return out


STATEFUL = {"coupling": "independent", "sigma": 0.1, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 8}


@pytest.fixture(scope="module")
def finished(folder, generator, tmp_path_factory):
    before = weights_hash(generator)
    out = train(folder, tmp_path_factory.mktemp("pfm") / "run", **STATEFUL)
    assert weights_hash(generator) == before, "the generator is a black box"
    return out


def field_weights(folder):
    return load_file(next((folder / "vector_field").glob("*.safetensors")))


def test_a_run_leaves_a_pipeline_metrics_pictures_and_a_card(finished, folder):
    metrics = rows(finished)
    assert [row["epoch"] for row in metrics] == [0, 1, 2, 3] and metrics[-1]["loss"] < metrics[0]["loss"]
    assert [("eval_loss" in row) for row in metrics] == [False, True, False, True] and metrics[3]["eval_loss"] < metrics[1]["eval_loss"]
    for picture in ("reward_curve.png", "before_after.png", "samples/epoch-0002.png"):
        with Image.open(finished / picture) as image:
            assert len(image.convert("L").getcolors()) > 10
    card = (finished / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers" and "brightness, win rate | " in card
    command = next(line for line in card.splitlines() if line.startswith("accelerate launch"))
    assert shlex.split(command)[3:] == [public(word) for word in arguments(folder, finished, **STATEFUL)]
    assert str(folder) not in card and str(finished) not in card
    assert not list(finished.rglob(".*")) and (finished / "preference_flow.py").is_file()


def test_what_is_published_is_the_average_and_loads_into_the_pipeline(finished):
    published, live = field_weights(finished), field_weights(finished / "checkpoint-4")
    assert published.keys() == live.keys() and any(not torch.equal(published[key], live[key]) for key in live)
    pipe = DiffusionPipeline.from_pretrained(finished, custom_pipeline="preference_flow", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pipe.vector_field.conv_out.weight, published["conv_out.weight"]) and run_flow(pipe).shape == IMAGES.shape


def test_resumed_equals_uninterrupted(finished, folder, tmp_path):
    train(folder, tmp_path / "run", **STATEFUL, num_epochs=2)
    train(folder, tmp_path / "run", **STATEFUL, resume_from_checkpoint="latest")
    assert rows(tmp_path / "run") == rows(finished)
    assert_same_state(field_weights(tmp_path / "run"), field_weights(finished))
    assert (tmp_path / "run" / "before_after.png").read_bytes() == (finished / "before_after.png").read_bytes()
    for name in ("run", "weights", "optimizer", "schedule", "moving_average"):
        assert_same_state(*(read_state(run / "checkpoint-4", name) for run in (tmp_path / "run", finished)))


@pytest.mark.parametrize("what", ["grid", "flow_pairs.shutil.copy"])
def test_a_full_disk_says_how_to_resume(what, folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    module = load_script("pfm")
    owner, _, name = what.rpartition(".")
    monkeypatch.setattr(functools.reduce(getattr, filter(None, owner.split(".")), module), name, full)
    with pytest.raises(OSError, match=r"No space left on device.*go on with --resume_from_checkpoint latest"):
        module.main(arguments(folder, tmp_path / "run", num_epochs=2))


def test_pairs_of_any_size_are_trained_on_as_they_are_transported(folder, tmp_path):
    """30 x 46 is no multiple of what the field halves: training pads as the call does."""
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for name in {pair[side] for pair in pairs for side in ("image_0", "image_1")}:
        with Image.open(folder / name) as image:
            image.resize((46, 30)).save(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text())
    flags = {"dataset_name": tmp_path / "pairs.jsonl", "num_epochs": 1, "validation_epochs": 1}
    plain = {"pretrained_model_name_or_path": None, "pixels": True, "no-sees_prompt": True, "block_out_channels": (8, 8, 8), "attention_head_dim": 4}
    out = train(folder, tmp_path / "run", **flags, **plain)
    assert rows(out)[0]["eval_loss"] > 0
    field = UNet2DModel.from_pretrained(out, subfolder="vector_field")
    assert run_flow(PreferenceFlowPipeline(field), torch.rand(1, 3, 30, 46), None).shape == (1, 3, 30, 46)


def test_pairs_that_weigh_nothing_are_refused(folder, tmp_path):
    pairs = [{**json.loads(line), "weight": 0} for line in (folder / "pairs.jsonl").read_text().splitlines()]
    (folder / "weightless.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with pytest.raises(ValueError, match="weightless.jsonl: of those to train on, all pairs have the weight 0, so there is nothing to learn"):
        train(folder, tmp_path / "run", dataset_name=folder / "weightless.jsonl")


def test_the_flow_learns_what_is_preferred(folder, tmp_path, capsys):
    train(folder, tmp_path / "run", outputs=folder / "outputs.jsonl", num_epochs=12, checkpointing_epochs=12, validation_epochs=12, **{"no-use_ema": True})
    assert "brightness, win rate: 100.0%" in capsys.readouterr().out.replace(f"{folder / 'rewards.py'}:", "")


def test_the_pipeline_is_pushed_to_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with FakeHub().running() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        push = {"push_to_hub": True, "hub_model_id": "bright-flow", "hub_token": "hf_secret"}
        out = train(folder, tmp_path / "run", num_epochs=1, num_eval_samples=4, **push)
        files = hub.repositories["tester/bright-flow"]
    local = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(files) - {".gitattributes"} == {path for path in local if not path.startswith("checkpoint-")}
    assert {"model_index.json", "preference_flow.py", "vector_field/diffusion_pytorch_model.safetensors"} <= set(files)
    assert not any(b"hf_secret" in content for content in files.values()) and b'from_pretrained("tester/bright-flow")' in files["README.md"]


def test_a_flow_of_pixels_that_sees_no_prompt_needs_no_model(folder, tmp_path):
    flags = {
        "pixels": True,
        "no-sees_prompt": True,
        "pretrained_model_name_or_path": None,
        "num_epochs": 1,
        "coupling": "ot",
        "held_out": 0.0,
        "num_eval_samples": 4,
    }
    train(folder, tmp_path / "run", **flags)
    pipe = PreferenceFlowPipeline.from_pretrained(tmp_path / "run")
    assert pipe.vae is None and isinstance(pipe.vector_field, UNet2DModel) and "eval_loss" not in rows(tmp_path / "run")[0]


def test_the_reward_gets_the_fields_of_its_prompts(folder, tmp_path, capsys):
    reward = f"{folder / 'rewards.py'}:signed"
    train(folder, tmp_path / "run", reward=reward, prompts=folder / "prompts.jsonl", outputs=folder / "outputs.jsonl", num_epochs=1, strength=0.0)
    sign = torch.tensor([1.0, 1.0, 1.0, -1.0]).repeat_interleave(4)
    pictures = [LazyImage(folder / f"{i}-dark.png").open() for i in range(16)]
    expected = (sign * torch.stack([torch.from_numpy(np.array(picture) / 255).mean() for picture in pictures])).mean()
    out = capsys.readouterr().out.replace(f"{folder / 'rewards.py'}:", "")
    assert f"signed, before: {expected:.4f}" in out and "signed, win rate: 50.0%" in out and "16 ties" in out


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"dataset_name": None}, "--dataset_name is required"),
        ({"pixels": True, "pretrained_model_name_or_path": None}, "its autoencoder and its text encoder"),
        ({"strength": 1.5}, "--strength must be a number from 0 to 1, got 1.5"),
        ({"single_file_config": "x"}, "unrecognized arguments: --single_file_config"),
    ],
)
def test_missing_flags_are_named(folder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        train(folder, tmp_path / "run", **flags)
    assert message in capsys.readouterr().err


def test_images_of_different_sizes_need_a_resolution(folder, tmp_path):
    other = Image.open(folder / "0-dark.png").resize((48, 40))
    other.save(folder / "large.png")
    mixed = [{"prompt": f"a {i}", "image_0": "large.png", "image_1": "1-dark.png", "label_0": i} for i in (0, 1)]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    with pytest.raises(ValueError, match="(?s)32x32, 48x40.*--resolution"):
        train(folder, tmp_path / "run", dataset_name=folder / "mixed.jsonl")
    train(folder, tmp_path / "run", dataset_name=folder / "mixed.jsonl", resolution=32, num_epochs=1)


def test_recipes_parse():
    recipes = sorted(RECIPES.glob("pfm_*.yaml"))
    assert len(recipes) >= 2
    for recipe in recipes:
        assert load_script("pfm").parse_args(["--config", str(recipe)]).dataset_name
