"""Preference flow matching: flows with closed forms, couplings that keep prompts, the pipeline, and the script on a closed generator's images."""

import hashlib
import json
import math
import shlex

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from fake_hub import FakeHub
from PIL import Image
from safetensors.torch import load_file
from script_runs import assert_same_state
from script_tools import RECIPES, load_script, rows
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_align import embedded
from diffusers_align.algorithms.preference_flow_matching import COUPLINGS, SOLVERS, couple, interpolate, pfm_loss, transport, transport_plan
from diffusers_align.data import LazyImage
from diffusers_align.files.paths import front_door
from diffusers_align.pipelines.preference_flow import PreferenceFlowPipeline
from diffusers_align.training.checkpoints.state_files import read_state
from diffusers_align.training.offline import flow_pairs
from diffusers_align.training.report.model_card import public
from diffusers_align.training.report.pictures import to_pil

torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the line and its loss -------------------------------------------------------------------------------------------------


def test_the_ends_of_the_line_are_the_data_exactly():
    y0, y1 = normal(3, 2, 4).float(), normal(3, 2, 4, seed=1).float() * 1e3
    assert torch.equal(interpolate(y0, y1, torch.zeros(3)), y0) and torch.equal(interpolate(y0, y1, torch.ones(3)), y1)


def test_each_sample_has_its_own_time_and_noise_is_added():
    y0, y1, noise = torch.zeros(2, 1, 3), torch.ones(2, 1, 3), torch.full((2, 1, 3), 2.0)
    point = interpolate(y0, y1, torch.tensor([0.25, 0.75]), sigma=0.5, noise=noise)
    assert torch.equal(point[:, 0, 0], torch.tensor([1.25, 1.75]))


def test_the_loss_is_the_mean_square_to_the_difference():
    y0, y1, velocity = normal(4, 2, 3), normal(4, 2, 3, seed=1), normal(4, 2, 3, seed=2)
    torch.testing.assert_close(pfm_loss(velocity, y0, y1), torch.stack([((velocity[i] - y1[i] + y0[i]) ** 2).sum() / 6 for i in range(4)]))
    assert torch.equal(pfm_loss(y1 - y0, y0, y1), torch.zeros(4, dtype=torch.float64))


# --- solvers against closed forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("iterations, strength", [(1, 1.0), (3, 1.0), (2, 0.5)])
def test_a_constant_field_shifts_by_passes_times_strength(solver, iterations, strength):
    y, shift = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -4.0]])
    moved = transport(lambda t, y: shift, y, num_steps=1, solver=solver, iterations=iterations, strength=strength)
    torch.testing.assert_close(moved, y + iterations * strength * shift, rtol=0, atol=1e-6)
    if solver == "euler" and strength == 1:
        assert torch.equal(moved, y + iterations * shift)


# dy/dt = a y + b t: an exponential and a field that depends on time
def linear(t, y):
    return 1.3 * y + 0.7 * t


def linear_flow(y, t=1.0, a=1.3, b=0.7):
    return math.exp(a * t) * (y + b / a**2) - b / a * t - b / a**2


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_solvers_converge_at_their_order(solver, order):
    y = normal(5, 2)
    errors = [(transport(linear, y, num_steps=n, solver=solver) - linear_flow(y)).abs().max() for n in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_rk4_is_the_closed_form_also_part_of_the_way():
    y = normal(5, 2)
    for strength in (0.3, 1.0):
        assert (transport(linear, y, num_steps=50, solver="rk4", strength=strength) - linear_flow(y, strength)).abs().max() < 1e-6


@pytest.mark.parametrize("strength, iterations", [(1.0, 1), (0.6, 1), (1.0, 2)])
def test_the_reversed_flow_is_the_inverse(strength, iterations):
    y, how = normal(5, 2), {"num_steps": 10, "solver": "rk4", "strength": strength, "iterations": iterations}
    there = transport(linear, y, **how)
    assert (there - y).abs().max() > 0.1
    assert (transport(linear, there, **how, reverse=True) - y).abs().max() < 1e-4


def test_strength_0_is_the_identity_and_asks_nothing():
    y = normal(2, 3)
    assert transport(lambda t, y: pytest.fail("the field was evaluated"), y, strength=0.0) is y


def test_the_field_sees_the_times_of_the_solver():
    times, count = [], []
    transport(lambda t, y: times.append(t) or 0 * y, normal(1, 1), num_steps=2, solver="heun", strength=0.5, on_step=lambda: count.append(1))
    assert times == [0.0, 0.25, 0.25, 0.5] and len(count) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"solver": "dopri5"}, "euler, heun, rk4"),
        ({"strength": 1.5}, "iterations to go further"),
        ({"num_steps": 0}, "got 0 and 1"),
        ({"iterations": 0}, "10 and 0"),
    ],
)
def test_transport_refuses_what_makes_no_sense(flags, message):
    with pytest.raises(ValueError, match=message):
        transport(linear, normal(1, 1), **flags)


def gaussian_field(mean0, mean1, cov):
    """The exact field of jointly Gaussian (y0, y1) with covariance `cov` (2, 2): E[y1 - y0 | y_t]."""

    def field(t, y):
        weights = torch.tensor([1 - t, t], dtype=torch.float64)
        gain = (torch.tensor([-1.0, 1.0], dtype=torch.float64) @ cov @ weights) / (weights @ cov @ weights)
        return mean1 - mean0 + gain * (y - (1 - t) * mean0 - t * mean1)

    return field


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.99])
def test_gaussian_pairs_flow_along_the_monotone_map_whatever_their_coupling(correlation):
    cov = torch.tensor([[1.0, 2 * correlation], [2 * correlation, 4.0]], dtype=torch.float64)
    y = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    moved = transport(gaussian_field(0.5, 2.0, cov), y, num_steps=50, solver="rk4")
    torch.testing.assert_close(moved, 2.0 + 2 * (y - 0.5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_every_coupling_learns_the_monotone_map(coupling):
    """Losers and winners of pairs of normals: min and max. The field is fitted in bins of y_t at each time that the solver asks for."""
    both = normal(10_000, 2).sort(dim=1).values
    y0, y1 = both[:, :1], both[:, 1:]
    index = couple(coupling, y0, y1, [i // 50 for i in range(len(y0))], generator=torch.Generator().manual_seed(0))
    edges = torch.linspace(-3.5, 3.5, 71, dtype=torch.float64)

    def field(t, y):
        point = interpolate(y0, y1[index], torch.full((len(y0),), t))[:, 0]
        bins, velocity = torch.bucketize(point, edges), (y1[index] - y0)[:, 0]
        sums = torch.zeros(72, 2, dtype=torch.float64).index_add(0, bins, torch.stack([velocity, torch.ones_like(velocity)], 1))
        return (sums[:, 0] / sums[:, 1].clamp(min=1))[torch.bucketize(y[:, 0], edges)][:, None]

    where = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    moved = transport(field, y0.quantile(where)[:, None], num_steps=40, solver="euler")
    assert (moved[:, 0] - y1.quantile(where)).abs().max() < 0.1


# --- couplings -------------------------------------------------------------------------------------------------------------


def test_the_default_pairs_rows_and_the_others_stay_within_prompts():
    y0, y1, prompts = normal(60, 2), normal(60, 2, seed=1), [f"prompt {i % 4}" for i in range(60)]
    assert torch.equal(couple("paired", y0, y1), torch.arange(60))
    for coupling in ("independent", "ot"):
        index = couple(coupling, y0, y1, prompts, generator=torch.Generator().manual_seed(0))
        assert [prompts[i] for i in index.tolist()] == prompts and not torch.equal(index, torch.arange(60))


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_without_prompts_only_the_pairs_themselves_are_kept(coupling):
    with pytest.raises(ValueError, match="those of other prompts"):
        couple(coupling, normal(4, 2), normal(4, 2))
    with pytest.raises(ValueError, match="of each of the 4 pairs"):
        couple(coupling, normal(4, 2), normal(4, 2), ["a"])


def test_transport_across_prompts_would_mix_them():
    """Two prompts that want opposite shifts of the same sources: one transport for both follows the distance, not the prompt."""
    y0, prompts = normal(200, 1), ["left", "right"] * 100
    y1 = y0 + torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(100)[:, None]
    mixed = couple("ot", y0, y1, ["any"] * 200, generator=torch.Generator().manual_seed(0))
    assert sum(prompts[i] == prompt for i, prompt in zip(mixed.tolist(), prompts)) < 150
    kept = couple("ot", y0, y1, prompts, generator=torch.Generator().manual_seed(0))
    assert all(prompts[i] == prompt for i, prompt in zip(kept.tolist(), prompts))


def test_the_plan_is_the_assignment_of_least_cost():
    y0, target = normal(6, 2), torch.tensor([3, 1, 0, 5, 4, 2])
    y1 = (y0 + 0.01 * normal(6, 2, seed=1))[target.argsort()]
    assert torch.equal(transport_plan(y0, y1, regularization=0.01).argmax(1), target)
    plan = transport_plan(normal(30, 2), normal(30, 2, seed=1))
    torch.testing.assert_close(plan.sum(1), torch.ones(30, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.ones(30, dtype=torch.float64), atol=0.05, rtol=0)
    assert torch.equal(transport_plan(torch.zeros(2, 1), torch.zeros(2, 1)), torch.full((2, 2), 0.5, dtype=torch.float64)), "all the same: no division by 0"


def test_unknown_couplings_are_named():
    with pytest.raises(ValueError, match="paired, independent, ot"):
        couple("exact", normal(2, 2), normal(2, 2))


# --- the pipeline ----------------------------------------------------------------------------------------------------------


def conditional_field(**config):
    torch.manual_seed(0)
    types = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    size = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    return UNet2DConditionModel(**{"in_channels": 4, "out_channels": 4, "cross_attention_dim": 96, **types, **size, **config})


def pixel_field(**config):
    torch.manual_seed(0)
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(**{"in_channels": 3, "out_channels": 3, **types, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, **config})


def vae():
    return AutoencoderKL.from_pretrained(embedded.path("mini-sd"), subfolder="vae")


@pytest.fixture(scope="module")
def text():
    clip = embedded.path("mini-clip")
    return {"text_encoder": CLIPTextModel.from_pretrained(clip), "tokenizer": CLIPTokenizer.from_pretrained(clip)}


@pytest.fixture(scope="module")
def latent_flow(text):
    pipe = PreferenceFlowPipeline(conditional_field(), vae(), **text)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pixel_flow():
    pipe = PreferenceFlowPipeline(pixel_field())
    pipe.set_progress_bar_config(disable=True)
    return pipe


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "two dogs on a red background"]


def run_flow(pipe, images=IMAGES, prompt=PROMPTS, **call):
    return pipe(images, prompt, **{"num_inference_steps": 2, "output_type": "pt", **call}).images


def test_strength_0_gives_the_images_back_bit_for_bit(latent_flow, pixel_flow):
    for pipe in (latent_flow, pixel_flow):
        assert torch.equal(run_flow(pipe, strength=0.0), IMAGES)
        picture = to_pil(IMAGES[0])
        assert pipe(picture, "a cat", strength=0.0).images[0].tobytes() == picture.tobytes()


def test_the_call_is_the_flow_between_encoding_and_decoding(latent_flow):
    embeds = latent_flow.encode_prompt(PROMPTS)
    y = latent_flow.encode(IMAGES)
    for t in (0.0, 0.25):
        with torch.no_grad():
            y = y + 0.25 * latent_flow.velocity(torch.full((2,), t), y, embeds)
    call = {"solver": "euler", "strength": 0.5}
    assert torch.equal(run_flow(latent_flow, output_type="latent", **call), y)
    with torch.no_grad():
        assert torch.equal(run_flow(latent_flow, **call), latent_flow.decode(y))


def test_the_prompt_and_the_time_matter(latent_flow):
    assert not torch.equal(run_flow(latent_flow), run_flow(latent_flow, prompt=PROMPTS[::-1]))
    y, embeds = latent_flow.encode(IMAGES), latent_flow.encode_prompt(PROMPTS)
    assert not torch.equal(latent_flow.velocity(torch.tensor([0.0, 0.0]), y, embeds)[1], latent_flow.velocity(torch.tensor([0.0, 0.9]), y, embeds)[1])


def test_latents_have_the_scale_and_shift_of_the_autoencoder(latent_flow):
    latents = latent_flow.encode(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(latents, latent_flow.vae.encode(2 * IMAGES - 1).latent_dist.mode() * 0.4998)
    shifted = PreferenceFlowPipeline(conditional_field(), vae(), latent_flow.text_encoder, latent_flow.tokenizer)
    shifted.vae.register_to_config(shift_factor=0.5)
    torch.testing.assert_close(shifted.encode(IMAGES), latents - 0.5 * 0.4998)
    torch.testing.assert_close(shifted.decode(shifted.encode(IMAGES)), latent_flow.decode(latents))


def test_pixels_are_their_own_space_and_the_reversed_flow_undoes_the_flow(pixel_flow):
    assert torch.equal(pixel_flow.encode(IMAGES), 2 * IMAGES - 1)
    inside = IMAGES / 2 + 0.25
    moved = run_flow(pixel_flow, inside, None, solver="rk4", strength=0.1)
    assert (moved - inside).abs().max() > 1e-3 and moved.min() > 0 and moved.max() < 1, "not clamped"
    assert (run_flow(pixel_flow, moved, None, solver="rk4", strength=0.1, reverse=True) - inside).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(32, 32), (30, 33), (17, 8)])
def test_any_size_comes_back_in_its_size(latent_flow, size):
    images = IMAGES[..., : size[0], :].repeat(1, 1, 1, 2)[..., : size[1]]
    assert run_flow(latent_flow, images).shape == images.shape
    assert run_flow(latent_flow, images, height=16, width=24).shape[-2:] == (16, 24)


def test_pil_in_pil_out_one_prompt_for_all_and_a_progress_bar(latent_flow, capfd):
    pictures = [to_pil(image) for image in IMAGES]
    latent_flow.set_progress_bar_config(disable=False)
    try:
        out = latent_flow(pictures, "a cat", num_inference_steps=2, iterations=2)
    finally:
        latent_flow.set_progress_bar_config(disable=True)
    assert [image.size for image in out.images] == [(32, 32)] * 2 and isinstance(out.images[0], Image.Image)
    assert "4/4" in capfd.readouterr().err
    assert isinstance(latent_flow(pictures, "a cat", num_inference_steps=1, return_dict=False), tuple)


def test_the_pipeline_refuses_what_does_not_fit(text):
    with pytest.raises(ValueError, match="sees the prompt: pass the text_encoder"):
        PreferenceFlowPipeline(conditional_field(), vae())
    with pytest.raises(ValueError, match="does not see the prompt: leave out the text_encoder"):
        PreferenceFlowPipeline(pixel_field(), **text)
    with pytest.raises(ValueError, match="3 to 3 channels, .* has 4: the latents"):
        PreferenceFlowPipeline(pixel_field(), vae())
    with pytest.raises(ValueError, match="4 to 4 channels, .* has 3: pixels"):
        PreferenceFlowPipeline(conditional_field(), **text)


def test_the_number_of_prompts_is_checked(pixel_flow):
    with pytest.raises(ValueError, match="2 images need as many prompts, or one for all, got 3"):
        run_flow(pixel_flow, prompt=["a", "b", "c"])
    assert torch.equal(run_flow(pixel_flow, prompt=["a"]), run_flow(pixel_flow, prompt="a"))


def test_images_that_would_be_misread_are_refused(pixel_flow):
    small = torch.rand(3, 16, 32)
    with pytest.raises(ValueError, match=r"2 sizes .*\(16, 32\), \(32, 32\).*height and width"):
        pixel_flow([IMAGES[0], small])
    with pytest.raises(ValueError, match="2 sizes"):
        pixel_flow([to_pil(IMAGES[0]), to_pil(small)])
    assert len(pixel_flow([to_pil(IMAGES[0]), to_pil(small)], height=32, width=32, num_inference_steps=1).images) == 2
    for wrong in (IMAGES * 2 - 1, (IMAGES * 255).byte(), (IMAGES * 255).byte().permute(0, 2, 3, 1).numpy(), IMAGES * torch.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\], got"):
            pixel_flow(wrong)


@pytest.mark.parametrize("how", ["class", "front door", "by name in its own folder"])
def test_saved_and_loaded_it_is_the_same(latent_flow, tmp_path, how):
    latent_flow.save_pretrained(tmp_path)
    assert list((tmp_path / "vector_field").glob("*.safetensors")) and not list(tmp_path.rglob("*.bin"))
    if how == "class":
        loaded = PreferenceFlowPipeline.from_pretrained(tmp_path)
    else:
        file = front_door("pipelines", "preference_flow")
        (tmp_path / file.name).write_text(file.read_text())
        custom = str(file) if how == "front door" else file.stem
        loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=custom, trust_remote_code=True)
    assert type(loaded) is PreferenceFlowPipeline
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run_flow(loaded), run_flow(latent_flow))


def test_parts_that_are_absent_stay_absent(pixel_flow, tmp_path):
    pixel_flow.save_pretrained(tmp_path)
    loaded = PreferenceFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.vae is None and loaded.text_encoder is None and torch.equal(run_flow(loaded), run_flow(pixel_flow))


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


def test_pairs_split_by_prompt_and_both_sides_have_some():
    pairs = [{"prompt": f"p{i % 5}", "n": i} for i in range(20)]
    kept, held_out = flow_pairs.split_by_prompt(pairs, 0.4, 0)
    assert len({row["prompt"] for row in held_out}) == 2 and not {row["prompt"] for row in kept} & {row["prompt"] for row in held_out}
    assert len(kept) + len(held_out) == 20 and flow_pairs.split_by_prompt(pairs, 0.0, 0) == (pairs, [])
    assert {tuple(sorted({row["prompt"] for row in flow_pairs.split_by_prompt(pairs, 0.4, seed)[1]})) for seed in range(5)} != 1
    with pytest.raises(ValueError, match="Of 5 prompts, 5 would be held out"):
        flow_pairs.split_by_prompt(pairs, 1.0, 0)


@pytest.mark.parametrize(
    "flags, message",
    [({"dataset_name": None}, "--dataset_name is required"), ({"pixels": True, "pretrained_model_name_or_path": None}, "its autoencoder and its text encoder")],
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
