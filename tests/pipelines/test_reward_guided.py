"""Guidance at the steps of stock pipelines: on their own solvers, off when it is off, and clear where it cannot be."""

import copy

import accelerate
import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from guided import SOLVERS, redness, rounding, seeds, without_gradient
from several_schedulers import CountsItsSteps
from tiny_pipelines import FAMILIES

from diffusers_align import embedded
from diffusers_align.algorithms.guidance import Guidance, guide
from diffusers_align.embedded.noisy_classifier import CLASSES, NoisySceneClassifier
from diffusers_align.embedded.teaching import make_scenes
from diffusers_align.pipelines import NoiseOptimizationPipeline, ParticleSteeringPipeline, RewardGuidedPipeline, guided_sampling, path
from diffusers_align.pipelines.guided_sampling import GuidanceError
from diffusers_align.pipelines.reward_guided import noise_seeds
from tests.families.cases import CASES

CALLS = {"mini-sd": {}, "mini-sd3": {"max_sequence_length": 1}}
CLIMBING = {
    "dps": 0.3,
    "energy": 3.0,
    "lgd_mc": 6.0,
    "freedom": 0.2,
    "mpgd": 0.5,
    "universal": 6.0,
    "tfg": 3.0,
    "flowchef": 30.0,
    "clip_guided": 3.0,
    "flow": 20.0,
}


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    loaded = {name: DiffusionPipeline.from_pretrained(embedded.path(name)) for name in CALLS}
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


def solved(models, solver):
    """A mini model with this solver, and the arguments of a short call."""
    name, build = SOLVERS[solver]
    pipeline = copy.copy(models[name])
    pipeline.scheduler = build(pipeline.scheduler.config)
    return pipeline, {**CALLS[name], "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}


def run(models, solver, name, scale=None, numbers=(0, 1), reward=redness, **overrides):
    pipeline, call = solved(models, solver)
    scale = CLIMBING[name] if scale is None else scale
    guided = RewardGuidedPipeline(pipeline, reward=reward)
    return guided(["a fox"] * len(numbers), preset=name, reward_scale=scale, **{"generator": seeds(*numbers), **call, **overrides})


# --- on every solver -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_strength_it_is_the_plain_pipeline_bit_for_bit(models, solver):
    pipeline, call = solved(models, solver)
    plain = pipeline(["a fox"] * 2, generator=seeds(0, 1), **call).images
    output = run(models, solver, "freedom", scale=0)
    assert torch.equal(output.images, plain)
    assert torch.equal(output.rewards, redness(plain, None)) and "guided_values" not in output


def test_without_strength_a_single_generator_draws_what_the_plain_pipeline_draws(models):
    pipeline, call = solved(models, "ddim")
    call |= {"num_images_per_prompt": 2, "eta": 1.0}
    plain = pipeline("a fox", generator=torch.Generator().manual_seed(3), **call).images
    assert torch.equal(
        run(models, "ddim", "mpgd", 0, (0,), generator=torch.Generator().manual_seed(3), **{"num_images_per_prompt": 2, "eta": 1.0}).images, plain
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_climbs_and_its_opposite_descends(models, solver):
    strength = 40.0 if solver == "flow" else 6.0
    plain, up, down = (run(models, solver, "energy", scale, (0,), start=0.2).rewards for scale in (0, strength, -strength))
    assert (up > plain + 0.02).all() and (plain > down + 0.02).all()


@pytest.mark.parametrize("name", CLIMBING)
def test_every_preset_climbs(models, name):
    solver = "flow" if name in ("flow", "flowchef", "lgd_mc", "freedom", "universal") else "ddim"
    # Not 0: recurrence draws noise, which makes another sample.
    weak, output = run(models, solver, name, 1e-6, (0,)), run(models, solver, name, numbers=(0,))
    assert output.rewards.mean() > weak.rewards.mean() + 0.005
    assert output.guided_values.shape[0] == 1


@pytest.mark.parametrize(("name", "scale"), [("energy", 10.0), ("tfg", 10.0), pytest.param("dps", 3.0, marks=pytest.mark.slow)])
def test_euler_in_its_own_space_is_ddim(models, name, scale):
    """The two are one solver in different coordinates, so the state's scale must be accounted for everywhere."""
    found = []
    for solver in ("ddim", "euler"):
        pipeline, call = solved(models, solver)
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
        guided = RewardGuidedPipeline(pipeline, reward=redness)
        found.append(guided("a fox", preset=name, reward_scale=scale, start=0.3, generator=seeds(0), **call))
    plain = guided("a fox", preset=name, reward_scale=0, generator=seeds(0), **call)
    assert (found[0].images - found[1].images).abs().max() < 2e-3
    assert (found[0].images - plain.images).abs().max() > 2e-2
    assert (found[0].guided_values - found[1].guided_values).abs().max() < 5e-4


@pytest.mark.parametrize("name", ["tfg", pytest.param("freedom", marks=pytest.mark.slow)])
def test_a_sample_does_not_depend_on_its_batch(models, name):
    together, alone = run(models, "flow", name, numbers=(3, 4)), run(models, "flow", name, numbers=(4,))
    assert (alone.images[0] - together.images[1]).abs().max() < 1e-5
    in_parts = run(models, "flow", name, numbers=(3, 4), micro_batch_size=1)
    assert (in_parts.images - together.images).abs().max() < 1e-5


def test_recomputed_activations_change_nothing(models):
    plain, recomputed = (run(models, "ddim", "energy", numbers=(0,), gradient_checkpointing=on) for on in (False, True))
    assert (plain.images - recomputed.images).abs().max() < 1e-5
    assert not models["mini-sd"].unet.is_gradient_checkpointing


# --- recurrence ----------------------------------------------------------------------------------------------------------


def denoised_at(models, solver, **settings):
    """The timesteps of the denoiser's calls, and the output."""
    pipeline, _ = solved(models, solver)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    timesteps, forward = [], denoiser.forward

    def note(*args, **kwargs):
        timesteps.append(float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0]))
        return forward(*args, **kwargs)

    run(models, solver, "energy", **settings)  # gates learn what they must return
    denoiser.forward = note
    try:
        return timesteps, run(models, solver, "energy", **settings)
    finally:
        del denoiser.forward


@pytest.mark.parametrize("solver", SOLVERS)
def test_recurrence_makes_each_guided_step_again(models, solver):
    """Of a solver of second order its pairs: the corrector ends what the predictor began."""
    found, output = denoised_at(models, solver, numbers=(0,), scale=1.0, start=0.25, stop=0.75, recurrence=3)
    scheduler = solved(models, solver)[0].scheduler
    scheduler.set_timesteps(4)
    order = [0, 1, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5, 6] if solver == "heun" else [0, 1, 1, 1, 2, 2, 2, 3]
    guided = range(2, 5) if solver == "heun" else range(1, 3)
    assert found == pytest.approx([float(scheduler.timesteps[k]) for k in order])
    assert output.guided_values.shape == (1, sum(k in guided for k in order))


def test_a_pipeline_that_counts_its_own_steps_cannot_repeat_them():
    guided = RewardGuidedPipeline(CountsItsSteps(**FAMILIES["sd15"].build().components), reward=redness)
    with pytest.raises(GuidanceError, match="CountsItsSteps looks something up by the number of its step .* set recurrence=1"):
        guided("a fox", preset="mpgd", recurrence=3, start=0.25, stop=0.75, generator=seeds(0))
    assert guided("a fox", preset="mpgd", generator=seeds(0)).images.shape == (1, 3, 16, 16)

    def broken(images, prompts):
        return [][0]

    with pytest.raises(IndexError):  # the reward's own
        guided("a fox", preset="mpgd", reward=broken, recurrence=3, start=0.25, stop=0.75, generator=seeds(0))


class _OfAGaussian(torch.nn.Module):
    """The exact denoiser of data N(mean, std^2), in the place of a model's."""

    def __init__(self, scheduler, mean=0.4, std=0.6):
        super().__init__()
        self.alphas_cumprod, self.mean, self.std = getattr(scheduler, "alphas_cumprod", None), mean, std

    def epsilon(self, sample, timestep, *args, **kwargs):
        t = float(torch.as_tensor(timestep).flatten()[0])
        table = self.alphas_cumprod.double()
        ratio = ((1 - table) / table).sqrt()
        # As solvers do it: linear in sigma / alpha between the rows.
        s = torch.lerp(ratio[int(t)], ratio[min(int(t) + 1, len(ratio) - 1)], t - int(t))
        alpha, sigma = float(1 / (1 + s**2).sqrt()), float(s / (1 + s**2).sqrt())
        return (sigma * (sample - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2),)

    def velocity(self, hidden_states, timestep, **kwargs):
        sigma = float(timestep.flatten()[0]) / 1000
        variance = (1 - sigma) ** 2 * self.std**2 + sigma**2
        clean = self.mean + (1 - sigma) * self.std**2 / variance * (hidden_states - (1 - sigma) * self.mean)
        return ((hidden_states - clean) / max(sigma, 1e-6),)


@pytest.mark.parametrize("solver", SOLVERS)
def test_recurrence_keeps_the_marginals(models, solver):
    """With a strength that does nothing, noising a state again and stepping back leaves its law: that of the data at the end."""
    pipeline, call = solved(models, solver)
    exact = _OfAGaussian(pipeline.scheduler)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    denoiser.forward = exact.epsilon if hasattr(pipeline, "unet") else exact.velocity
    call |= {"num_inference_steps": 12, "output_type": "latent", "generator": seeds(*range(4))}
    settings = {"preset": "mpgd", "reward_scale": 1e-9, "start": 0.3, "stop": 0.7}
    try:
        plain, again = (RewardGuidedPipeline(pipeline, reward=redness)(["a fox"] * 4, recurrence=r, **settings, **call).images for r in (1, 3))
    finally:
        del denoiser.forward
    assert float((plain - again).std()) > 0.1, "nothing was noised again"
    # Of 4096 numbers: four standard errors are 0.04 of the mean, 0.03 of the deviation; the rest is the solvers' error, which repeats alter.
    assert float(again.mean()) == pytest.approx(float(plain.mean()), abs=0.05) and float(again.mean()) == pytest.approx(0.4, abs=0.08)
    # In 12 steps solvers of first order shrink the deviation, with repeats or without; those of second order do not, but a multistep one is of
    # first order where it starts anew.
    assert float(again.std()) == pytest.approx(0.6, abs={"heun": 0.06, "dpmpp": 0.1}.get(solver, 0.15))
    assert float(again.std()) == pytest.approx(float(plain.std()), abs=0.08)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["freedom", pytest.param("universal", marks=pytest.mark.slow)])
def test_time_travel_climbs_on_every_solver(models, solver, name):
    weak, output = run(models, solver, name, 1e-6, (0,)), run(models, solver, name, numbers=(0,))
    assert output.rewards.mean() > weak.rewards.mean() + 0.005


@pytest.mark.parametrize("solver", ["heun", "dpmpp"])
def test_repeated_steps_of_a_sample_do_not_depend_on_its_batch(models, solver):
    together, alone = run(models, solver, "energy", numbers=(3, 4), recurrence=2), run(models, solver, "energy", numbers=(4,), recurrence=2)
    assert (alone.images[0] - together.images[1]).abs().max() < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_repeats_leave_the_scheduler_as_a_plain_call_does(models, solver):
    pipeline, call = solved(models, solver)
    call |= {"generator": seeds(0)}
    plain = pipeline("a fox", **call).images
    before = {name: str(value) for name, value in vars(pipeline.scheduler).items() if name in ("timesteps", "sigmas", "_step_index", "num_inference_steps")}
    repeated = [RewardGuidedPipeline(pipeline, reward=redness)("a fox", preset="mpgd", recurrence=2, **call | {"generator": seeds(0)}).images for _ in range(2)]
    assert torch.equal(*repeated)
    assert {name: str(vars(pipeline.scheduler)[name]) for name in before} == before
    assert torch.equal(pipeline("a fox", **call | {"generator": seeds(0)}).images, plain)


def test_solvers_that_go_on_from_an_earlier_state_cannot_repeat_steps(models):
    pipeline, call = solved(models, "ddim")
    pipeline.scheduler = diffusers.DPMSolverSinglestepScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(GuidanceError, match=r"takes solver step \d from an earlier state.*recurrence=1"):
        RewardGuidedPipeline(pipeline, reward=redness)("a fox", preset="mpgd", recurrence=2, **call)


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "LCMScheduler"])
def test_solvers_without_conversion_are_refused(models, name):
    pipeline, call = solved(models, "ddim")
    pipeline.scheduler = getattr(diffusers, name)()
    with pytest.raises(ValueError, match="DDIM"):
        RewardGuidedPipeline(pipeline, reward=redness)("a fox", preset="mpgd", **call)


# --- on other pipelines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["sd15_img2img", "flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd15_v", "sdxl", "wan", "pixart_sigma", "sana"))]
)
def test_any_stock_pipeline_can_be_guided(family):
    pipeline = FAMILIES[family].build()
    pipeline.set_progress_bar_config(disable=True)
    guided = RewardGuidedPipeline(pipeline, reward=redness)
    call = {**FAMILIES[family].call, "output_type": "pt"}
    settings = Guidance(variance=1.0, norm="rms", variance_entry="state", variance_schedule="constant", start=0.3)
    plain, up, down = (guided("a cat", preset=settings, reward_scale=scale, generator=seeds(0), **call).rewards for scale in (0, 0.3, -0.3))
    assert up > plain > down


# --- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mpgd", pytest.param("energy", marks=pytest.mark.slow)])
def test_rewards_without_gradient_are_refused(models, name):
    with pytest.raises(GuidanceError, match="no gradient"):
        run(models, "ddim", name, reward=without_gradient)
    with pytest.raises(GuidanceError, match="exactly 0"):
        run(models, "ddim", name, reward=rounding)


def test_an_overflow_names_the_step_and_the_remedy(models):
    with pytest.raises(GuidanceError, match=r"step [0-3].*lower the strength.*1e\+38"):
        run(models, "ddim", "energy", 1e38)


def test_a_cut_graph_is_named(models):
    pipeline, call = solved(models, "ddim")
    forward = torch.no_grad()(pipeline.unet.forward)
    pipeline.unet.forward = forward
    try:
        with pytest.raises(GuidanceError, match="cuts the graph at solver step 0.*mpgd"):
            RewardGuidedPipeline(pipeline, reward=redness)("a fox", preset="energy", **call)
    finally:
        del pipeline.unet.forward


def test_arguments_that_do_not_fit_are_refused(models):
    with pytest.raises(ValueError, match="Unknown preset 'magic'"):
        run(models, "ddim", "magic", 1.0)
    with pytest.raises(ValueError, match="reward"):
        run(models, "ddim", "mpgd", reward=None)
    with pytest.raises(ValueError, match="cut_outs"):
        run(models, "ddim", "mpgd", cut_outs=4)
    with pytest.raises(ValueError, match="noise-aware"):
        run(models, "ddim", "classifier", 1.0, reward="scene_score")


def test_everything_is_put_back_and_the_output_is_the_stock_one(models):
    pipeline, call = solved(models, "ddim")
    scheduler, pipeline.unet.conv_in.weight.requires_grad = type(pipeline.scheduler), True
    guided = RewardGuidedPipeline(pipeline, reward="scene_score")
    images, has_nsfw, rewards, values = guided(
        "a fox", num_images_per_prompt=2, start=0.5, generator=seeds(0, 1), return_dict=False, **{**call, "output_type": "pil"}
    )
    assert len(images) == 2 and images[0].size == (32, 32) and has_nsfw is None
    assert rewards.shape == (2,) and values.shape == (2, 2)
    assert type(pipeline.scheduler) is scheduler and "prepare_latents" not in pipeline.__dict__ and pipeline.unet.conv_in.weight.requires_grad


def test_diffusers_loads_it_around_a_checkpoint(models):
    options = {"custom_pipeline": path("reward_guided"), "trust_remote_code": True, "reward": redness}
    guided = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"), **options)
    assert type(guided) is RewardGuidedPipeline and type(guided.pipeline).__name__ == "StableDiffusion3Pipeline"
    guided.set_progress_bar_config(disable=True)
    call = {"preset": "mpgd", "reward_scale": 0.5, "num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "pt"}
    output = guided("a fox", generator=seeds(0), **call)
    assert torch.equal(output.images, run(models, "flow", "mpgd", numbers=(0,)).images)


def test_columns_and_copies_reach_the_reward_row_by_row(models):
    def wished(images, prompts, wish):
        return torch.stack([(-1.0 if w == "dark" else 1.0) * image.mean() for w, image in zip(wish, images)])

    pipeline, call = solved(models, "ddim")
    guided = RewardGuidedPipeline(pipeline, reward=wished)
    options = {"preset": "mpgd", "micro_batch_size": 3, "num_images_per_prompt": 2, "columns": {"wish": ["dark", "light"]}}
    plain, moved = (guided(["a fox", "a cat"], reward_scale=s, generator=seeds(0, 1, 2, 3), **options, **call).images for s in (0, 0.5))
    assert ((moved - plain).mean((1, 2, 3)).sign() == torch.tensor([-1, -1, 1, 1])).all()


# --- the noise-aware classifier --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    return NoisySceneClassifier.from_pretrained(embedded.path("noisy-classifier")).eval()


@torch.no_grad()
def test_the_classifier_reads_noised_latents_less_the_more_they_are_noised(models, classifier):
    images, scenes, _ = make_scenes(120, seed=4321)
    vae = models["mini-sd3"].vae
    latents = (vae.encode(images.float() / 127.5 - 1).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    right = {}
    for s in (0.1, 0.5, 0.8, 0.95):
        sigma, noised = torch.full((len(latents),), s), (1 - s) * latents + s * noise
        logits, scaled = classifier(noised, 1 - sigma, sigma), classifier(7 * noised[:8], 7 * (1 - sigma[:8]), 7 * sigma[:8])
        for name, classes in CLASSES.items():
            torch.testing.assert_close(scaled[name], logits[name][:8], rtol=1e-3, atol=1e-3)
            truth = torch.tensor([classes.index(getattr(scene, name)) for scene in scenes])
            right[name, s] = float((logits[name].argmax(1) == truth).float().mean())
    assert right["object", 0.1] > 0.9 and right["color", 0.1] > 0.97 and right["count", 0.1] > 0.9
    assert right["object", 0.1] > right["object", 0.5] + 0.02 > right["object", 0.8] + 0.2
    assert right["color", 0.5] > 0.95 and right["object", 0.95] < 0.2


def test_log_probabilities_are_of_what_the_caption_names(classifier):
    latents, one = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.ones(2)
    logits = {name: value.log_softmax(-1) for name, value in classifier(latents, one, one).items()}
    found = classifier.log_prob(latents, ["two cats", "a dog on a red background"], one, one)
    expected = [
        logits["object"][0, CLASSES["object"].index("cat")] + logits["count"][0, 1],
        logits["object"][1, CLASSES["object"].index("dog")] + logits["count"][1, 0] + logits["color"][1, CLASSES["color"].index("red")],
    ]
    torch.testing.assert_close(found, torch.stack(expected))
    with pytest.raises(ValueError, match="names none"):
        classifier.log_prob(latents, ["two cats", "nothing"], one, one)


@pytest.mark.parametrize("solver", ["euler", "flow"])
def test_classifier_guidance_raises_what_it_is_told_to(models, classifier, solver):
    from diffusers_align.rewards import load_reward

    def blue(latents, prompts, alpha, sigma):
        return classifier.log_prob(latents, ["a fox on a blue background"] * len(prompts), alpha, sigma, ("color",))

    def probability(scale):
        output = run(models, solver, "classifier", scale, numbers=range(4), reward=blue, num_inference_steps=8)
        assert "rewards" not in output
        return load_reward("scene_score")(output.images, ["a fox on a blue background"] * 4)["color"].mean()

    assert probability(3.0) > probability(0) + 0.3


def test_a_state_without_signal_is_not_guided(models):
    output = run(models, "flow", "energy", 1.0)
    assert output.guided_values.shape == (2, 3)  # of 4 steps: the first starts at sigma 1


@pytest.mark.parametrize(
    "solver, options",
    [("ddim", {"start": 0.5, "stop": 0.6}), ("flow", {"num_inference_steps": 1}), ("flow", {"stop": 0.25}), ("flow", {"stop": 0.25, "recurrence": 2})],
)
def test_a_window_without_a_step_to_guide_is_refused(models, solver, options):
    with pytest.raises(GuidanceError, match="No step is guided"):
        run(models, solver, "dps", 1.0, **options)
    assert "guided_values" not in run(models, solver, "dps", 0.0, **options)


def test_strengths_are_those_of_the_steps_really_guided(models):
    """Of mean 1 over them: the first of a flow starts from pure noise, and takes no part."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guided_sampling, "guide", lambda *args, weights, **options: found.append(weights) or guide(*args, weights=weights, **options))
        run(models, "flow", "tfg", 1.0)
    assert [sum(column) for column in zip(*found)] == pytest.approx([len(found)] * 2) and len(found) == 3


@pytest.mark.parametrize("name", ["mpgd", "dps"])
def test_an_autoencoder_that_is_cast_for_the_decoding_is_guided_through(name):
    pipeline, call = FAMILIES["sdxl"].build().to(torch.float16), {**FAMILIES["sdxl"].call, "num_inference_steps": 2, "output_type": "pt"}
    guided = RewardGuidedPipeline(pipeline, reward=redness)("a fox", preset=name, reward_scale=0.1, generator=seeds(0)[0], **call)
    assert guided.guided_values.isfinite().all() and pipeline.vae.dtype == torch.float16


@pytest.mark.parametrize("preset", ["mpgd", "freedom"])
def test_small_gradients_are_not_lost_in_float16(preset):
    """Presets that measure a gradient by its own size, with and without the way back through the denoiser, move as far for a reward in small units."""

    def shift(dtype):
        pipeline, call = FAMILIES["sd15"].build().to(dtype), {**FAMILIES["sd15"].call, "num_inference_steps": 3, "output_type": "latent"}
        guided = RewardGuidedPipeline(pipeline, reward=lambda images, prompts, **columns: 1e-4 * images.flatten(1).mean(1))
        after, before = (guided("a", preset=preset, reward_scale=scale, generator=torch.Generator().manual_seed(0), **call) for scale in (10.0, 0.0))
        return (after.images - before.images).float().flatten()

    half, full = shift(torch.float16), shift(torch.float32)
    assert torch.nn.functional.cosine_similarity(half, full, dim=0) > 0.98 and half.norm() / full.norm() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("offload", [lambda pipe: accelerate.cpu_offload_with_hook(pipe.vae, "cpu"), lambda pipe: accelerate.cpu_offload(pipe.unet, "cpu")])
def test_offloaded_weights_have_no_way_back(offload):
    """By the whole model or by layer; without gradients the pipelines run."""
    pipeline, call = FAMILIES["sd15"].build(), {**FAMILIES["sd15"].call, "num_inference_steps": 2, "output_type": "pt"}
    offload(pipeline)
    for guided, options in (
        (RewardGuidedPipeline, {"preset": "mpgd"}), (RewardGuidedPipeline, {"preset": "dps"}), (ParticleSteeringPipeline, {"gradient": True}),
        (NoiseOptimizationPipeline, {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is offloaded"):
            guided(pipeline, reward=redness)("a fox", **options, **call)
    assert ParticleSteeringPipeline(pipeline, reward=redness)("a fox", **call).rewards.isfinite().all()


def test_a_pipeline_may_write_into_the_states_that_guidance_hands_out(models):
    def rewritten(pipeline, k, timestep, given):
        given["latents"][:] = given["latents"].clone()
        return {}

    expected = run(models, "ddim", "dps")
    found = run(models, "ddim", "dps", callback_on_step_end=rewritten)
    assert torch.equal(found.images, expected.images) and torch.equal(found.guided_values, expected.guided_values)


def test_a_pipeline_that_knows_one_number_of_steps_is_guided():
    """What decodes in the middle of a call asks for two steps, which a distilled checkpoint refuses."""
    case = CASES["Cosmos3DistilledModularPipeline"][0]
    pipeline = RewardGuidedPipeline(case.build(), reward=lambda videos, prompts: videos.flatten(1).mean(1))
    plain, steered = (
        pipeline([case.prompts[0]], generator=[torch.Generator().manual_seed(1)], reward_scale=scale, output_type="pt", **case.call).rewards
        for scale in (0.0, 5.0)
    )
    assert steered.isfinite().all() and float(steered) > float(plain)


def test_a_generator_of_several_calls_gives_each_of_them_other_noise_of_guidance():
    fresh, used = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    first = noise_seeds(fresh, 2)
    assert first == noise_seeds(fresh, 2) == noise_seeds(torch.Generator().manual_seed(3), 2)
    torch.rand(5, generator=used)
    before = used.get_state()
    assert not set(first) & set(noise_seeds(used, 2)) and torch.equal(used.get_state(), before)
    assert noise_seeds([fresh], 1) != noise_seeds([used], 1)
