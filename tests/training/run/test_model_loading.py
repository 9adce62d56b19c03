"""Models by name: what is there loads, and what is nowhere is a sentence."""

from argparse import Namespace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from tiny_pipelines import FAMILIES

from diffusers_align import embedded
from diffusers_align.training.run.model_loading import call_arguments, load_pipeline, training_scheduler


def load(name, **flags):
    given = {"pretrained_model_name_or_path": str(name), "mixed_precision": "no", "revision": None, "variant": None, "single_file_config": None}
    return load_pipeline(Namespace(**{**given, **flags}))


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0",
    "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1", "down_blocks.1.downsamplers.0.conv": "input_blocks.4.0.op",
    "down_blocks.2.resnets.0": "input_blocks.5.0", "down_blocks.2.attentions.0": "input_blocks.5.1",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1", "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1", "up_blocks.1.upsamplers.0.conv": "output_blocks.3.2.conv",
    "up_blocks.2.resnets.0": "output_blocks.4.0", "up_blocks.2.resnets.1": "output_blocks.5.0",
}  # fmt: skip
VAE = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "down_blocks.0.resnets": "down.0.block", "down_blocks.1.resnets": "down.1.block", "down_blocks.0.downsamplers.0": "down.0.downsample",
    "up_blocks.0.resnets": "up.1.block", "up_blocks.1.resnets": "up.0.block", "up_blocks.0.upsamplers.0": "up.1.upsample",
}  # fmt: skip


def renamed(name, names):
    for ours, theirs in names.items():
        name = name.replace(f"{ours}.", f"{theirs}.", 1) if name.startswith(f"{ours}.") or f".{ours}." in name else name
    return name


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """mini-sd in one file, under the names of the original Stable Diffusion code."""
    pipeline, tensors = DiffusionPipeline.from_pretrained(embedded.path("mini-sd")), {}
    for name, value in pipeline.unet.state_dict().items():
        inside = renamed(name, UNET)
        tensors[f"model.diffusion_model.{renamed(inside, RESNET) if '.resnets.' in name else inside}"] = value
    for name, value in pipeline.vae.state_dict().items():
        tensors[f"first_stage_model.{renamed(name, VAE)}"] = value
    for name, value in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path)
    return path, pipeline


def test_a_single_file_loads_with_the_configuration_of_a_pipeline_like_it(single_file):
    path, pipeline = single_file
    loaded = load(path, single_file_config=embedded.path("mini-sd"))
    assert isinstance(loaded, StableDiffusionPipeline)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(pipeline, part).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in getattr(loaded, part).state_dict().items()), part


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_single_file_without_a_configuration_says_what_it_needs(single_file, offline):
    with pytest.raises(FileNotFoundError, match="(?s)holds weights alone.*guessed by its tensors.*HF_HUB_OFFLINE is set.*--single_file_config"):
        load(single_file[0])
    with pytest.raises(FileNotFoundError, match="'nowhere/it'.*--single_file_config"):
        load(single_file[0], single_file_config="nowhere/it")


def test_a_single_file_that_is_something_else_is_named(offline, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="could not be loaded as a StableDiffusionPipeline.*--single_file_config"):
        load(tmp_path / "model.safetensors", single_file_config=embedded.path("mini-sd"))
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="may hold code"):
        load(tmp_path / "model.ckpt")
    (tmp_path / "broken.safetensors").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="no readable .safetensors file"):
        load(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("mini-sdd", FileNotFoundError, "No model 'mini-sdd': it is no embedded model .*Did you mean 'mini-sd'"),
        ("runs/deep/folder", FileNotFoundError, "No model 'runs/deep/folder'.*has not the form owner/name.*is empty|has: "),
        ("owner/name", FileNotFoundError, "No model 'owner/name': there is no such folder here, and from the Hub: HF_HUB_OFFLINE is set, and the cache"),
        ("mini-clip", ValueError, "embedded mini-clip is no pipeline to sample from; mini-sd and mini-sd3 are"),
    ],
)
def test_a_model_that_is_nowhere_is_a_sentence(name, error, message, offline):
    with pytest.raises(error, match=message):
        load(name)


def test_a_folder_that_is_no_pipeline_says_what_it_holds(tmp_path, offline):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no model_index.json.*it has model.safetensors. To load a single file, name it: .*it/model.safetensors"):
        load(tmp_path / "it")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="notes.txt is a file, but neither"):
        load(tmp_path / "notes.txt")


def test_a_script_of_the_other_kind_names_scripts_of_this_one():
    with pytest.raises(ValueError, match=r"StableDiffusion3Pipeline here is a flow-matching model.*train_flow_grpo.py.*FlowMatchSDEScheduler has no eta"):
        training_scheduler(FAMILIES["sd3"].build(), eta=1.0)
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline here is a diffusion model.*train_ddpo.py.*DDIMSDEScheduler has no noise_level"):
        training_scheduler(FAMILIES["sd15"].build(), noise_level=1.0)
    scripts = Path(__file__).parents[3] / "training_scripts"
    from diffusers_align.training.run.model_loading import ELSEWHERE

    named = {word.rstrip(",") for text in ELSEWHERE.values() for word in text.split() if word.rstrip(",").endswith(".py")}
    assert len(named) == 6 and all((scripts / name).is_file() for name in named)


def test_flags_that_the_call_does_not_take_are_left_out_and_said(caplog):
    class OwnGuidance(StableDiffusionPipeline):
        def __call__(self, prompt, num_inference_steps=4, max_guidance_scale=3.0, height=None, width=None):
            """As the pipeline of Stable Video Diffusion has it."""

    args = Namespace(num_inference_steps=3, guidance_scale=5.0, height=16, width=None, input_columns=None, call_kwargs={"max_guidance_scale": 2.0})
    pipeline = FAMILIES["sd15"].build()
    assert call_arguments(args, pipeline) == {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "max_guidance_scale": 2.0}
    assert caplog.messages == []
    own = OwnGuidance(**pipeline.components)
    assert call_arguments(args, own) == {"num_inference_steps": 3, "height": 16, "max_guidance_scale": 2.0}
    assert caplog.messages[-1] == "The call of OwnGuidance takes no such argument, so --guidance_scale has no effect."
    args.guidance_scale, args.eval_guidance_scale, args.eval_num_inference_steps = None, 7.0, 8
    assert call_arguments(args, own) == {"num_inference_steps": 3, "height": 16, "max_guidance_scale": 2.0}
    assert caplog.messages[-1] == "The call of OwnGuidance takes no such argument, so --eval_guidance_scale has no effect."
