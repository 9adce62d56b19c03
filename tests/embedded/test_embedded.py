"""The embedded models are small, load as they are, and know what they were taught."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import nn
from transformers import CLIPModel

from diffusers_align import embedded
from diffusers_align.data import load_prompts
from diffusers_align.embedded.teaching import make_scenes
from diffusers_align.rewards import load_reward

FAST = {"mini-sd3": {"max_sequence_length": 1}, "mini-sd": {}}
CLASSES = {"mini-sd3": StableDiffusion3Pipeline, "mini-sd": StableDiffusionPipeline}


@pytest.fixture(scope="module", params=list(FAST))
def samples(request):
    """64 samples with guidance of held-out prompts, and eight of one prompt."""
    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(embedded.path(request.param))
    pipeline.set_progress_bar_config(disable=True)
    prompts = [p.text for p in load_prompts("mini_heldout")][:24] + ["a fox"] * 8
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipeline(prompts, generator=generators, num_inference_steps=12, guidance_scale=3.0, output_type="pt", **FAST[request.param])[0]
    return images, prompts


@pytest.mark.parametrize("name", list(FAST))
def test_pipelines_load_in_float32_and_are_small(name):
    pipeline = DiffusionPipeline.from_pretrained(embedded.path(name))
    assert type(pipeline) is CLASSES[name]
    modules = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}
    assert {p.dtype for m in modules.values() for p in m.parameters()} == {torch.float32}
    denoiser = modules.get("unet", modules.get("transformer"))
    assert 1.5e6 <= sum(p.numel() for p in denoiser.parameters()) <= 4e6


def test_all_models_together_are_below_30_mb():
    files = [f for f in Path(embedded.path("mini-sd")).parent.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 30e6


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="mini-sd3"):
        embedded.path("mini-flux")


def test_samples_show_what_was_asked_for(samples):
    images, prompts = samples
    scores = load_reward("scene_score")(images, prompts)
    means = {name: float(values[~values.isnan()].mean()) for name, values in scores.items()}
    assert means["object"] > 0.3, f"chance is 0.03: {means}"
    assert means["color"] > 0.7, f"chance is 0.1: {means}"


def test_samples_of_one_prompt_differ(samples):
    foxes = samples[0][-8:].flatten(1)
    distances = torch.pdist(foxes) / foxes.shape[1] ** 0.5
    assert float(distances.min()) > 0.05


def test_mini_clip_finds_the_caption_of_a_scene():
    CLIPModel.from_pretrained(embedded.path("mini-clip"))
    clip = load_reward("clip_score", model=embedded.path("mini-clip"))
    images, truth, _ = make_scenes(40, seed=777)
    captions = [s.caption() for s in truth]
    with torch.no_grad():
        table = torch.stack([clip(images.float() / 255, [c] * len(images)) for c in captions], 1)
    right = table.diagonal()
    assert float((right[:, None] >= table).float().mean()) > 0.9
