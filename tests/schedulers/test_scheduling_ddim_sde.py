"""DDIM with noise: published values, the stock step bit for bit, and a stock pipeline around it."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from marginals import MEAN, VARIANCE, order, run_chain
from schedules import SD, assert_same_loop, ddim, gen, randn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_align import DDIMSDEScheduler

# DDIM


def test_ddim_stds_have_the_published_values():
    scheduler = ddim(50)
    golden = {981: 0.454463, 781: 0.390750, 481: 0.287685, 181: 0.177067, 21: 0.039480, 1: 0.020648}
    for t, std in golden.items():
        assert scheduler.transition(randn(0), t, randn(1)).std.item() == pytest.approx(std, abs=1e-6)
    half = ddim(50, eta=0.5).transition(randn(0), 981, randn(1))
    assert half.std.item() == pytest.approx(golden[981] / 2, abs=1e-6)
    assert scheduler.stochastic_steps.all()
    assert ddim(50, set_alpha_to_one=True).stochastic_steps.tolist() == [True] * 49 + [False]


DDIM_CONFIGS = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"prediction_type": "epsilon", "clip_sample": True},
    {"prediction_type": "epsilon", "thresholding": True},
    {"prediction_type": "epsilon", "set_alpha_to_one": True, "timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
]


@pytest.mark.parametrize("config", DDIM_CONFIGS)
@pytest.mark.parametrize("off", ["eta", "deterministic", "window"])
def test_ddim_without_noise_is_the_stock_step_bit_for_bit(off, config):
    scheduler = ddim(**config, eta=0.0 if off == "eta" else 1.0, sde_window=(10, 12) if off == "window" else None)
    scheduler.deterministic = off == "deterministic"
    assert not scheduler.stochastic_steps.any()
    assert_same_loop(scheduler, ddim(cls=DDIMScheduler, **config))


@pytest.mark.parametrize("config", DDIM_CONFIGS)
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_ddim_with_noise_is_the_stock_step_with_eta(eta, config):
    scheduler, stock = ddim(**config, eta=eta), ddim(cls=DDIMScheduler, **config)
    x = y = randn(0)
    generators = gen(7), gen(7)
    for k, t in enumerate(stock.timesteps):
        out = torch.tanh(x) + 0.1 * randn(k + 1)
        # The pipelines' own eta, 0.0, is ignored.
        mine = scheduler.step(out, t, x, eta=0.0, generator=generators[0])
        theirs = stock.step(out, t, y, eta=eta, generator=generators[1])
        if config.get("rescale_betas_zero_snr") and k == 0:
            # 1 - alpha' - s^2 is 0 there but for rounding, of either sign: the stock square root may be NaN or a last bit of noise.
            assert mine.prev_sample.isfinite().all()
            close = (mine.prev_sample - theirs.prev_sample).abs() < 1e-3
            assert bool((close | theirs.prev_sample.isnan()).all()), f"step {k}"
            theirs.prev_sample = mine.prev_sample
        assert torch.equal(mine.prev_sample, theirs.prev_sample), f"step {k}"
        assert torch.equal(mine.pred_original_sample, theirs.pred_original_sample), f"step {k}"
        assert (mine.log_prob is not None) == bool(scheduler.stochastic_steps[k])
        x, y = mine.prev_sample, theirs.prev_sample


@pytest.mark.parametrize("config", DDIM_CONFIGS)
def test_ddim_window_is_noisy_inside_and_the_stock_step_outside(config):
    scheduler, whole, stock = ddim(**config, sde_window=(2, 5)), ddim(**config), ddim(cls=DDIMScheduler, **config)
    assert scheduler.stochastic_steps.tolist() == [2 <= k < 5 for k in range(10)]
    for k, t in enumerate(scheduler.timesteps):
        out, x = randn(k), randn(k + 50)
        mine, transition = scheduler.step(out, t, x, generator=gen(k)), scheduler.transition(out, t, x)
        theirs = (whole if 2 <= k < 5 else stock).step(out, t, x, generator=gen(k))
        assert torch.equal(mine.prev_sample, theirs.prev_sample)
        assert (mine.log_prob is not None) == (2 <= k < 5) == (transition.std.item() > 0)
        torch.testing.assert_close(mine.prev_sample_mean, transition.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 3, 6, 7, 10, 16, 50])
@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
def test_ddim_is_finite_where_the_table_ends_without_signal(betas, steps):
    """There s^2 = 1 - alpha', and rounding may put it above."""
    scheduler = ddim(steps, beta_schedule=betas, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for t in scheduler.timesteps:
        out = scheduler.step(randn(0), t, randn(1), generator=gen())
        assert out.prev_sample.isfinite().all() and out.log_prob.isfinite().all(), f"timestep {t}"


def test_ddim_transition_and_step_agree():
    scheduler = ddim(set_alpha_to_one=True, eta=0.7)
    for t in scheduler.timesteps:
        transition, out = scheduler.transition(randn(0), t, randn(1)), scheduler.step(randn(0), t, randn(1), generator=gen())
        assert torch.equal(out.std, transition.std)
        torch.testing.assert_close(out.prev_sample_mean, transition.mean, rtol=0, atol=0)


def test_ddim_accepts_given_noise():
    scheduler, stock = ddim(), ddim(cls=DDIMScheduler)
    t, noise = scheduler.timesteps[3], randn(9)
    out = scheduler.step(randn(0), t, randn(1), variance_noise=noise)
    assert torch.equal(out.prev_sample, stock.step(randn(0), t, randn(1), eta=1.0, variance_noise=noise).prev_sample)
    assert out.log_prob is not None


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_ddim_refuses_impossible_eta(eta):
    with pytest.raises(ValueError, match="eta must be a finite number, from 0 to 1"):
        DDIMSDEScheduler(eta=eta)


def test_ddim_refuses_clipped_model_output():
    scheduler = ddim()
    with pytest.raises(ValueError, match="clip_sample=False"):
        scheduler.step(randn(0), scheduler.timesteps[0], randn(1), use_clipped_model_output=True)


# In a stock pipeline


@pytest.fixture(scope="module")
def tiny_sd():
    """A Stable Diffusion pipeline with random weights."""
    torch.manual_seed(0)
    letters = [chr(c) for c in range(97, 123)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    text = CLIPTextConfig(vocab_size=len(tokens), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                          bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=0)  # fmt: skip
    unet = UNet2DConditionModel(block_out_channels=(4, 8), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4, norm_num_groups=2,
                                cross_attention_dim=8, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=AutoencoderKL(block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, **blocks),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77),
        scheduler=DDIMScheduler(**SD),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline, scheduler, **kwargs):
    pipeline.scheduler = scheduler
    return torch.from_numpy(pipeline(["a cat", "a dog"], num_inference_steps=4, generator=gen(3), output_type="np", **kwargs).images)


def test_stock_pipeline_gives_the_same_images_with_the_stock_and_the_sde_scheduler(tiny_sd):
    ancestral, ode = (images(tiny_sd, DDIMScheduler(**SD), eta=eta) for eta in (1.0, 0.0))
    assert not torch.equal(ancestral, ode)
    # The second call passes the pipeline's default, eta=0.0.
    assert torch.equal(images(tiny_sd, DDIMSDEScheduler(**SD), eta=1.0), ancestral)
    assert torch.equal(images(tiny_sd, DDIMSDEScheduler(**SD)), ancestral)
    assert torch.equal(images(tiny_sd, DDIMSDEScheduler(**SD, eta=0.0), eta=1.0), ode)


def test_pipeline_with_an_sde_scheduler_survives_save_and_load(tiny_sd, tmp_path):
    before = images(tiny_sd, DDIMSDEScheduler(**SD, eta=0.6))
    tiny_sd.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is DDIMSDEScheduler and loaded.scheduler.config.eta == 0.6
    assert all(loaded.scheduler.config[name] == value for name, value in SD.items())
    torch.testing.assert_close(images(loaded, loaded.scheduler), before, rtol=0, atol=1e-5)  # loaded weights lie differently in memory


# Recipes


def test_a_ddim_transition_takes_the_float_timesteps_of_a_trajectory():
    scheduler = DDIMSDEScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    x, eps = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    whole, real = (scheduler.transition(eps, t, x) for t in (scheduler.timesteps[4], scheduler.timesteps[4].float()))
    assert torch.equal(whole.mean, real.mean) and torch.equal(whole.std, real.std)


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False}


def ddim_chain(eta, steps, data_variance=VARIANCE, spacing="trailing"):
    """From the true marginal of the first timestep; also returns the moments that the last one should have."""
    scheduler = DDIMSDEScheduler(**SD_BETAS, steps_offset=1, timestep_spacing=spacing, eta=eta)
    scheduler.set_timesteps(steps)
    table = scheduler.alphas_cumprod.double().tolist()
    probe = torch.tensor([[0.0], [1.0]])

    def moments(alpha):
        return math.sqrt(alpha) * MEAN, alpha * data_variance + 1 - alpha

    def affine(t):
        mean, variance = moments(table[t])
        transition = scheduler.transition(math.sqrt(1 - table[t]) / variance * (probe - mean), t, probe)
        offset = transition.mean[0].item()
        return transition.mean[1].item() - offset, offset, transition.std.item()

    timesteps = scheduler.timesteps.tolist()
    return run_chain(*moments(table[timesteps[0]]), (affine(t) for t in timesteps)), moments(table[0]), table[timesteps[0]]


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_ddim_marginals_converge(eta):
    steps = (100, 200, 500)
    chains = [ddim_chain(eta, k) for k in steps]
    errors = [variance - target[1] for (_, variance, _), target, _ in chains]
    assert 0.75 < order(steps, errors) < 1.1, f"order {order(steps, errors):.2f}, errors {errors}"
    assert max(abs(mean - target[0]) for (mean, _, _), target, _ in chains) < 1e-5


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 20), ("leading", 50), ("trailing", 50)])
def test_ddim_on_the_sd_table_remembers_little_but_not_nothing(spacing, steps):
    """Its last alphas_cumprod is .0047, not 0."""
    (_, _, correlation), _, _ = ddim_chain(1.0, steps, data_variance=0.36, spacing=spacing)
    assert 0.042 < correlation < 0.050
    assert ddim_chain(0.5, steps, data_variance=0.36, spacing=spacing)[0][2] > 0.4


def test_memory_of_many_ddim_steps_is_that_of_the_noising_process():
    (_, _, correlation), _, first_alpha = ddim_chain(1.0, 500, data_variance=0.36)
    signal = first_alpha * 0.36
    assert correlation == pytest.approx(math.sqrt(signal / (signal + 1 - first_alpha)), rel=0.03)
