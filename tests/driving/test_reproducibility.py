"""A call made again is the same call: arguments stay the caller's, every draw has a seed, abandoned calls leave nothing behind."""

import copy
import inspect

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from policies_again import changed, errors_of_replay, policy_of
from several_schedulers import HalvesApart
from tiny_pipelines import FAMILIES
from wrapping import brightness

from diffusers_align import Policy
from diffusers_align.driving.stock import stock_images
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline, RewardGuidedPipeline

PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]


# --- arguments --------------------------------------------------------------------------------------------------------


def test_a_pipeline_that_writes_into_its_arguments_does_not_reach_the_callers():
    """Chat templates are written into the list of negative prompts."""
    policy = policy_of("z_image", negative_prompt=["blurry", "dark"], guidance_scale=3.0)
    given = policy.call_kwargs["negative_prompt"]
    first = policy.rollout(PROMPTS, seeds=SEEDS)
    assert given == ["blurry", "dark"] == first.condition.per_sample["negative_prompt"]
    assert torch.equal(policy.rollout(PROMPTS, seeds=SEEDS).actions, first.actions)
    assert errors_of_replay(policy, first) == [0.0] * len(first.noisy_steps)


def test_nested_arguments_and_tensors_are_copied():
    pipeline = FAMILIES["sd15"].build()

    def writing(stock, *args, **kwargs):
        seen["call"]["cross_attention_kwargs"]["list"][0] = "written"
        seen["call"]["latents"].add_(1)
        return stock(*args, **kwargs)

    seen, given, latents = {}, {"list": ["own"]}, torch.zeros(2, 4, 8, 8)
    stock_call = type(pipeline).__call__

    class Keeping(type(pipeline)):
        def __call__(self, **call):
            seen["call"] = call
            return stock_call(self, **{**call, "cross_attention_kwargs": None})

        __call__.__signature__ = inspect.signature(stock_call)

    pipeline.__class__ = Keeping
    changed(pipeline, "encode_prompt", writing)
    Policy(pipeline, **FAMILIES["sd15"].call).rollout(PROMPTS, seeds=SEEDS, cross_attention_kwargs=given, latents=latents)
    assert given == {"list": ["own"]} and torch.equal(latents, torch.zeros(2, 4, 8, 8))


# --- draws ------------------------------------------------------------------------------------------------------------


def draws_globally(pipeline) -> None:
    """Each denoiser call adds noise of torch's global generator, as control pictures are encoded by a draw."""
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda sample, *args, **kwargs: forward(sample + 0.1 * torch.randn_like(sample), *args, **kwargs)


def test_draws_from_the_global_generator_are_fixed_by_the_seeds_and_leave_it_alone():
    policy = policy_of()
    draws_globally(policy.pipeline)
    state = torch.get_rng_state()
    first = policy.rollout(PROMPTS, seeds=SEEDS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(policy.rollout(PROMPTS, seeds=SEEDS).actions, first.actions)
    assert not torch.equal(policy.rollout(PROMPTS, seeds=[3, 4]).actions, first.actions)
    assert errors_of_replay(policy, first) == [0.0] * len(first.noisy_steps)
    policy.check_reproducible(first)


def test_a_pipeline_whose_samples_no_seed_fixes_is_found_out():
    policy, source = policy_of(), torch.Generator().manual_seed(0)
    forward = policy.pipeline.unet.forward
    policy.pipeline.unet.forward = lambda sample, *a, **k: forward(sample + 0.1 * torch.randn(sample.shape, generator=source), *a, **k)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    with pytest.raises(ValueError, match="A second roll-out with the same seeds is not the first one from solver step 0 on"):
        policy.check_reproducible(trajectory)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_check_passes_costs_two_steps_and_is_made_once(name, deterministic):
    policy = policy_of(name)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS, deterministic=deterministic)
    calls = []
    handle = next(iter(policy.denoisers.values())).register_forward_hook(lambda *args: calls.append(1))
    policy.check_reproducible(trajectory)
    policy.check_reproducible(trajectory)
    handle.remove()
    assert len(calls) == 2


# --- rows -------------------------------------------------------------------------------------------------------------


def test_another_number_of_samples_than_prompts_is_refused():
    policy = policy_of()
    changed(policy.pipeline, "prepare_latents", lambda stock, batch, *args: stock(1, *args[:-2], args[-2][:1], args[-1]))
    changed(policy.pipeline, "encode_prompt", lambda stock, *args, **kwargs: tuple(x if x is None else x[:1] for x in stock(*args, **kwargs)))
    with pytest.raises(ValueError, match="made 1 samples for 2 prompts"):
        policy.rollout(PROMPTS, seeds=SEEDS)


def test_a_call_without_a_step_is_refused():
    policy = policy_of()
    elsewhere = copy.deepcopy(policy.stock_scheduler)
    elsewhere.set_timesteps(policy.call_kwargs["num_inference_steps"])
    changed(policy.pipeline, "prepare_extra_step_kwargs", lambda stock, *args: policy.pipeline.__dict__.update(scheduler=elsewhere) or {})
    with pytest.raises(ValueError, match="took no step of its scheduler"):
        policy.rollout(PROMPTS, seeds=SEEDS)


def test_copies_that_step_in_the_place_of_the_scheduler_are_searched_over_and_else_refused():
    pipeline = HalvesApart(**FAMILIES["sd15"].build().components)
    found = BestOfNPipeline(pipeline, brightness)("a cat", num_candidates=3, output_type="latent")
    assert found[0].shape == (1, 4, 8, 8) and int(found["chosen"][0]) == int(found["rewards"][0].argmax())
    own = pipeline("a cat", generator=torch.Generator().manual_seed(3), output_type="latent")[0]
    first = BestOfNPipeline(pipeline, brightness)("a cat", num_candidates=1, output_type="latent", generator=torch.Generator().manual_seed(3))
    assert torch.equal(first[0], own)
    for refused in (
        lambda: RewardGuidedPipeline(pipeline, brightness)("a cat"),
        lambda: ParticleSteeringPipeline(pipeline, brightness)("a cat"),
        lambda: Policy(pipeline).rollout(PROMPTS, seeds=SEEDS),
    ):
        with pytest.raises(ValueError, match="own scheduler takes no step: copies of it do, each for a part of the sample"):
            refused()


def test_a_pipeline_that_reads_what_the_twin_lacks_is_named():
    policy = policy_of()
    changed(policy.pipeline, "prepare_extra_step_kwargs", lambda stock, *args: policy.scheduler.sigmas)
    with pytest.raises(ValueError, match="reads 'sigmas' of its scheduler, which DDIMSDEScheduler does not have"):
        policy.rollout(PROMPTS, seeds=SEEDS)


def test_a_pipeline_without_a_scheduler_is_named():
    pipeline = FAMILIES["sd15"].build()
    del pipeline.scheduler
    with pytest.raises(ValueError, match="has no scheduler"):
        Policy(pipeline)


# --- carried state ----------------------------------------------------------------------------------------------------


def test_whole_replays_of_a_cached_denoiser_are_exact_and_others_refused():
    policy = policy_of("flux")
    policy.pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    assert errors_of_replay(policy, trajectory) == [0.0] * len(trajectory.noisy_steps)
    latents, times = trajectory.states[:, 1], trajectory.timesteps[[1, 1]]
    for partial in (
        lambda: policy.transition(trajectory, 1),
        lambda: policy.transitions(trajectory, [1]),
        lambda: policy.complete(trajectory, 1),
        lambda: policy.predict(latents, times, trajectory.condition),
        lambda: ParticleSteeringPipeline(policy.pipeline, reward=lambda images, prompts: images.mean((1, 2, 3)))(PROMPTS, **FAMILIES["flux"].call),
    ):
        with pytest.raises(ValueError, match="transformer has a FirstBlockCache"):
            partial()
    assert policy.decode(trajectory.final, trajectory.condition).shape == (2, 3, 16, 16)
    policy.pipeline.transformer.disable_cache()
    assert policy.transition(policy.rollout(PROMPTS, seeds=SEEDS), 1).mean.isfinite().all()


def caches_of(pipeline) -> dict:
    attention = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001)}
    return {
        "FirstBlockCache": FirstBlockCacheConfig(threshold=1e9),
        "MagCache": MagCacheConfig(threshold=10.0, max_skip_steps=2, retention_ratio=0.0, num_inference_steps=4, mag_ratios=torch.ones(4)),
        "TaylorSeerCache": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
        "PyramidAttentionBroadcast": PyramidAttentionBroadcastConfig(**attention, current_timestep_callback=lambda: pipeline.current_timestep),
    }


@pytest.mark.parametrize("name", ["FirstBlockCache", "MagCache", "TaylorSeerCache", "PyramidAttentionBroadcast"])
def test_samples_may_be_drawn_with_a_cache_and_gradients_are_refused_by_its_name(name):
    policy = policy_of("flux", num_inference_steps=4)
    policy.add_lora(rank=2)
    denoiser, condition = policy.pipeline.transformer, policy.condition(PROMPTS, seeds=SEEDS)
    plain = policy.rollout(condition)
    denoiser.enable_cache(caches_of(policy.pipeline)[name])
    first = policy.rollout(condition)
    assert not torch.equal(first.actions, plain.actions)
    policy.check_reproducible(first)  # leaves its second call in the middle
    policy.decode(first.final, condition)  # calls no denoiser
    stock_images(policy, condition)
    assert torch.equal(policy.rollout(condition).actions, first.actions), "no call goes on with what another one has computed"
    for graded in (lambda: policy.replay(first, lambda k, kernel: None), lambda: differentiable_rollout(policy, condition, grad_steps=[1])):
        with pytest.raises(ValueError, match=f"transformer has a {name}, which hands out .* pipeline.transformer.disable_cache()"):
            graded()
    # An update that needs no log-probabilities goes on without it, from the samples that were drawn with it.
    denoiser.disable_cache()
    assert policy.predict(first.final, first.timesteps[[1, 1]], condition).requires_grad
    assert torch.equal(policy.rollout(condition).actions, plain.actions)


def test_candidates_are_drawn_with_a_cache_as_the_pipeline_draws_them():
    pipeline, call = FAMILIES["flux"].build(), {**FAMILIES["flux"].call, "output_type": "latent"}
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    own = pipeline("a cat", generator=torch.Generator().manual_seed(3), **call)[0]
    found = BestOfNPipeline(pipeline, brightness)("a cat", num_candidates=1, generator=torch.Generator().manual_seed(3), **call)
    torch.testing.assert_close(found[0], own)


def with_momentum(policy: Policy) -> None:
    """What the loop makes of the denoiser's output adds up over the steps of a call, outside the denoiser and without a sign of it."""
    memory = {}

    def add_up(module, arguments, output):
        memory["sum"] = 0.5 * memory.get("sum", 0) + output[0]
        return (memory["sum"],)

    policy.pipeline.unet.register_forward_hook(add_up)
    changed(policy.pipeline, "prepare_latents", lambda stock, *args, **kwargs: memory.clear() or stock(*args, **kwargs))


def test_momentum_from_step_to_step_is_found_out():
    policy = policy_of()
    with_momentum(policy)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    assert errors_of_replay(policy, trajectory) == [0.0] * len(trajectory.noisy_steps)
    assert errors_of_replay(policy, trajectory, [0, 1]) == [0.0, 0.0]
    for partial in (lambda: policy.transition(trajectory, 2), lambda: policy.transitions(trajectory, [1, 2]), lambda: policy.complete(trajectory, 1)):
        with pytest.raises(ValueError, match="carries something from step to step beside its latents"):
            partial()


def test_state_that_acts_in_a_part_of_the_steps_is_found_out():
    """As a guider with momentum does that is switched off before the end."""
    policy = policy_of()
    memory = {"calls": 0}

    def add_up(module, arguments, output):
        memory["calls"] += 1
        memory["sum"] = 0.5 * memory.get("sum", 0) + output[0]
        return (memory["sum"],) if memory["calls"] <= 2 else output

    policy.pipeline.unet.register_forward_hook(add_up)
    changed(policy.pipeline, "prepare_latents", lambda stock, *args, **kwargs: memory.clear() or memory.update(calls=0) or stock(*args, **kwargs))
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    with pytest.raises(ValueError, match="carries something from step to step beside its latents"):
        policy.transition(trajectory, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_tested_family_carries_state(name):
    policy = policy_of(name)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    policy.transition(trajectory, trajectory.num_steps - 1)
