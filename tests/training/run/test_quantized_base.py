"""`--base_quantization`: what diffusers is asked for, what is refused, and that a LoRA on a quantised base learns and fits the whole one."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from pydantic import ValidationError

from diffusers_align import Policy, embedded
from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.run import quantized_base
from diffusers_align.training.run.model_loading import load_pipeline
from diffusers_align.training.run.quantized_base import quantization, quantized_names

REQUIRED = {"prompts": "mini_train", "reward": "jpeg_compressibility", "output_dir": "out"}
CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 1}
has_torchao = importlib.util.find_spec("torchao") is not None


def args(kind, **others):
    given = {"pretrained_model_name_or_path": "mini-sd3", "revision": None, "variant": None, "mixed_precision": "no", "quantize_text_encoders": False}
    return SimpleNamespace(**{**given, "base_quantization": kind, **others})


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(quantized_base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="torchao_int8 takes torchao, which is not installed: run `pip install torchao`, or leave the flag out"):
        load_pipeline(args("torchao_int8"))
    with pytest.raises(ImportError, match="bnb_4bit takes bitsandbytes, which"):
        load_pipeline(args("bnb_4bit"))
    assert quantization(args("none"), "", torch.float32) == {}


def test_bitsandbytes_takes_a_gpu(monkeypatch):
    monkeypatch.setattr(quantized_base.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="on a GPU alone, and there is none. Take torchao_int8"):
        load_pipeline(args("bnb_8bit"))


def test_what_is_quantised_goes_by_diffusers_names():
    names = ["vae", "text_encoder", "text_encoder_2", "tokenizer", "transformer", "transformer_2", "unet"]
    assert quantized_names(names, False) == ["transformer", "transformer_2", "unet"]
    assert quantized_names(names, True) == ["text_encoder", "text_encoder_2", "transformer", "transformer_2", "unet"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"base_quantization": "torchao_int8"}, "needs --gradient_checkpointing: autograd keeps"),
        ({"base_quantization": "bnb_4bit", "shard_denoiser": True}, "packs them into bytes with scales: leave one out"),
        ({"base_quantization": "bnb_4bit", "pretrained_model_name_or_path": "a.safetensors"}, "convert the single file"),
        ({"base_quantization": "bnb_8bit", "quantize_text_encoders": True, "offload_text_encoders": True}, "in 8 bits cannot do"),
    ],
)
def test_flags_that_contradict_it_are_refused(flags, message):
    with pytest.raises(ValidationError, match=message):
        SamplingArguments(**{"pretrained_model_name_or_path": "mini-sd3", **REQUIRED, **flags})


@pytest.mark.skipif(not has_torchao, reason="torchao is not installed")
def test_a_lora_on_an_int8_base_learns_and_fits_the_whole_one(tmp_path):
    pipeline = load_pipeline(args("torchao_int8"))
    assert type(pipeline.transformer.transformer_blocks[0].attn.to_q.weight).__module__.startswith("torchao")
    policy, whole = Policy(pipeline, **CALL), Policy(DiffusionPipeline.from_pretrained(embedded.path("mini-sd3")), **CALL)
    condition = policy.condition(["a red fox", "a blue cat"], seeds=[0, 1])
    latents = torch.randn(2, *whole.rollout(["a"], seeds=[0]).final.shape[1:], generator=torch.Generator().manual_seed(0))
    times = torch.tensor([500.0, 700.0])

    def output(of):
        return of.predict(latents, times, of.condition(condition.prompts, seeds=[0, 1]))

    with torch.no_grad():
        clean = output(whole)
        assert 0 < (output(policy) - clean).norm() / clean.norm() < 0.05, "eight bits"
    target = clean + 0.3
    parameters = policy.add_lora(8)
    assert {p.dtype for p in parameters} == {torch.float32} and not any(p.requires_grad for n, p in pipeline.transformer.named_parameters() if "lora" not in n)
    optimizer, losses = torch.optim.AdamW(parameters, 3e-3), []
    for _ in range(20):
        loss = (output(policy) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    policy.save_lora(tmp_path)
    whole.pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        assert (output(whole) - target).square().mean() < 0.6 * losses[0]
