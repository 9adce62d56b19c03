"""The custom pipelines: loading them in every way that diffusers knows, best-of-n, search and particle steering on stock pipelines."""

import json
import sys

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from diffusers.utils import dynamic_modules_utils
from fake_hub import FakeHub
from PIL import Image
from tiny_pipelines import FAMILIES

from diffusers_align import DDIMSDEScheduler, FlowMatchSDEScheduler, Policy, embedded, sde_twin
from diffusers_align.algorithms import particle_steering as smc
from diffusers_align.files.paths import folder
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline, path, push
from diffusers_align.pipelines.particle_steering import Steering, _seeds
from diffusers_align.rewards import InvalidReward

torch.set_num_threads(1)
CLASSES = {"best_of_n": BestOfNPipeline, "particle_steering": ParticleSteeringPipeline}
MINI = {"num_inference_steps": 4, "guidance_scale": 3.0}


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def stacked(output):
    images = output[0]
    return torch.stack(list(images)) if isinstance(images, list) else images


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


@pytest.fixture(scope="module")
def pipes():
    """A family's pipeline and the arguments of its calls, by name; built once."""
    built = {}

    def pipe(name):
        if name not in built:
            built[name] = FAMILIES[name].build()
            built[name].set_progress_bar_config(disable=True)
        return built[name], FAMILIES[name].call

    return pipe


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


# --- best-of-n ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan", "sd15_img2img"])
def test_the_first_candidate_is_the_stock_pipelines_sample(name, pipes):
    pipe, call = pipes(name)
    for number, prompt in ((1, "a"), (2, ["a", "b"])):
        for make in (g, lambda: [g(i) for i in range(number)]):
            expected = stacked(pipe(prompt=prompt, generator=make(), output_type="pt", **call))
            one = BestOfNPipeline(pipe, brightness)(prompt, generator=make(), output_type="pt", num_candidates=1, **call)
            assert torch.equal(stacked(one), expected) and one.rewards.shape == (number, 1)
            torch.testing.assert_close(one.rewards[:, 0], brightness(expected, None))


@pytest.mark.parametrize("negative", [{}, {"negative_prompt": ["a cat", "red"]}])
def test_the_first_candidates_are_the_stock_pipelines_several_a_prompt(negative):
    pipe = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    call = {"num_images_per_prompt": 2, "num_inference_steps": 2, "max_sequence_length": 1, "output_type": "pt", **negative}
    prompts = ["two dogs on a blue background", "a cat on a red background"]
    one = BestOfNPipeline(pipe, brightness)(prompts, num_candidates=1, generator=g(), **call)
    assert torch.equal(one.images, pipe(prompts, generator=g(), **call).images) and one.rewards.shape == (4, 1)


def test_another_text_encoder_makes_other_images():
    """And an empty prompt is one."""
    pipe, call = FAMILIES["sd15"].build(), {**FAMILIES["sd15"].call, "output_type": "pt"}
    best = BestOfNPipeline(pipe, brightness)
    for _ in range(2):
        for prompt in ("", "a"):
            assert torch.equal(best(prompt, num_candidates=1, generator=g(), **call).images, pipe(prompt, generator=g(), **call).images)
        with torch.no_grad():
            for parameter in pipe.text_encoder.parameters():
                parameter.mul_(0.5)


def test_the_output_is_the_stock_one(pipes):
    pipe, call = pipes("sd15")
    best = BestOfNPipeline(pipe, brightness)
    torch.manual_seed(0)
    expected = pipe(["a"], num_images_per_prompt=2, **call)
    torch.manual_seed(0)
    found = best("a", num_images_per_prompt=2, num_candidates=1, **call)
    assert type(found) is type(expected) and all(isinstance(image, Image.Image) for image in found.images)
    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in expected.images]
    images, nsfw, rewards, chosen = best("a", num_candidates=2, return_dict=False, generator=g(), **call)
    assert isinstance(images[0], Image.Image) and nsfw is None and rewards.shape == (1, 2) and chosen.shape == (1,)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
@pytest.mark.parametrize("search", ["random", "zero_order"])
def test_more_candidates_hold_those_of_fewer_and_the_best_comes_back(search, name, pipes):
    pipe, call = pipes(name)
    best = BestOfNPipeline(pipe, brightness)
    options = {"generator": None, "output_type": "pt", "search": search, **call}
    large = best(["a", "b"], num_candidates=3, rounds=2, **(options | {"generator": g()}))
    small = best(["a", "b"], num_candidates=3, rounds=1, **(options | {"generator": g()}))
    split = best(["a", "b"], num_candidates=3, rounds=2, batch_size=3, **(options | {"generator": g()}))
    assert large.rewards.shape == (2, 6) and len(set(large.rewards.flatten().tolist())) == 12
    torch.testing.assert_close(large.rewards[:, :3], small.rewards)
    torch.testing.assert_close(large.rewards, split.rewards)
    assert large.chosen.tolist() == large.rewards.argmax(1).tolist()
    torch.testing.assert_close(brightness(stacked(large), None), large.rewards.amax(1))


def test_neighbours_stay_near_the_best_noise(pipes):
    pipe, call = pipes("sd3")
    best, started, forward = BestOfNPipeline(pipe, brightness), [], type(pipe.transformer).forward

    def listened(self, *args, **kwargs):
        started.append(kwargs["hidden_states"].clone())
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.transformer), "forward", listened)
        best("a", num_candidates=3, rounds=2, search="zero_order", cosine=0.9, batch_size=1, generator=g(), **call)
    found = best("a", num_candidates=3, generator=g(), **call)
    first = [x[0].flatten() for x in started[:: call["num_inference_steps"]]]  # of each call, without guidance's second row
    pivot = first[int(found.chosen)]
    near = [float(torch.cosine_similarity(pivot, x, dim=0)) for x in first[3:]]
    far = [float(torch.cosine_similarity(pivot, x, dim=0)) for x in first[:3] if x is not pivot]
    assert len(first) == 6 and min(near) > 0.8 and max(near) < 0.97 and max(map(abs, far)) < 0.5


def test_candidates_without_a_reward_are_passed_over_or_refused(pipes):
    pipe, call = pipes("sd15")

    def unsure(images, prompts, **columns):
        rewards = brightness(images, prompts)
        return torch.where(rewards == rewards.amax(), torch.nan, rewards)

    best = BestOfNPipeline(pipe, unsure)
    with pytest.raises(InvalidReward, match="unsure"):
        best("a", num_candidates=4, generator=g(), **call)
    found = best("a", num_candidates=4, on_invalid="mask", generator=g(), **call)
    assert found.rewards.isnan().any() and not found.rewards[0, found.chosen].isnan()


def test_columns_go_to_the_reward(pipes):
    pipe, call = pipes("sd15")

    def wanted(images, prompts, wish, **columns):
        assert len(wish) == len(prompts) == len(images)
        return torch.tensor([float(w == p) for w, p in zip(wish, prompts)]) + brightness(images, prompts)

    found = BestOfNPipeline(pipe, wanted)(["a", "b"], columns={"wish": ["a", "c"]}, num_candidates=2, num_images_per_prompt=2, generator=g(), **call)
    assert (found.rewards > 1).tolist() == [[True, True]] * 2 + [[False, False]] * 2


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("num_candidates must be a whole number, at least 1, got 0", {"num_candidates": 0}),
        ("batch_size must be a whole number, at least 1, or None, got -1", {"batch_size": -1}),
        ("random, zero_order", {"search": "beam"}),
        ("cosine must be a finite number, from 0 to 1, got 2.0", {"cosine": 2.0}),
        ("latents fix the initial noise", {"latents": torch.zeros(1, 4, 8, 8)}),
        ("Neither BestOfNPipeline nor StableDiffusionPipeline takes num_candidate", {"num_candidate": 3}),
        ("Give prompt", {"prompt": None}),
        ("2 outputs need as many generators, got 1", {"prompt": ["a", "b"], "generator": [g()]}),
        ("'wish' has 2 entries", {"columns": {"wish": [1, 2]}}),
        ("Give a reward", {"reward": None}),
    ],
)
def test_wrong_arguments_of_best_of_n_say_what_to_do(message, arguments, pipes):
    pipe, call = pipes("sd15")
    arguments = {"prompt": "a", "reward": brightness, **arguments}
    with pytest.raises(ValueError, match=message):
        BestOfNPipeline(pipe)(**arguments, **call)


def test_noise_has_no_neighbours_where_an_image_is_in_it(pipes):
    pipe, call = pipes("sd15_img2img")
    with pytest.raises(ValueError, match="does not start from noise alone"):
        BestOfNPipeline(pipe, brightness)("a", search="zero_order", rounds=2, **call)


# --- particles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan", "sd15_img2img"])
def test_without_a_reward_scale_particles_are_samples_of_the_sde(name, pipes):
    pipe, call = pipes(name)
    options = {"generator": g(), "output_type": "pt", "num_particles": 3, "reward_scale": 0.0, "ess_threshold": 1.0, "resample_every": 1}
    found = ParticleSteeringPipeline(pipe, brightness)(["a", "b"], returned="all", **options, **call)
    policy = Policy(FAMILIES[name].build(), **call)
    rollout = policy.rollout(["a"] * 3 + ["b"] * 3, seeds=_seeds(g(), 2, 3))
    assert torch.equal(stacked(found), policy.decode(rollout.final, rollout.condition))
    assert (found.ess > 3 - 1e-9).all() and (found.log_weights == 0).all() and found.chosen is None


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_steering_raises_the_reward_and_pays_exactly_what_is_owed(name, pipes):
    pipe, call = pipes(name)
    steer = ParticleSteeringPipeline(pipe, brightness)
    options = {"num_particles": 6, "resample_every": 1, "start": 0.0, "end": 1.0, "output_type": "pt", **call}
    base = steer(["a", "b"], reward_scale=0.0, generator=g(), **options)
    never = steer(["a", "b"], reward_scale=300.0, ess_threshold=0.0, generator=g(), **options)
    torch.testing.assert_close(never.rewards, base.rewards)
    torch.testing.assert_close(never.log_weights, 300.0 * base.rewards.double())
    torch.testing.assert_close(never.log_evidence, never.log_weights.exp().mean(1).log())
    steered = steer(["a", "b"], reward_scale=300.0, ess_threshold=1.0, generator=g(), **options)
    assert (steered.rewards.mean(1) > base.rewards.mean(1)).all() and (steered.ess < 6).all()
    assert not torch.equal(steered.log_evidence, never.log_evidence)
    torch.testing.assert_close(brightness(stacked(steered), None), steered.rewards.amax(1))
    assert steered.chosen.tolist() == steered.rewards.argmax(1).tolist()


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_particles_may_be_spread_over_calls(name, pipes):
    pipe, call = pipes(name)
    steer = ParticleSteeringPipeline(pipe, brightness)
    options = {"num_particles": 4, "reward_scale": 100.0, "resample_every": 1, "output_type": "pt", "returned": "sample", **call}
    whole, split = (steer(["a", "b"], generator=g(), batch_size=size, **options) for size in (None, 3))
    for key in ("rewards", "log_weights", "log_evidence", "ess"):
        torch.testing.assert_close(whole[key], split[key], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stacked(whole), stacked(split), rtol=1e-3, atol=1e-4)


def test_a_prompts_particles_do_not_depend_on_other_prompts(pipes):
    pipe, call = pipes("sd3")
    steer = ParticleSteeringPipeline(pipe, brightness)
    options = {"num_particles": 4, "reward_scale": 100.0, "ess_threshold": 1.0, "resample_every": 1, "output_type": "pt", **call}
    both = steer(["a", "b"], generator=[g(1), g(2)], **options)
    swapped = steer(["b", "a"], generator=[g(2), g(1)], **options)
    alone = steer("b", generator=[g(2)], **options)
    torch.testing.assert_close(both.log_weights[1:], alone.log_weights, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both.rewards.flip(0), swapped.rewards)
    never = steer(["a", "b"], generator=[g(1), g(2)], **(options | {"ess_threshold": 0.0}))
    assert (both.rewards != never.rewards).any(1).all()  # both were resampled


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_no_denoiser_call_is_made_twice(name, pipes):
    pipe, call = pipes(name)
    rows, model = [], getattr(pipe, "unet", None) or pipe.transformer
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        rows.append(len(args[0] if args else kwargs["hidden_states"]))
        return forward(self, *args, **kwargs)

    steer = ParticleSteeringPipeline(pipe, brightness)
    options = {"num_particles": 4, "reward_scale": 100.0, "generator": g(), **call}
    steer("a", **options)  # closed gates know their shapes from here on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", counted)
        steer("a", resample_every=1, start=0.0, end=1.0, **options)
    assert rows == [2 * 4] * call["num_inference_steps"]  # guidance doubles the rows


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_twisted_proposals_follow_the_reward(name, pipes):
    pipe, call = pipes(name)
    options = {"num_particles": 6, "ess_threshold": 0.0, "output_type": "pt", **call}
    steer = ParticleSteeringPipeline(pipe, brightness)
    base = steer("a", reward_scale=100.0, generator=g(), **options)
    ratios, proposal_log_ratio = [], smc.proposal_log_ratio
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smc, "proposal_log_ratio", lambda *a: ratios.append(proposal_log_ratio(*a)) or ratios[-1])
        twisted = steer("a", reward_scale=100.0, gradient=True, generator=g(), **options)
    assert twisted.rewards.mean() > base.rewards.mean()
    assert len(ratios) >= 2 and all((ratio != 0).all() for ratio in ratios)
    torch.testing.assert_close(twisted.log_weights[0], 100.0 * twisted.rewards[0].double() + sum(ratios))
    torch.testing.assert_close(base.log_weights, 100.0 * base.rewards.double())
    # A flat reward has no gradient: nothing moves, nothing is to be corrected.
    flat = steer("a", reward=lambda images, prompts, **_: 0 * brightness(images, prompts) + 0.5, gradient=True, generator=g(), returned="all", **options)
    plain = steer("a", reward_scale=0.0, generator=g(), returned="all", **options)
    assert torch.equal(stacked(flat), stacked(plain)) and torch.allclose(flat.log_weights, torch.tensor(5.0).double())
    with pytest.raises(ValueError, match="has no gradient"):
        steer("a", reward=lambda images, prompts, **_: brightness(images.detach(), prompts), gradient=True, generator=g(), **options)


def test_copies_take_their_gradient_along(pipes):
    pipe, call = pipes("sd3")
    shifts, copies, twist = [], [], smc.twist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smc, "twist", lambda *a: shifts.append(a) or twist(*a))
        ParticleSteeringPipeline(pipe, brightness)("a", num_particles=6, reward_scale=300.0, ess_threshold=1.0, gradient=True, generator=g(), **call)
    for mean, _, gradient in shifts:
        copies += [(i, j) for i in range(6) for j in range(i) if torch.equal(mean[i], mean[j])]
        assert all(torch.equal(gradient[i], gradient[j]) == torch.equal(mean[i], mean[j]) for i in range(6) for j in range(i))
    assert len(copies) > 2


def test_svdd_goes_on_with_the_best_candidate(pipes):
    pipe, call = pipes("sd3")
    steer = ParticleSteeringPipeline(pipe, brightness)
    options = {"generator": None, "output_type": "pt", **call}
    base = steer("a", num_particles=6, reward_scale=0.0, **(options | {"generator": g()}))
    greedy = steer("a", method="svdd", num_particles=6, **(options | {"generator": g()}))
    assert greedy.rewards.mean() > base.rewards.mean() and greedy.rewards.std() < base.rewards.std()
    one = steer("a", method="svdd", num_particles=1, returned="all", **(options | {"generator": g()}))
    alone = steer("a", num_particles=1, returned="all", **(options | {"generator": g()}))
    assert torch.equal(stacked(one), stacked(alone))
    assert greedy.log_evidence is None
    last = {"method": "svdd", "num_particles": 6, "returned": "sample", **options}
    cold = [steer("a", alpha=1e-9, **(last | {"generator": g(i)})) for i in range(3)]
    assert all(int(found.chosen) == int(found.rewards.argmax()) for found in cold)
    assert any(int(steer("a", alpha=1e9, **(last | {"generator": g(i)})).chosen) != int(found.rewards.argmax()) for i, found in enumerate(cold))


@pytest.mark.parametrize("output_type", ["pt", "np", "pil", "latent"])
def test_returned_particles_are_decoded_in_batches(output_type, pipes):
    pipe, call = pipes("sd15")
    decoded, decode = [], pipe.vae.decode
    options = {"num_particles": 3, "returned": "all", "output_type": output_type, **call}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda z, *a, **k: decoded.append(len(z)) or decode(z, *a, **k), raising=False)
        parts = ParticleSteeringPipeline(pipe, brightness)(["a", "b"], batch_size=2, generator=g(), **options)
        whole = ParticleSteeringPipeline(pipe, brightness)(["a", "b"], batch_size=2, return_dict=False, generator=g(), **options)
    assert max(decoded) == 2 and len(parts.images) == len(whole[0]) == 6
    assert type(parts.images) is type(whole[0]) and parts.nsfw_content_detected is whole[1] is None


def test_the_pipeline_is_left_as_it_was():
    pipe, call = FAMILIES["sd3"].build(), FAMILIES["sd3"].call
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.train().requires_grad_(True)
    next(pipe.transformer.parameters()).requires_grad_(False)
    scheduler, flags = pipe.scheduler, [p.requires_grad for p in pipe.transformer.parameters()]
    steer = ParticleSteeringPipeline(pipe, brightness)
    steer("a", num_particles=2, generator=g(), **call)
    with pytest.raises(RuntimeError, match="broken"):
        steer("a", reward=lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")), num_particles=2, **call)
    assert pipe.scheduler is scheduler and type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert [p.requires_grad for p in pipe.transformer.parameters()] == flags and all(m.training for m in pipe.transformer.modules())
    assert "prepare_latents" not in vars(pipe) and "encode_prompt" not in vars(pipe)


def test_a_particle_without_a_reward_has_weight_zero_or_stops_the_call(pipes):
    pipe, call = pipes("sd3")

    def half(images, prompts, **columns):
        rewards = brightness(images, prompts)
        return torch.where(rewards < rewards.median(), torch.nan, rewards)

    options = {"num_particles": 4, "generator": g(), **call}
    with pytest.raises(InvalidReward, match="half"):
        ParticleSteeringPipeline(pipe, half)("a", **options)
    found = ParticleSteeringPipeline(pipe, half)("a", on_invalid="mask", **options)
    lost = found.rewards.isnan()
    assert lost.any() and (found.log_weights[lost] == -torch.inf).all() and not found.rewards[0, found.chosen].isnan()
    with pytest.raises(InvalidReward, match="no reward at all"):
        ParticleSteeringPipeline(pipe, lambda images, prompts, **_: torch.full((len(images),), torch.nan))("a", on_invalid="mask", **options)


def test_samplers_without_noise_cannot_be_steered(pipes):
    pipe, call = pipes("sd15")
    steer, stock = ParticleSteeringPipeline(pipe, brightness), pipe.scheduler
    with pytest.raises(ValueError, match="noise_level"):
        steer("a", scheduler=sde_twin(stock, eta=0.0), **call)
    with pytest.raises(TypeError, match="no log-probabilities"):
        steer("a", scheduler=stock, **call)
    try:
        pipe.scheduler = LCMScheduler()
        with pytest.raises(ValueError, match="consistency sampler"):
            steer("a", **call)
    finally:
        pipe.scheduler = stock


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("reward_scale must be a finite number, at least 0, got -1.0", {"reward_scale": -1.0}),
        ("reward_scale must be a finite number, at least 0, got nan", {"reward_scale": float("nan")}),
        ("smc, svdd", {"method": "greedy"}),
        ("difference, max, add", {"potential": "sum"}),
        ("systematic, stratified", {"resampler": "residual"}),
        ("best, sample, all", {"returned": "first"}),
        ("at least 1", {"num_particles": 0}),
        ("ess_threshold must be", {"ess_threshold": 2.0}),
        ("start must not lie behind end", {"start": 0.9, "end": 0.1}),
        ("alpha must be a finite number, at least 0", {"alpha": -1.0}),
        ("alpha must be", {"alpha": float("nan")}),
        ("batch_size must be", {"batch_size": 0}),
        ("gradient=True is for", {"method": "svdd", "gradient": True}),
        ("sde_twin.pipe.scheduler, eta=0.3", {"eta": 0.3}),
        ("callback_on_step_end would see", {"callback_on_step_end": lambda *a: {}}),
    ],
)
def test_wrong_arguments_of_steering_say_what_to_do(message, arguments, pipes):
    pipe, call = pipes("sd15")
    with pytest.raises(ValueError, match=message):
        ParticleSteeringPipeline(pipe, brightness)("a", **arguments, **call)


def test_particles_are_weighed_where_the_paper_weighs_them():
    assert Steering().stops([True] * 100) == [20, 40, 60, 80]
    assert Steering(resample_every=2, start=0.0, end=1.0).stops([True] * 5) == [1, 3]
    # Behind the last noise copies could not part.
    assert Steering(resample_every=1, start=0.0, end=1.0).stops([True, True, True, False]) == [1, 2]
    assert Steering(method="svdd").stops([True] * 4) == Steering(gradient=True).stops([True] * 4) == [1, 2, 3]


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
