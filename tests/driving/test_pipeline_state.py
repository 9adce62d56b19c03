"""Abandoned calls leave nothing behind."""

import copy
import pickle

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from policies_again import errors_of_replay, policy_of
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline
from tests.families.cases import CASES

PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]


# --- abandoned calls --------------------------------------------------------------------------------------------------


def perturbed_attention() -> diffusers.DiffusionPipeline:
    """Its call puts attention processors of its own into the denoiser, and takes them out at its end."""
    parts = {name: part for name, part in FAMILIES["sd15"].build().components.items() if name not in ("image_encoder",)}
    pipeline = diffusers.StableDiffusionPAGPipeline(**parts, image_encoder=None, requires_safety_checker=False, pag_applied_layers=["mid"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def processors(pipeline) -> list[str]:
    return [type(processor).__name__ for processor in pipeline.unet.attn_processors.values()]


def reward(images, prompts):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("cls, options", [(ParticleSteeringPipeline, {"num_particles": 2, "resample_every": 1}), (BestOfNPipeline, {"num_candidates": 2})])
def test_pipelines_leave_no_attention_processors_behind(cls, options):
    pipeline = perturbed_attention()
    before = processors(pipeline)
    cls(pipeline, reward=reward)(PROMPTS, **options, **FAMILIES["sd15"].call, pag_scale=2.0, output_type="pt")
    assert processors(pipeline) == before and "PAG" not in "".join(before)


def test_a_call_that_raises_leaves_the_pipeline_as_it_was():
    policy = Policy(perturbed_attention(), **FAMILIES["sd15"].call, pag_scale=2.0)
    trajectory, before, seen = policy.rollout(PROMPTS, seeds=SEEDS), processors(policy.pipeline), []
    attributes = dict(policy.pipeline.__dict__)

    def leave(k, kernel):
        seen.extend(processors(policy.pipeline))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        policy.replay(trajectory, leave)
    assert "PAG" in "".join(seen) and processors(policy.pipeline) == before and policy.pipeline.__dict__.keys() == attributes.keys()
    assert errors_of_replay(policy, trajectory) == [0.0] * len(trajectory.noisy_steps)


def test_hooks_and_scales_of_a_call_that_raises_are_put_back():
    policy = policy_of()
    policy.add_lora(rank=1)
    unet, trajectory = policy.pipeline.unet, policy.rollout(PROMPTS, seeds=SEEDS)
    kept = unet.mid_block.register_forward_hook(lambda *_: None)
    layer = next(module for module in unet.modules() if hasattr(module, "scaling"))
    before = dict(layer.scaling)

    def leave(k, kernel):
        unet.mid_block.register_forward_hook(lambda *_: None)
        unet.conv_in.register_forward_pre_hook(lambda *_: None)
        unet.conv_out.forward = lambda x: x
        layer.scale_layer(0.5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        policy.replay(trajectory, leave)
    assert list(unet.mid_block._forward_hooks) == [kept.id] and not unet.conv_in._forward_pre_hooks and "forward" not in vars(unet.conv_out)
    assert layer.scaling == before
    kept.remove()
    assert errors_of_replay(policy, trajectory) == [0.0] * len(trajectory.noisy_steps)


def test_a_text_encoder_keeps_what_its_first_call_installed():
    """An abandoned call must not take away half of it: later prompts would be encoded otherwise."""
    policy = policy_of("sd3")
    condition = policy.condition(PROMPTS[:1])
    first, second = (policy.prompt_features(condition) for _ in range(2))
    assert torch.equal(first, second)


def test_copies_and_pickles_of_a_policy_are_the_same_policy():
    policy = policy_of()
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    for copied in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert copied.pipeline is not policy.pipeline and not copied.prompt_memory.entries
        assert torch.equal(copied.rollout(PROMPTS, seeds=SEEDS).actions, trajectory.actions)


def test_a_cached_denoiser_starts_anew_after_a_call_that_raised():
    policy = policy_of("flux")
    policy.pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)

    def leave(k, kernel):
        raise KeyboardInterrupt

    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        policy.replay(trajectory, leave)
    assert torch.equal(policy.rollout(PROMPTS, seeds=SEEDS).actions, trajectory.actions)


def test_attention_processors_are_put_back_where_a_pipeline_returns_before_it_does_so():
    """It does for latents."""
    case = CASES["StableDiffusionXLPAGInpaintPipeline"][0]
    policy = Policy(case.build(), **case.call)
    before = dict(policy.pipeline.unet.attn_processors)
    policy.rollout(list(case.prompts), seeds=[1, 2], per_sample=case.per_sample)
    assert policy.pipeline.unet.attn_processors == before


def test_a_model_without_its_switch_has_gradients():
    """Z-Image's control net reads `gradient_checkpointing` wherever autograd is on, and never sets it."""
    case = CASES["ZImageControlNetPipeline"][0]
    policy = Policy(case.build(), **case.call)
    trajectory = policy.rollout(list(case.prompts), seeds=SEEDS, per_sample=case.per_sample)
    policy.add_lora(2)
    assert errors_of_replay(policy, trajectory) == [0.0] * len(trajectory.noisy_steps)
    policy.transition(trajectory, 1).mean.sum().backward()
    assert any(bool(p.grad.any()) for p in policy.trainable_parameters() if p.grad is not None)
    assert not hasattr(policy.pipeline.controlnet, "gradient_checkpointing")
