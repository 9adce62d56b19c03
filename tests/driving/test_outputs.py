"""Outputs of older pipelines have the form that is asked for: pictures are tensors in [0, 1] with their graph, and a call without latents is made once."""

import diffusers
import pytest
import torch

from diffusers_align import Policy
from diffusers_align.driving.outputs import makes_arrays, returns_latents
from diffusers_align.pipelines import BestOfNPipeline
from tests.families.cases import CASES


def built(name):
    case = CASES[name][0]
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, case


def rollout(name):
    pipeline, case = built(name)
    policy = Policy(pipeline, **case.call)
    return policy, policy.rollout(None if case.prompts is None else list(case.prompts), seeds=[1, 2], per_sample=case.per_sample)


@pytest.mark.parametrize(
    "name", ["Kandinsky3Pipeline", "KandinskyV22Pipeline", "KandinskyPipeline", "LDMPipeline", "DDIMPipeline", "StableDiffusionAdapterPipeline"]
)
def test_decoded_pictures_are_those_of_the_arrays(name):
    policy, trajectory = rollout(name)
    arrays = []
    policy.pipeline.numpy_to_pil = lambda images: arrays.append(torch.from_numpy(images)) or []

    def put(step):
        step.skip()
        return step.like(trajectory.final if step.child == 0 else step.sample)

    with torch.no_grad():
        images = policy.decode(trajectory.final, trajectory.condition)
        policy.drive(trajectory.condition, put, needs_denoiser=lambda k: False, output_type="pil")
    assert images.min() >= 0 and images.max() <= 1 and images.shape[:2] == (2, 3)
    assert torch.equal(images, arrays[0].movedim(-1, -3))
    leaf = trajectory.final.clone().requires_grad_()
    (slope,) = torch.autograd.grad(policy.decode(leaf, trajectory.condition).sum(), leaf)
    assert slope.abs().sum() > 0


def test_rewards_see_pictures_in_their_range_where_stock_tensors_are_not():
    pipeline, case = built("IFPipeline")
    prompts, seen = list(case.prompts), []
    raw = pipeline(prompts, **case.call, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    BestOfNPipeline(pipeline, lambda images, prompts: seen.append(images) or images.flatten(1).mean(1))(
        prompts, num_candidates=1, generator=torch.Generator().manual_seed(0), **case.call
    )
    assert raw.min() < 0
    torch.testing.assert_close(seen[0], (raw / 2 + 0.5).clamp(0, 1))


def test_a_precision_that_arrays_lack_is_no_obstacle():
    pipeline, case = built("DDIMPipeline")
    policy = Policy(pipeline.to(torch.bfloat16), **case.call)
    trajectory = policy.rollout(None, seeds=[1, 2])
    assert policy.decode(trajectory.final, trajectory.condition).shape == (2, 3, 8, 8)


def test_a_call_without_latents_is_made_once(monkeypatch):
    policy, first = rollout("KandinskyV22ControlnetPipeline")
    calls, original = [], type(policy.pipeline.movq).decode
    monkeypatch.setattr(type(policy.pipeline.movq), "decode", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    again = policy.rollout(first.condition.prompts, seeds=[1, 2], per_sample=first.condition.per_sample)
    assert torch.equal(again.final, first.final) and len(calls) == 1


@pytest.mark.parametrize("name, latents, arrays", [("StableDiffusionPipeline", True, False), ("KandinskyPipeline", False, True), ("DDPMPipeline", False, True)])
def test_it_is_read_from_the_pipelines_code(name, latents, arrays):
    pipeline = object.__new__(getattr(diffusers, name))
    assert (returns_latents(pipeline), makes_arrays(pipeline)) == (latents, arrays)


def test_a_pipeline_of_pixels_that_takes_pt_for_latents_gives_pictures_in_0_to_1():
    pipeline, case = built("PRXPixelPipeline")
    policy = Policy(pipeline, **case.call)
    latents = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0])[torch.arange(3 * 16 * 16).reshape(1, 3, 16, 16) % 6].requires_grad_()
    with torch.enable_grad():
        images = policy.decode(latents, policy.condition([case.prompts[0]], seeds=[1]))
    torch.testing.assert_close(images, (latents.detach() / 2 + 0.5).clamp(0, 1))
    images.sum().backward()
    assert torch.equal(latents.grad, 0.5 * (latents.detach().abs() <= 1))


def test_what_a_prior_makes_is_no_picture():
    policy, trajectory = rollout("WuerstchenPriorPipeline")
    with pytest.raises(ValueError, match="WuerstchenPriorPipeline makes no pictures"):
        policy.decode(trajectory.final, trajectory.condition)
