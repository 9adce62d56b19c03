"""The noise-aware CLIP: it tells captions apart through noise, has a gradient there, and guides both embedded pipelines."""

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_align import embedded
from diffusers_align.embedded.noisy_clip import MAX_LEVEL, NoisyCLIP, NoisyCLIPScore
from diffusers_align.embedded.teaching import make_scenes
from diffusers_align.pipelines import RewardGuidedPipeline
from diffusers_align.rewards import load_reward
from diffusers_align.rewards.clip_embedder import CLIPEmbedder

CALLS = {"mini-sd": {}, "mini-sd3": {"max_sequence_length": 1}}
STRENGTH = {"mini-sd": 0.6, "mini-sd3": 0.5}  # too strong, and captions fit worse
PROMPTS = ["a fox", "two lemons", "a frog on a red background", "a cat"]


@pytest.fixture(scope="module")
def clip():
    torch.set_num_threads(1)
    return NoisyCLIPScore()


@pytest.fixture(scope="module", params=list(CALLS))
def pipeline(request):
    loaded = DiffusionPipeline.from_pretrained(embedded.path(request.param))
    loaded.set_progress_bar_config(disable=True)
    return loaded, {**CALLS[request.param], "num_inference_steps": 8, "guidance_scale": 1.0, "output_type": "pt"}


@pytest.fixture(scope="module")
def scenes(pipeline):
    """Clean latents as the pipeline's denoiser sees them, and their captions, all different."""
    images, truth, _ = make_scenes(100, seed=2468)
    rows = list({scene.caption(): i for i, scene in enumerate(truth)}.values())
    vae = pipeline[0].vae
    with torch.no_grad():
        latents = vae.encode(images[rows].float() / 127.5 - 1).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor, [truth[i].caption() for i in rows]


def generators(number):
    return [torch.Generator().manual_seed(i) for i in range(number)]


def test_the_text_tower_is_mini_clips(clip):
    folder = embedded.path("mini-clip")
    torch.testing.assert_close(clip.text_tower(PROMPTS), CLIPEmbedder(folder).texts(PROMPTS))


@torch.no_grad()
def test_it_prefers_the_own_caption_less_the_more_noise_there_is(clip, scenes):
    latents, captions = scenes
    wrong = captions[1:] + captions[:1]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    share, margin = {}, {}
    for s in (0.1, 0.5, 0.8):
        sigma, noised = torch.full((len(latents),), s), (1 - s) * latents + s * noise
        own, other = clip(noised, captions, 1 - sigma, sigma), clip(noised, wrong, 1 - sigma, sigma)
        share[s], margin[s] = float((own > other).float().mean()), float((own - other).mean())
        torch.testing.assert_close(clip(7 * noised, captions, 7 * (1 - sigma), 7 * sigma), own, rtol=1e-3, atol=1e-3)
    assert share[0.1] > 0.95 and share[0.5] > 0.9 and share[0.8] > 0.75, share
    assert margin[0.1] > margin[0.5] > margin[0.8] > 0.5, margin


def test_its_gradient_is_that_of_the_state():
    torch.manual_seed(0)
    clip = NoisyCLIPScore(NoisyCLIP(channels=(8, 16), width=8)).double()
    x, level = torch.randn(1, 4, 16, 16, dtype=torch.float64, requires_grad=True), torch.tensor([0.6], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(clip(x, ["a fox"], 1 - level, level).sum(), x)
    direction, h = torch.randn_like(x), 1e-5
    ahead, behind = (clip(x + sign * h * direction, ["a fox"], 1 - level, level) for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float((ahead - behind).detach() / (2 * h)), rel=1e-6)


def test_states_noisier_than_its_training_have_no_gradient(clip):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    alpha = 1 / (1 + torch.tensor([MAX_LEVEL - 0.1, MAX_LEVEL + 0.1]).exp())
    values = clip(x, ["a fox"] * 2, alpha, 1 - alpha)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert values[0] != 0 and gradient[0].abs().max() > 0 and values[1] == 0 and (gradient[1] == 0).all()


def test_without_strength_it_is_the_plain_pipeline_bit_for_bit(pipeline, clip):
    stock, call = pipeline
    plain = stock(PROMPTS, generator=generators(4), **call).images
    output = RewardGuidedPipeline(stock, reward=clip)(PROMPTS, preset="glide_clip", reward_scale=0, generator=generators(4), **call)
    assert torch.equal(output.images, plain) and "rewards" not in output


def test_guidance_fits_images_to_their_prompts_as_other_judges_see_it(pipeline, clip):
    stock, call = pipeline
    guided, prompts, strength = RewardGuidedPipeline(stock, reward=clip), PROMPTS * 4, STRENGTH["mini-sd3" if hasattr(stock, "transformer") else "mini-sd"]
    plain, follows = (guided(prompts, preset="glide_clip", reward_scale=s, generator=generators(16), **call).images for s in (0, strength))
    for name, options in (("clip_score", {"model": embedded.path("mini-clip")}), ("scene_score", {})):
        before, after = (load_reward(name, **options)(images, prompts) for images in (plain, follows))
        before, after = (value["reward"] if isinstance(value, dict) else value for value in (before, after))
        assert float((after - before).mean()) > 0.03, name
