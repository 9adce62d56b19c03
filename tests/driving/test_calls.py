"""What a call is seen to do before it is made: take steps by a scheduler of its own, differentiate through its denoiser in its own loop."""

import copy
from pathlib import Path

import pytest
import torch
from several_schedulers import NoScheduler, SchedulersOfParts
from tiny_pipelines import FAMILIES
from wrapping import brightness

from diffusers_align import Policy, differentiable_rollout
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline, RewardGuidedPipeline
from tests.families.cases import CASES

WRAPPERS = (BestOfNPipeline, RewardGuidedPipeline, ParticleSteeringPipeline)


@pytest.mark.parametrize("use", [Policy, *(lambda pipe, wrapper=wrapper: wrapper(pipe, brightness)("a") for wrapper in WRAPPERS)])
def test_a_pipeline_without_a_scheduler_is_refused_in_words(use):
    parts = FAMILIES["sd15"].build()
    with pytest.raises(ValueError, match="NoScheduler has no scheduler of its own: it takes no steps"):
        use(NoScheduler(parts.unet))
    with pytest.raises(ValueError, match="its parts take their steps by prior_scheduler, decoder_scheduler one after the other"):
        use(SchedulersOfParts(parts.unet, parts.scheduler, copy.deepcopy(parts.scheduler)))


@pytest.mark.parametrize("name", ["mini-sd3", Path("mini-sd3")])
def test_the_name_of_a_pipeline_is_refused_with_what_to_do(name):
    with pytest.raises(TypeError, match="A loaded pipeline is needed, got the name 'mini-sd3': DiffusionPipeline.from_pretrained"):
        Policy(name)


# --- pipelines that differentiate through their denoiser: its calls are made for real there, and states follow the present weights ---


NAMES = ["StableDiffusionAttendAndExcitePipeline", "StableDiffusionPix2PixZeroPipeline"]
SEEDS = [1, 2]


def call_of(case) -> dict:
    """Without refinements of one step, of which there may be twenty."""
    return copy.deepcopy({name: {} if name == "thresholds" else value for name, value in case.call.items()})


def rolled_out(name: str):
    case = CASES[name][0]
    policy = Policy(case.build(), **call_of(case))
    return policy, policy.rollout(list(case.prompts), seeds=SEEDS, per_sample=copy.copy(case.per_sample) or None)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_by_itself_is_that_of_the_whole_replay_also_with_other_weights(name):
    policy, trajectory = rolled_out(name)
    for parameter in policy.add_lora(4):
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    whole = policy.transitions(trajectory)
    k = trajectory.noisy_steps[-1]
    assert torch.equal(whole[k].mean, policy.transitions(trajectory, [k])[k].mean)
    assert not torch.allclose(whole[k].log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k])


@pytest.mark.parametrize("name", NAMES)
def test_decoding_and_the_gradient_of_the_last_step(name):
    policy, trajectory = rolled_out(name)
    images = policy.decode(trajectory.final, trajectory.condition)
    assert images.shape == (2, 3, *images.shape[-2:]) and bool(images.isfinite().all())
    parameters = policy.add_lora(4)
    last = trajectory.num_steps - 1
    made = differentiable_rollout(policy, trajectory.condition, grad_steps=[last], stochastic=True)
    assert torch.equal(made.latents, trajectory.final)
    made.images.sum().backward()
    one = sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)
    for parameter in parameters:
        parameter.grad = None
    made = differentiable_rollout(policy, trajectory.condition, grad_steps=range(last + 1), stochastic=True)
    assert torch.equal(made.latents, trajectory.final)
    made.images.sum().backward()
    every = sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)
    assert 0 < one == pytest.approx(every, rel=1e-4)  # each step begins at a state without a graph


@pytest.mark.parametrize("name", NAMES)
def test_what_would_be_of_other_latents_is_refused(name):
    policy, trajectory = rolled_out(name)
    with pytest.raises(ValueError, match=f"{name} differentiates through its denoiser in each call.*Learn on replays"):
        policy.predict(trajectory.states[:, 1], trajectory.timesteps[[1, 1]], trajectory.condition)
    case, own = CASES[name][0], {"per_sample": CASES[name][0].per_sample} if CASES[name][0].per_sample else {}
    call = {"generator": [torch.Generator().manual_seed(seed) for seed in SEEDS], **call_of(case), **copy.deepcopy(own)}

    def brightness(images, prompts):
        return images.flatten(1).mean(1)

    with pytest.raises(ValueError, match=f"{name} differentiates through its denoiser itself.*choose the best of n"):
        RewardGuidedPipeline(case.build(), reward=brightness)(list(case.prompts), **copy.deepcopy(call))
    rewards = BestOfNPipeline(case.build(), reward=brightness)(list(case.prompts), num_candidates=2, **call).rewards
    assert not torch.equal(rewards[:, 0], rewards[:, 1])


def test_a_momentum_of_guidance_has_no_single_prediction():
    policy, trajectory = rolled_out("StableDiffusionPipelineSafe")
    state, times = trajectory.states[:, 1], trajectory.timesteps[[1, 1]]
    with pytest.raises(ValueError, match="guidance goes by the steps before.*Leave guidance out"):
        policy.predict(state, times, trajectory.condition, guidance=True)
    assert bool(policy.predict(state, times, trajectory.condition).isfinite().all())
