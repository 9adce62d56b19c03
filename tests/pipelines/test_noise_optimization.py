"""Noise optimisation on stock samplers."""

import copy

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from guided import SOLVERS, redness, rounding, seeds, without_gradient
from tiny_pipelines import FAMILIES

from diffusers_align import embedded
from diffusers_align.pipelines import NoiseOptimizationPipeline, path
from diffusers_align.pipelines.guided_sampling import GuidanceError
from diffusers_align.rewards import load_reward

CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
MODELS = {"mini-sd": {}, "mini-sd3": {"max_sequence_length": 1}}


# --- the pipeline ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    loaded = {name: DiffusionPipeline.from_pretrained(embedded.path(name)) for name in MODELS}
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


def optimize(models, name="mini-sd", numbers=(0, 1), solver=None, reward=redness, **options):
    pipeline = copy.copy(models[name])
    if solver:
        pipeline.scheduler = SOLVERS[solver][1](pipeline.scheduler.config)
    prompts = ["a fox on a blue background", "two lemons"][: len(numbers)]
    return NoiseOptimizationPipeline(pipeline, reward=reward)(prompts, **{"generator": seeds(*numbers), **CALL, **MODELS[name], **options})


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_iterations_it_is_the_stock_call_bit_for_bit(models, solver):
    name, build = SOLVERS[solver]
    pipeline = copy.copy(models[name])
    pipeline.scheduler = build(pipeline.scheduler.config)
    plain = pipeline(["a fox on a blue background", "two lemons"], generator=seeds(0, 1), **CALL, **MODELS[name]).images
    output = optimize(models, name, solver=solver, num_iterations=0)
    assert torch.equal(output.images, plain)
    assert torch.equal(output.rewards, redness(plain, None)) and torch.equal(output.reward_history, output.rewards[:, None])
    assert (output.noise_distance == 0).all() and output.noise_norm == pytest.approx([1, 1], abs=0.1)


def test_a_single_generator_draws_what_the_stock_call_draws(models):
    options = {"num_images_per_prompt": 2, "eta": 1.0, **CALL}
    ours, stock = (torch.Generator().manual_seed(3) for _ in range(2))
    plain = models["mini-sd"]("two lemons", generator=stock, **options).images
    found = NoiseOptimizationPipeline(models["mini-sd"], reward=redness)("two lemons", generator=ours, num_iterations=0, **options)
    assert torch.equal(found.images, plain)
    assert torch.equal(ours.get_state(), stock.get_state())


@pytest.mark.parametrize("solver, refused", [("DDIMScheduler", False), ("EulerAncestralDiscreteScheduler", True)])
def test_one_generator_in_parts_is_the_stock_call_or_refused(models, solver, refused):
    pipeline = copy.copy(models["mini-sd"])
    pipeline.scheduler = getattr(diffusers, solver).from_config(pipeline.scheduler.config)
    prompts, options = ["a fox", "two lemons"], {"num_iterations": 0, **CALL, **MODELS["mini-sd"]}
    optimizer = NoiseOptimizationPipeline(pipeline, reward=redness)
    if refused:
        with pytest.raises(ValueError, match="One generator draws for all samples, and more than their initial noise"):
            optimizer(prompts, generator=torch.Generator().manual_seed(3), batch_size=1, **options)
        options["generator"] = None  # one for each is drawn
    else:
        options["generator"] = torch.Generator().manual_seed(3)
        plain = pipeline(prompts, generator=torch.Generator().manual_seed(3), **CALL, **MODELS["mini-sd"]).images
    found = optimizer(prompts, batch_size=1, **options)
    assert found.rewards.isfinite().all()
    if refused:
        assert torch.allclose(found.rewards, redness(found.images, None), atol=1e-4)
    else:
        torch.testing.assert_close(found.images, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-4])
def test_small_gradients_are_not_lost_in_float16(unit):
    """A reward in small units against a scale that takes them back moves the noise as the reward in its own units does."""
    options = {**FAMILIES["sd15"].call, "num_inference_steps": 2, "output_type": "pt", "num_iterations": 1, "regularization": 0.0, "learning_rate": 0.1}

    def moved(dtype):
        pipeline = FAMILIES["sd15"].build().to(dtype)
        optimizer = NoiseOptimizationPipeline(pipeline, reward=lambda images, prompts, **columns: unit * images.flatten(1).mean(1))
        call = {**options, "reward_scale": 100 / unit, "max_grad_norm": float("inf")}
        start, after = (optimizer("a", generator=torch.Generator().manual_seed(0), **{**call, "num_iterations": number}) for number in (0, 1))
        assert after.reward_history[0, 1] > after.reward_history[0, 0], "the best iterate is the moved one"
        return (after.noise - start.noise).flatten().float()

    assert torch.nn.functional.cosine_similarity(moved(torch.float16), moved(torch.float32), dim=0) > 0.98


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_reward_rises_on_every_solver(models, solver):
    output = optimize(models, SOLVERS[solver][0], (0,), solver, num_iterations=2)
    assert output.rewards[0] > output.reward_history[0, 0] + 0.01
    assert output.reward_history.shape == (1, 3)
    torch.testing.assert_close(redness(torch.as_tensor(output.images), None), output.rewards)  # what is returned is what was scored


@pytest.mark.parametrize("name, optimizer, iterations", [("mini-sd", "adam", 3), ("mini-sd3", "lbfgs", 2)])
def test_it_climbs_clip_score(models, name, optimizer, iterations):
    reward = load_reward("clip_score", model=embedded.path("mini-clip"))
    output = optimize(models, name, (0, 1), reward=reward, optimizer=optimizer, num_iterations=iterations)
    assert (output.rewards > output.reward_history[:, 0] + 0.01).all()
    assert (output.noise_norm - 1).abs().max() < 0.1 and (output.noise_distance > 0).all()


def test_a_sample_does_not_depend_on_its_batch(models):
    together, alone = (optimize(models, "mini-sd3", numbers, num_iterations=2) for numbers in ((4, 5), (4,)))
    parts = optimize(models, "mini-sd3", (4, 5), num_iterations=2, batch_size=1)
    assert (together.noise[0] - alone.noise[0]).abs().max() < 1e-4
    assert (together.noise - parts.noise).abs().max() < 1e-4


def test_steps_outside_the_gradient_are_constants(models):
    whole, last = (optimize(models, numbers=(0,), num_iterations=1, grad_steps=steps) for steps in (None, [1]))
    assert torch.equal(whole.reward_history[:, 0], last.reward_history[:, 0])
    assert not torch.equal(whole.reward_history[:, 1], last.reward_history[:, 1])


def test_solvers_without_a_kernel_have_their_noise_optimised(models):
    pipeline = copy.copy(models["mini-sd"])
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    output = NoiseOptimizationPipeline(pipeline, reward=redness)("two lemons", generator=seeds(0), num_iterations=2, **CALL)
    assert output.rewards > output.reward_history[:, 0] and type(pipeline.scheduler) is diffusers.LCMScheduler


def test_everything_is_put_back_and_the_output_is_the_stock_one(models):
    pipeline = models["mini-sd"]
    scheduler, pipeline.unet.conv_in.weight.requires_grad = pipeline.scheduler, True
    images, has_nsfw, rewards, history, noise, norm, distance = NoiseOptimizationPipeline(pipeline, reward="scene_score")(
        "a fox", num_images_per_prompt=2, num_iterations=1, generator=seeds(0, 1), return_dict=False, **{**CALL, "output_type": "pil"}
    )
    assert len(images) == 2 and images[0].size == (32, 32) and has_nsfw is None
    assert history.shape == (2, 2) and noise.shape == (2, 4, 16, 16) and rewards.shape == norm.shape == distance.shape == (2,)
    assert pipeline.scheduler is scheduler and "prepare_latents" not in pipeline.__dict__ and pipeline.unet.conv_in.weight.requires_grad


def test_diffusers_loads_it_around_a_checkpoint(models):
    options = {"custom_pipeline": path("noise_optimization"), "trust_remote_code": True, "reward": redness}
    loaded = DiffusionPipeline.from_pretrained(embedded.path("mini-sd"), **options)
    assert type(loaded) is NoiseOptimizationPipeline
    loaded.set_progress_bar_config(disable=True)
    output = loaded("two lemons", generator=seeds(0), num_iterations=1, **CALL)
    assert output.reward_history.shape == (1, 2)


# --- errors ----------------------------------------------------------------------------------------------------------------


def test_rewards_without_gradient_are_refused(models):
    with pytest.raises(GuidanceError, match="no gradient.*best-of-n"):
        optimize(models, reward=without_gradient)
    with pytest.raises(GuidanceError, match="through NumPy or PIL.*numpy"):
        optimize(models, reward=lambda images, prompts: torch.from_numpy(images.numpy()).mean((1, 2, 3)))
    with pytest.raises(GuidanceError, match="exactly 0"):
        optimize(models, reward=rounding)


def test_a_cut_graph_is_named(models):
    pipeline = models["mini-sd"]
    pipeline.unet.forward = torch.no_grad()(pipeline.unet.forward)
    try:
        with pytest.raises(GuidanceError, match=r"denoiser's output has no graph at solver steps \[0, 1\]"):
            optimize(models)
    finally:
        del pipeline.unet.forward
    with pytest.MonkeyPatch.context() as patch:
        decode = pipeline.vae.decode
        patch.setitem(pipeline.vae.__dict__, "decode", torch.no_grad()(lambda *args, **kwargs: decode(*args, **kwargs)))
        with pytest.raises(GuidanceError, match="the images have none"):
            optimize(models)


def test_a_reward_that_is_not_finite_stops_its_sample_and_says_so(models):
    calls = []

    def fragile(images, prompts):
        calls.append(prompts)
        return redness(images, prompts) + torch.tensor([torch.nan if p == "two lemons" and len(calls) > 1 else 0.0 for p in prompts])

    with pytest.warns(UserWarning, match=r"stopped the samples \[1\] at their best so far"):
        output = optimize(models, reward=fragile, num_iterations=2)
    assert output.reward_history[1].isnan().tolist() == [False, True, True] and output.reward_history[0].isfinite().all()
    assert output.rewards.isfinite().all() and output.noise_distance[1] == 0
    with pytest.raises(GuidanceError, match=r"stock samples \[0, 1\] is NaN"):
        optimize(models, reward=lambda images, prompts: redness(images, prompts) * torch.nan)


def test_arguments_that_do_not_fit_are_refused(models):
    with pytest.raises(ValueError, match="Unknown optimizer 'newton'"):
        optimize(models, optimizer="newton")
    with pytest.raises(ValueError, match="leave `latents` out"):
        optimize(models, latents=torch.zeros(2, 4, 16, 16))
    with pytest.raises(ValueError, match="cut_outs"):
        optimize(models, cut_outs=4)
    with pytest.raises(ValueError, match="Give a reward"):
        optimize(models, reward=None)
