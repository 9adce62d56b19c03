"""A modular pipeline is a policy as a classic one is: with the same components and seeds, the same samples, and the same of everything else.

Tolerances: blocks evaluate the two predictions of guidance one after the other, classic pipelines in one batch, which kernels round differently.
"""

import copy
import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from modular_pipelines import TWINS, build
from PIL import Image
from tiny_pipelines import FAMILIES
from torch import nn

from diffusers_align import Policy
from diffusers_align.data.cache import TensorCache
from diffusers_align.driving.calls import calls_of
from diffusers_align.gradients.rollout import differentiable_rollout

PROMPTS, SEEDS = ["a cat", "a large red dog"], [1, 2]
# These guide by another formula, or another number, than their classic twins.
GUIDED_OTHERWISE = {"qwen_image", "z_image"}
EQUAL = [name for name in TWINS if name not in GUIDED_OTHERWISE]


@functools.cache
def both(name):
    """The modular and the classic policy, with a roll-out each."""
    pipeline, call = build(name)
    policies = Policy(pipeline, **call), Policy(FAMILIES[name].build(), **FAMILIES[name].call)
    return [(policy, policy.rollout(PROMPTS, seeds=SEEDS)) for policy in policies]


def near(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", TWINS)
def test_equal_seeds_give_the_classic_pipelines_samples(name):
    (_, modular), (_, classic) = both(name)
    assert torch.equal(modular.states[:, 0], classic.states[:, 0])
    torch.testing.assert_close(modular.sigmas, classic.sigmas, equal_nan=True)
    if name in EQUAL:
        near(modular.final, classic.final)


def test_arguments_that_the_chosen_blocks_do_not_read_are_said_once(caplog):
    def said():
        return [message[: message.index(":")] for message in caplog.messages if "has no use for" in message]

    pipeline, call = build("sd3")
    policy, pictures = Policy(pipeline, **call), [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    with caplog.at_level(logging.WARNING):
        policy.rollout(PROMPTS, seeds=SEEDS)
        assert not said()
        for _ in range(2):
            policy.rollout(PROMPTS, seeds=SEEDS, strength=0.5)
        assert said() == ["This call of StableDiffusion3ModularPipeline has no use for strength"]
        caplog.clear()
        policy.rollout(PROMPTS, seeds=SEEDS, strength=0.5, per_sample={"image": pictures})
    assert not said()


@pytest.mark.parametrize("name", TWINS)
def test_everything_of_a_policy_is_as_the_classic_pipelines(name):
    (policy, trajectory), (classic, _) = both(name)
    condition, own = policy.condition(PROMPTS, seeds=SEEDS), classic.condition(PROMPTS, seeds=SEEDS)
    images = policy.decode(trajectory.final)
    near(images, classic.decode(trajectory.final))
    near(policy.encode(images), classic.encode(images))
    times = torch.tensor([300.0, 700.0])
    near(policy.predict(trajectory.final, times, condition), classic.predict(trajectory.final, times, own))
    near(policy.prompt_features(condition), classic.prompt_features(own))
    if name in EQUAL:
        near(policy.predict(trajectory.final, times, condition, guidance=True), classic.predict(trajectory.final, times, own, guidance=True))
        near(policy.complete(trajectory, 2), classic.complete(trajectory, 2))
    assert torch.equal(policy.complete(trajectory, trajectory.num_steps), trajectory.final)


@pytest.mark.parametrize("name", TWINS)
def test_a_replay_has_the_very_log_probabilities_and_a_gradient(name):
    pipeline, call = build(name)
    policy = Policy(pipeline, **call)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    parameters, steps = policy.add_lora(rank=2), []

    def on_step(k, kernel):
        log_prob = kernel.log_prob(trajectory.actions[:, k])
        assert torch.equal(log_prob, trajectory.log_probs[:, k])
        log_prob.sum().backward()
        steps.append(k)

    policy.replay(trajectory, on_step)
    assert steps == trajectory.noisy_steps
    assert sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None) > 0
    last = steps[-1]
    assert torch.equal(policy.transition(trajectory, last).log_prob(trajectory.actions[:, last]), trajectory.log_probs[:, last])
    policy.check_reproducible(trajectory)


@pytest.mark.parametrize("name", TWINS)
def test_reward_gradients_come_through_the_blocks(name):
    (policy, _), (classic, _) = both(name)
    rollout = differentiable_rollout(policy, policy.condition(PROMPTS, seeds=SEEDS), grad_steps=[1, 3], noise_gradient=True)
    rollout.images.sum().backward()
    assert rollout.noise.grad.abs().sum() > 0 and all(step.model_output.requires_grad for step in rollout.steps.values())
    if name in EQUAL:
        other = differentiable_rollout(classic, classic.condition(PROMPTS, seeds=SEEDS), grad_steps=[], noise=rollout.noise.detach())
        near(rollout.images, other.images)


def test_a_sample_is_the_same_whatever_is_drawn_beside_it():
    (policy, trajectory), _ = both("sd3")
    alone = policy.rollout(PROMPTS[1:], seeds=SEEDS[1:])
    assert torch.equal(alone.states[0, 0], trajectory.states[1, 0])
    near(alone.final[0], trajectory.final[1])


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_prompts_are_encoded_once_and_by_prompt_in_a_store(name, tmp_path):
    pipeline, call = build(name)
    policy, calls = Policy(pipeline, **call), []
    policy.remember_prompts(8, TensorCache(tmp_path, "a model"))
    pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    assert calls
    calls.clear()
    policy.replay(trajectory, lambda k, kernel: None)
    policy.predict(trajectory.final, torch.tensor([300.0, 700.0]), trajectory.condition)
    turned = policy.rollout(PROMPTS[::-1], seeds=SEEDS)
    assert not calls
    near(turned.final, Policy(build(name)[0], **call).rollout(PROMPTS[::-1], seeds=SEEDS).final)


def test_inputs_are_those_of_the_blocks_and_of_the_guider():
    pipeline, call = build("sd3")
    policy = Policy(pipeline, **call)
    assert policy.parameters["num_images_per_prompt"].default == 1
    assert policy.parameters["guidance_scale"].default == pipeline.guider.guidance_scale
    with pytest.raises(ValueError, match="no guidance_scal.*Did you mean 'guidance_scale'"):
        policy.condition(PROMPTS, guidance_scal=2.0)
    with pytest.raises(ValueError, match="output_type cannot be"):
        policy.condition(PROMPTS, output_type="pt")


def test_a_pipeline_whose_components_are_not_loaded_says_so():
    import diffusers

    with pytest.raises(ValueError, match=r"transformer.* have not been loaded: call load_components\(\) first"):
        Policy(diffusers.StableDiffusion3ModularPipeline())


def state(pipeline):
    return {**{n: v for n, v in vars(pipeline).items() if n not in ("config", "_internal_dict")}, "guider": vars(pipeline.guider).copy()}


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_leaves_the_pipeline_as_it_was(fails):
    pipeline, call = build("sdxl")
    policy = Policy(pipeline, **call)
    before, blocks = state(pipeline), [vars(block).copy() for block in blocks_of(pipeline._blocks)]

    def on_step(step):
        if fails and step.k == 1:
            raise KeyError("ours")

    with pytest.raises(KeyError) if fails else torch.no_grad():
        policy.drive(policy.condition(PROMPTS, seeds=SEEDS), on_step)
    after = state(pipeline)
    assert before["guider"] == after.pop("guider")
    assert all(after[name] is before[name] for name in after)
    assert blocks == [vars(block) for block in blocks_of(pipeline._blocks)]


def blocks_of(block):
    return [block, *(inner for part in block.sub_blocks.values() for inner in blocks_of(part))]


def test_two_threads_run_two_pipelines_of_a_class():
    """Their blocks are the same objects: diffusers keeps them in the class. One has gradients, the other has not."""
    (first, call), (second, _) = build("sd3"), build("sd3")
    shared = set(map(id, blocks_of(first._blocks))) & set(map(id, blocks_of(second._blocks)))
    assert shared, "blocks are each pipeline's own now: say so in driving/blocks.py"
    policies = [Policy(pipeline, **call) for pipeline in (first, second)]
    expected = policies[0].rollout(PROMPTS, seeds=SEEDS)

    def differentiated(policy):
        policy.add_lora(rank=2)
        rollout = differentiable_rollout(policy, policy.condition(PROMPTS, seeds=SEEDS), grad_steps=[0, 1, 2, 3], stochastic=True)
        return rollout.latents

    with ThreadPoolExecutor(2) as threads:
        one, other = [threads.submit(differentiated, policies[0]) for _ in range(1)][0], threads.submit(policies[1].rollout, PROMPTS, seeds=SEEDS)
        latents, trajectory = one.result(120), other.result(120)
    assert latents.requires_grad and not trajectory.final.requires_grad
    assert torch.equal(trajectory.final, expected.final)
    near(latents.detach(), expected.final)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_a_lora_goes_to_either_kind(name, tmp_path):
    pipeline, call = build(name)
    policy = Policy(pipeline, **call)
    for parameter in policy.add_lora(rank=2):
        nn.init.normal_(parameter, std=0.1)
    policy.save_lora(tmp_path)
    trained = policy.rollout(PROMPTS, seeds=SEEDS)
    with policy.reference():
        assert not torch.equal(policy.rollout(PROMPTS, seeds=SEEDS).final, trained.final)
    again, own = build(name)
    again.load_lora_weights(tmp_path)
    assert torch.equal(Policy(again, **own).rollout(PROMPTS, seeds=SEEDS).final, trained.final)
    loaded = Policy(build(name)[0], **call)
    loaded.load_lora(tmp_path)
    assert torch.equal(loaded.rollout(PROMPTS, seeds=SEEDS).final, trained.final)
    classic = FAMILIES[name].build()
    classic.load_lora_weights(tmp_path)
    near(Policy(classic, **FAMILIES[name].call).rollout(PROMPTS, seeds=SEEDS).final, trained.final)


def test_what_comes_after_the_last_step_is_left_out_where_latents_are_wanted():
    pipeline, call = build("sd3")
    policy, decoded = Policy(pipeline, **call), []
    pipeline.vae.decoder.register_forward_pre_hook(lambda *_: decoded.append(1))
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    assert not decoded
    policy.decode(trajectory.final)
    assert decoded


def test_a_pipeline_starts_from_noise_alone_unless_it_is_given_a_picture():
    calls = calls_of(build("sd3")[0])
    assert calls.starts_from_noise({"prompt": PROMPTS}) and not calls.starts_from_noise({"prompt": PROMPTS, "image": object()})
    assert {"prompt"} <= calls.of_a_call({"prompt": ""}) and not {"image", "strength"} & calls.of_a_call({"prompt": ""})
    assert {"image", "strength"} <= calls.of_a_call({"prompt": "", "image": object()})


def test_the_latents_that_denoising_starts_from_are_changed():
    pipeline, call = build("sd3")
    policy = Policy(pipeline, **call)
    expected = policy.rollout(PROMPTS, seeds=SEEDS).states[:, 0]
    with calls_of(pipeline).prepared_latents(lambda latents: 2 * latents):
        found = policy.rollout(PROMPTS, seeds=SEEDS).states[:, 0]
    assert torch.equal(found, 2 * expected)


def test_a_copied_policy_is_one():
    (policy, trajectory), _ = both("sd3")
    assert torch.equal(copy.deepcopy(policy).rollout(PROMPTS, seeds=SEEDS).final, trajectory.final)
