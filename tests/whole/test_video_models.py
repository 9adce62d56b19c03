"""Training scripts on tiny Wan models: two denoisers in one run, one folder, one call; and a first frame of each sample's own."""

import json

import diffusers
import pytest
import torch
from diffusers import ModularPipeline
from safetensors.torch import load_file
from script_tools import rows, run_script, write_task

from diffusers_align import Policy, load_lora, lora
from diffusers_align.driving.denoisers import denoisers
from diffusers_align.files.lora_finder import WEIGHTS
from tests.families.cases.modular_videos import modular_two
from tests.families.cases.wan import from_pictures, two_transformers
from tests.families.video_parts import picture

TINY = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0, "num_eval_samples": 2, "num_validation_images": 2, "learning_rate": 1e-2}
GROUPS = {"num_prompts_per_epoch": 2, "group_size": 2, "kl_weight": 0}
CALL = {"num_frames": 5, "max_sequence_length": 32}


def write_classic(folder):
    two_transformers().save_pretrained(folder)


def write_modular(folder):
    modular_two(diffusers.Wan22ModularPipeline).save_pretrained(str(folder), overwrite_modular_index=True)


def read_classic(folder):
    return diffusers.DiffusionPipeline.from_pretrained(folder)


def read_modular(folder):
    pipe = ModularPipeline.from_pretrained(str(folder))
    pipe.load_components()
    return pipe


KINDS = {"classic": (write_classic, read_classic, CALL), "modular": (write_modular, read_modular, {**CALL, "negative_prompt": ""})}


@torch.no_grad()
def outputs(pipeline):
    """Of each denoiser on the same latents."""
    found = {}
    for name, denoiser in denoisers(pipeline).items():
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, denoiser.config.in_channels, 2, 4, 4, generator=generator)
        texts = torch.randn(1, 4, denoiser.config.text_dim, generator=generator)
        found[name] = denoiser(latents, torch.tensor([500.0]), texts, return_dict=False)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_denoisers_are_trained_saved_and_loaded_together(kind, tmp_path, monkeypatch, capsys):
    write, read, call = KINDS[kind]
    write(tmp_path / "base")
    trained, save = {}, Policy.save_lora
    monkeypatch.setattr(Policy, "save_lora", lambda policy, folder: (trained.update(outputs(policy.pipeline)), save(policy, folder)))
    flags = {**TINY, **GROUPS, "pretrained_model_name_or_path": tmp_path / "base", "call_kwargs": json.dumps(call)}
    run = run_script("flow_grpo", tmp_path / "run", write_task(tmp_path), **flags)
    assert rows(run)[0]["ratio_error"] == 0
    for file in (run / WEIGHTS, run / "transformer_2" / WEIGHTS):
        assert max(float(value.abs().max()) for key, value in load_file(file).items() if "lora_B" in key) > 0

    base, one_call, two_calls = (read(tmp_path / "base") for _ in range(3))
    load_lora(one_call, run)
    lines = lora.stock_lines(two_calls, denoisers(two_calls), str(run))
    assert len(lines) == 2 and all(line in capsys.readouterr().out for line in lines[:1])
    for line in lines:
        exec(line, {"pipe": two_calls})
    before, after, stock = outputs(base), outputs(one_call), outputs(two_calls)
    assert list(trained) == ["transformer", "transformer_2"] == list(after)
    for name in trained:
        assert not torch.equal(before[name], trained[name]), f"{name} learned nothing"
        assert torch.allclose(after[name], trained[name], atol=1e-6) and torch.equal(after[name], stock[name])


FIRST_FRAME = """
from PIL import Image

seen = []


def kept(videos, prompts, image, **columns):
    assert videos.ndim == 5 and all(isinstance(picture, Image.Image) for picture in image)
    seen.append([picture.getpixel((0, 0)) for picture in image])
    return videos.flatten(1).mean(1)
"""


@pytest.mark.slow
def test_image_to_video_trains_on_first_frames_of_each_samples_own(tmp_path):
    from_pictures().save_pretrained(tmp_path / "base")
    for i in range(2):
        picture(flipped=bool(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "it moves", "image": f"{i}.png"}) + "\n" for i in range(2)))
    (tmp_path / "rewards.py").write_text(FIRST_FRAME)
    flags = {**TINY, **GROUPS, "pretrained_model_name_or_path": tmp_path / "base", "call_kwargs": json.dumps(CALL), "input_columns": ("image",)}
    flags["reward"] = f"{tmp_path / 'rewards.py'}:kept"
    with pytest.raises(ValueError, match="refuses 2 samples with image of their own: .*give them one by one .*--train_batch_size 1"):
        run_script("flow_grpo", tmp_path / "run", tmp_path, **flags)
    run = run_script("flow_grpo", tmp_path / "run", tmp_path, **flags, train_batch_size=1)
    (row,) = rows(run)
    assert row["ratio_error"] == 0 and row["grad_norm"] > 0

    policy = Policy(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "base"), **{**CALL, "height": 16, "width": 16, "num_inference_steps": 2})
    own, others = (policy.rollout(["it moves"], seeds=[0], per_sample={"image": [picture(flipped=flipped)]}).final for flipped in (False, True))
    assert not torch.allclose(own, others), "equal noise, another first frame"
