"""Combined pipelines: their parts walk the policy's scheduler, let gradients through, and are as before afterwards."""

import copy

import pytest
import torch
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.driving.parts import components_of, parts_apart, parts_of
from diffusers_align.driving.stock import stock_images
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.pipelines import BestOfNPipeline
from tests.families.cases import CASES

CASE = CASES["KandinskyV22CombinedPipeline"][0]
PROMPTS, SEEDS = list(CASE.prompts), [11, 12]


@pytest.fixture(scope="module")
def policy():
    policy = Policy(CASE.build(), **CASE.call)
    policy.add_lora(rank=2)
    return policy


def test_replays_are_bit_equal_and_have_gradients(policy):
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    assert trajectory.noisy_steps == [0, 1, 2]

    def on_step(k, transition):
        log_prob = transition.log_prob(trajectory.actions[:, k])
        assert torch.equal(log_prob, trajectory.log_probs[:, k])
        log_prob.sum().backward()

    policy.replay(trajectory, on_step)
    assert sum(float(p.grad.abs().sum()) for p in policy.trainable_parameters() if p.grad is not None) > 0


def test_the_walk_of_the_stock_solver_is_the_stock_call(policy):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    # Its stock tensors are from -1 to 1.
    expected = torch.from_numpy(CASE.build()(PROMPTS, generator=generators, output_type="np", **CASE.call)[0]).movedim(-1, 1)
    with policy.reference():
        assert torch.equal(stock_images(policy, policy.condition(PROMPTS, seeds=SEEDS)), expected)


def test_a_gradient_of_the_pictures_comes_through(policy):
    rollout = differentiable_rollout(policy, policy.condition(PROMPTS, seeds=SEEDS), grad_steps=[3])
    rollout.latents.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in policy.trainable_parameters() if p.grad is not None)
    assert rollout.images.requires_grad


def test_the_parts_are_as_before(policy):
    parts = parts_of(policy.pipeline)
    before = [(type(part), part.scheduler, dict(part.__dict__)) for part in parts]
    policy.rollout(PROMPTS, seeds=SEEDS)
    assert len(parts) == 2
    for part, (cls, scheduler, attributes) in zip(parts, before):
        assert type(part) is cls and part.scheduler is scheduler
        assert part.__dict__.get("_progress_bar_config") == attributes.get("_progress_bar_config")
    assert parts[1].scheduler is policy.stock_scheduler and parts[0].scheduler is policy.pipeline.prior_scheduler


def test_a_part_may_hold_another_of_the_pipelines_schedulers():
    """The prior's steps are no steps of the policy."""
    policy = Policy(CASE.build(), **{**CASE.call, "prior_num_inference_steps": 7})
    assert policy.rollout(PROMPTS, seeds=SEEDS).num_steps == CASE.call["num_inference_steps"]


def test_a_progress_bar_around_a_combined_pipeline():
    """Its own returns none."""
    pipeline = CASE.build()
    pipeline.set_progress_bar_config(disable=True)
    best = BestOfNPipeline(pipeline, reward=lambda images, prompts: images.flatten(1).mean(1))
    output = best(PROMPTS, num_candidates=2, generator=torch.Generator().manual_seed(0), output_type="pt", **CASE.call)
    assert output.images.shape == (2, 3, 16, 16)


def test_a_part_with_a_scheduler_of_its_own_is_no_denoiser_of_the_policy():
    """What it samples is what the policy's steps start from: it is asked for real whatever step is wanted."""
    case = CASES["WuerstchenCombinedPipeline"][0]
    policy = Policy(case.build(), **case.call)
    assert [type(part).__name__ for part in parts_apart(policy.pipeline)] == ["WuerstchenPriorPipeline"]
    assert list(policy.denoisers) == ["decoder"]
    trajectory = policy.rollout([case.prompts[0]], seeds=[1])
    whole = policy.transitions(trajectory)
    assert torch.equal(policy.transition(trajectory, 1).mean, whole[1].mean)


@pytest.mark.parametrize("family", FAMILIES)
def test_components_without_a_look_at_the_signature(family, monkeypatch):
    pipeline = FAMILIES[family].build()
    for _ in range(2):
        assert components_of(pipeline) == pipeline.components and list(components_of(pipeline)) == list(pipeline.components)
        pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
    expected, asked = pipeline.components, type(pipeline)._get_signature_keys
    monkeypatch.setattr(type(pipeline), "_get_signature_keys", lambda _: pytest.fail("it was looked at"))
    assert components_of(pipeline) == expected
    monkeypatch.setattr(type(pipeline), "_get_signature_keys", asked)
    pipeline.register_modules(tokenizer_of_mine=None)
    with pytest.raises(ValueError, match="incorrectly initialized"):
        components_of(pipeline)
