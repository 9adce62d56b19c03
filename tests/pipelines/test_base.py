"""Pipelines around stock pipelines: loading them in every way that diffusers knows, and the embedded models."""

import json
import sys

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from fake_hub import FakeHub
from tiny_pipelines import FAMILIES
from wrapping import brightness, g

from diffusers_align import DDIMSDEScheduler, FlowMatchSDEScheduler, embedded
from diffusers_align.files.paths import folder
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline, path, push

CLASSES = {"best_of_n": BestOfNPipeline, "particle_steering": ParticleSteeringPipeline}
MINI = {"num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(autouse=True)
def cache_of_modules(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.getbasetemp() / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a saved family, by name."""
    folders = {}

    def save(name):
        if name.startswith("mini"):
            return embedded.path(name)
        if name not in folders:
            folders[name] = str(tmp_path_factory.mktemp(name))
            FAMILIES[name].build().save_pretrained(folders[name])
        return folders[name]

    return save


# --- loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, name", [*(("best_of_n", name) for name in ("sd15", "sdxl", "sd3", "flux", "wan", "mini-sd")), ("particle_steering", "mini-sd3")]
)
def test_a_checkpoint_loads_as_its_own_stock_pipeline_inside(file, name, saved, monkeypatch, tmp_path):
    monkeypatch.chdir(folder("pipelines").parent)
    stock = DiffusionPipeline.from_pretrained(saved(name))
    by_path = DiffusionPipeline.from_pretrained(saved(name), custom_pipeline=f"pipelines/{file}.py", trust_remote_code=True)
    installed = DiffusionPipeline.from_pretrained(saved(name), custom_pipeline=path(file), trust_remote_code=True, dtype=torch.bfloat16, reward=brightness)
    own = CLASSES[file].from_pretrained(saved(name))
    for pipe in (by_path, installed, own):
        assert type(pipe) is CLASSES[file] and type(pipe.pipeline) is type(stock)
        assert {n: type(c) for n, c in pipe.components.items()} == {n: type(c) for n, c in stock.components.items()}
        options = {k: v for k, v in stock.config.items() if not k.startswith("_")}
        assert {k: v for k, v in pipe.config.items() if not k.startswith("_")} == options
    assert installed.dtype == torch.bfloat16 and own.dtype == torch.float32 and installed.reward is brightness
    assert installed.to(torch.float32) is installed and installed.pipeline.dtype == torch.float32
    by_path.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == type(stock).__name__
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(stock)


def test_components_can_be_given_or_left_out_at_loading(saved):
    scheduler = DDIMScheduler(clip_sample=False)
    for load in (DiffusionPipeline.from_pretrained, BestOfNPipeline.from_pretrained):
        options = {} if load == BestOfNPipeline.from_pretrained else {"custom_pipeline": path("best_of_n"), "trust_remote_code": True}
        pipe = load(saved("sd15"), scheduler=scheduler, safety_checker=None, requires_safety_checker=False, **options)
        assert pipe.scheduler is scheduler and pipe.safety_checker is None and pipe.config.requires_safety_checker is False


def test_the_file_is_found_by_name():
    assert path("best_of_n") == str(folder("pipelines") / "best_of_n.py")
    with pytest.raises(FileNotFoundError, match="best_of_n.*particle_steering"):
        path("nothing")


def test_diffusers_asks_for_trust(saved):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(saved("sd15"), custom_pipeline=path("best_of_n"))


def test_a_repository_of_the_hub_serves_the_file_that_was_pushed(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with FakeHub().running() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        repo = push("best_of_n", "steering", token="hf_secret")
        assert repo == "tester/steering" and b"BestOfNPipeline" in hub.repositories[repo]["pipeline.py"]
        pipe = DiffusionPipeline.from_pretrained(saved("sd3"), custom_pipeline=repo, trust_remote_code=True, cache_dir=tmp_path)
    assert type(pipe) is BestOfNPipeline and type(pipe.pipeline).__name__ == "StableDiffusion3Pipeline"


def test_a_loaded_pipeline_is_wrapped_as_it_is():
    pipe = FAMILIES["sd15"].build().to(torch.bfloat16)
    for wrapped in (BestOfNPipeline(pipe), BestOfNPipeline.from_pipe(pipe, reward=brightness), ParticleSteeringPipeline(BestOfNPipeline(pipe))):
        assert wrapped.pipeline is pipe and wrapped.unet is pipe.unet and wrapped.dtype == torch.bfloat16
    wrapped.scheduler = scheduler = DDIMScheduler()
    assert pipe.scheduler is scheduler and "scheduler" not in vars(wrapped)
    wrapped.load_lora_weights, wrapped.vae_scale_factor  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        wrapped.nothing  # noqa: B018
    with pytest.raises(TypeError, match="wraps a loaded pipeline"):
        BestOfNPipeline("a name")
    with pytest.raises(TypeError, match="wraps a loaded pipeline"):
        DiffusionPipeline.from_pipe(pipe, custom_pipeline=path("best_of_n"), trust_remote_code=True)
    with pytest.raises(TypeError, match="takes no components, got unet"):
        BestOfNPipeline(pipe, unet=pipe.unet)


def test_checkpoints_that_cannot_be_built_say_why(saved, tmp_path):
    index = json.loads((FAMILIES["sd15"].build().save_pretrained(tmp_path) or tmp_path / "model_index.json").read_text())
    for change, message in (({"_class_name": "MyPipeline"}, "'MyPipeline', which is no pipeline of diffusers"), ({"unet": None}, "has no unet")):
        (tmp_path / "model_index.json").write_text(json.dumps({k: v for k, v in {**index, **change}.items() if v is not None}))
        with pytest.raises(ValueError, match=message):
            BestOfNPipeline.from_pretrained(tmp_path)


# --- particles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, call", [pytest.param("mini-sd", MINI, marks=pytest.mark.slow), ("mini-sd3", MINI | {"max_sequence_length": 1})])
def test_the_embedded_models_paint_more_of_what_is_asked(name, call):
    pipe = DiffusionPipeline.from_pretrained(embedded.path(name))
    pipe.set_progress_bar_config(disable=True)
    prompts = ["two dogs on a blue background", "a cat on a red background"]
    best = BestOfNPipeline(pipe, reward="scene_score")(prompts, num_candidates=6, generator=g(), **call)
    assert (best.rewards.amax(1) > best.rewards[:, 0]).any()
    steer = ParticleSteeringPipeline(pipe, reward="scene_score")
    options = {"num_particles": 6, "resample_every": 1, "start": 0.0, "end": 1.0, **call}
    base, steered = (steer(prompts, reward_scale=scale, generator=g(), **options) for scale in (0.0, 20.0))
    assert steered.rewards.mean() > base.rewards.mean()
    kind = DDIMSDEScheduler if name == "mini-sd" else FlowMatchSDEScheduler
    assert not isinstance(pipe.scheduler, kind)
