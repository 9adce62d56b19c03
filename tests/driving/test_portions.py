"""Samples that are made portion after portion: all of them are decoded, and one of them is never taken for a whole."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_align import Policy, differentiable_rollout
from diffusers_align.driving.outcome import images_of
from diffusers_align.driving.portions import in_portions
from diffusers_align.driving.tape import Tape
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline
from tests.families.cases import wan

torch.set_num_threads(1)
PROMPTS, SEEDS = ["a cat", "a large red dog"], [11, 12]


def built(cases, name):
    (case,) = cases.CASES[name]
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, case


@pytest.fixture(scope="module")
def chunks():
    """Two chunks of a video, each by four steps; the policy, a trajectory, and the call's own pictures."""
    pipeline, case = built(wan, "AnyFlowFARPipeline")
    policy, tape = Policy(pipeline, **case.call), Tape()
    condition = policy.condition(PROMPTS, seeds=SEEDS)
    with torch.no_grad(), policy.noise(condition, deterministic=False):
        images = images_of(policy.drive(condition, tape.record, output_type="pt"))
    return policy, tape.trajectory(condition), images


def test_the_outcome_of_a_trajectory_is_that_of_its_call(chunks):
    policy, trajectory, images = chunks
    assert trajectory.num_steps == 8 and trajectory.final.numel() < images.numel()
    with torch.no_grad():
        assert torch.equal(policy.outcome(trajectory).images, images)
        torch.testing.assert_close(policy.outcome(trajectory.select([1])).images, images[1:])


@torch.no_grad()
def test_latents_of_one_portion_are_refused(chunks):
    policy, trajectory, images = chunks
    for call, what in (
        (lambda: policy.decode(trajectory.final, trajectory.condition), "give policy.outcome the trajectory"),
        (lambda: policy.outcome(trajectory.final, trajectory.condition), "give policy.outcome the trajectory"),
        (lambda: policy.decode(trajectory.final), "give policy.outcome the trajectory"),
        (lambda: policy.encode(images, trajectory.condition), "learn on roll-outs"),
        (lambda: policy.predict(trajectory.states[:, 1], trajectory.timesteps[[1, 1]], trajectory.condition, guidance=True), "learn on replays"),
        (lambda: differentiable_rollout(policy, trajectory.condition, grad_steps=[], stop_step=1), "leave stop_step out"),
    ):
        with pytest.raises(ValueError, match=f"AnyFlowFARPipeline makes a sample portion after portion .*: {what}" if "stop" not in what else what):
            call()


def test_searches_look_at_all_portions():
    """The best of one is the stock call; particles, which stand in the midst of a portion, are refused."""
    pipeline, case = built(wan, "AnyFlowFARPipeline")
    generators = [[torch.Generator().manual_seed(seed) for seed in SEEDS] for _ in range(2)]
    expected = pipeline(PROMPTS, generator=generators[0], output_type="pt", **case.call).frames
    reward = lambda images, prompts, **columns: images.flatten(1).mean(1)  # noqa: E731
    found = BestOfNPipeline(pipeline, reward=reward)(PROMPTS, num_candidates=1, generator=generators[1], output_type="pt", **case.call)
    torch.testing.assert_close(found.frames, expected)
    torch.testing.assert_close(found.rewards[:, 0], expected.flatten(1).mean(1))
    with pytest.raises(ValueError, match="several chains of states .*particles need one chain.* choose the best of n"):
        ParticleSteeringPipeline(pipeline, reward=reward)(PROMPTS, num_particles=2, generator=generators[1], output_type="pt", **case.call)


@pytest.mark.parametrize("carried, kept, expected", [(0.0, 1.0, True), (0.5, 1.0, False), (0.0, 0.0, False)])
def test_a_second_schedule_of_the_same_sample_is_no_portion(carried, kept, expected):
    """It goes on from where the first one has ended, as a second pass at a larger size does, or begins anew and leaves nothing of it."""

    def drive(on_step):
        x = torch.ones(1, 2)
        for k in range(2):
            x = on_step(SimpleNamespace(k=k, child=0, portion=0, sample=x, skip=lambda: None))
        y = on_step(SimpleNamespace(k=2, child=0, portion=1, sample=carried * x + torch.ones(1, 2), skip=lambda: None))
        return (torch.cat([kept * x, y]),)

    assert in_portions(drive) == expected


def test_it_is_found_out_once():
    pipeline, case = built(wan, "AnyFlowFARPipeline")
    policy = Policy(pipeline, **case.call)
    condition, calls, drive = policy.condition(PROMPTS, seeds=SEEDS), [], policy.drive
    policy.drive = lambda *args, **kwargs: (calls.append(1), drive(*args, **kwargs))[1]
    for expected in (4, 0):
        calls.clear()
        with pytest.raises(ValueError, match="portion after portion"):
            policy.refuse_portions(condition, "do something else")
        assert len(calls) == expected
