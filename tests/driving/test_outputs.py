"""Outputs of older pipelines have the form that is asked for: pictures are tensors in [0, 1] with their graph, and a call without latents is made once."""

import diffusers
import pytest
import torch

from diffusers_align import Policy
from diffusers_align.driving.outputs import form_asked, makes_arrays, returns_latents
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


@pytest.mark.parametrize(
    "name, latents, arrays",
    [
        ("StableDiffusionPipeline", True, False),
        ("KandinskyPipeline", False, True),
        ("DDPMPipeline", False, True),
        ("MarigoldDepthPipeline", False, False),  # it has another switch, and refuses the word
        ("QwenImageLayeredPipeline", False, False),  # it returns a name that it assigns for pictures alone
        ("AudioLDM2Pipeline", True, False),  # it returns in the branch itself
    ],
)
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


@pytest.mark.parametrize("name", ["MarigoldDepthPipeline", "StableDiffusionLDM3DPipeline", "QwenImageLayeredPipeline"])
def test_a_roll_out_needs_no_latents_of_the_call(name):
    case = CASES[name][0]
    pipeline, size = built(name)[0], 1 if case.one_sample else 2
    policy = Policy(pipeline, **case.call)
    own = {argument: value[:size] for argument, value in case.per_sample.items()}
    trajectory = policy.rollout(None if case.prompts is None else list(case.prompts[:size]), seeds=[1, 2][:size], per_sample=own)
    leaf = trajectory.final.clone().requires_grad_()
    images = policy.decode(leaf, trajectory.condition)
    assert images.shape[0] == size and images.shape[-3] == 3 and images.min() >= 0 and images.max() <= 1
    (slope,) = torch.autograd.grad(images.sum(), leaf)
    assert slope.abs().sum() > 0


def test_a_processor_that_makes_no_tensors_is_asked_for_arrays():
    pipeline, _ = built("StableDiffusionLDM3DPipeline")
    assert form_asked(pipeline, "latent") == form_asked(pipeline, "pt") == ({"output_type": "np"}, True)
    assert form_asked(pipeline, "pil") == ({"output_type": "pil"}, False)


def test_a_call_without_an_output_type_gives_its_sound_as_a_tensor_with_a_rate():
    pipeline, case = built("DanceDiffusionPipeline")
    heard = []

    def reward(sounds, prompts, sampling_rate):
        heard.append((sounds, sampling_rate))
        return sounds.flatten(1).mean(1)

    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    output = BestOfNPipeline(pipeline, reward)(["", ""], num_candidates=2, generator=generators, output_type="pt", **case.call)
    assert form_asked(pipeline, "pt") == ({}, True) and heard[0][1] == pipeline.unet.config.sample_rate
    assert heard[0][0].ndim == 3 and torch.equal(output.audios.flatten(1).mean(1), output.rewards.max(1).values)
