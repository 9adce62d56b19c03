"""The pipeline that moves images along a preference flow."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_align import embedded
from diffusers_align.files.paths import front_door
from diffusers_align.pipelines.preference_flow import PreferenceFlowPipeline
from diffusers_align.training.report.pictures import to_pil


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


def test_names_of_models_and_of_pictures_are_refused_with_what_to_do(pixel_flow):
    with pytest.raises(TypeError, match=r"got 'runs/mine' for the vector field.*PreferenceFlowPipeline.from_pretrained"):
        PreferenceFlowPipeline("runs/mine")
    for wrong in ("best.png", ["best.png"], Path("best.png")):
        with pytest.raises(TypeError, match=r"best.png'.*PIL.Image.open"):
            pixel_flow(wrong)


def test_pictures_are_read_as_those_of_the_training_were(pixel_flow):
    """Upright, on white, of 16 bits: what the flow has learned from."""
    plain = Image.effect_noise((10, 6), 60).convert("RGB")
    turned, transparent = Image.Exif(), plain.copy()
    turned[0x0112] = 6
    file = io.BytesIO()
    plain.save(file, "PNG", exif=turned)
    transparent.putalpha(0)
    deep = Image.fromarray(np.full((6, 10), 32768, dtype=np.uint16))
    call = {"strength": 0.0, "output_type": "pt"}
    on_its_side = pixel_flow(Image.open(file), **call).images
    assert on_its_side.shape == (1, 3, 10, 6) and torch.equal(on_its_side, pixel_flow(plain.rotate(-90, expand=True), **call).images)
    assert bool((pixel_flow(transparent, **call).images == 1).all())
    torch.testing.assert_close(pixel_flow([deep, plain], **call).images[0], torch.full((3, 6, 10), 128 / 255))


@pytest.mark.parametrize(
    "message, image",
    [
        ("got an empty list", []),
        ("got a NoneType", None),
        ("got Image, Tensor", [Image.new("RGB", (8, 8)), torch.zeros(3, 8, 8)]),
        ("are RGB.*got the shape", torch.zeros(1, 4, 8, 8)),
        ("are RGB.*got the shape", np.zeros((8, 8))),
        ("no known range", Image.new("F", (8, 8))),
    ],
)
def test_what_is_no_picture_is_refused(message, image, pixel_flow):
    with pytest.raises((TypeError, ValueError), match=message):
        pixel_flow(image)


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
