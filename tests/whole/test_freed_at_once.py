"""What a call has made is freed when nothing refers to it any more: no state and no graph waits for the garbage collector, which may come steps later."""

import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from policies import PROMPTS, SEEDS, make
from wrapping import brightness

from diffusers_align import Policy
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.pipelines import BestOfNPipeline, NoiseOptimizationPipeline, ParticleSteeringPipeline, RewardGuidedPipeline


def left_to_the_collector(work: Callable[[], object]) -> list[torch.Tensor]:
    """The tensors that `work` leaves in cycles."""
    work()  # what is found out once
    gc.collect()
    gc.disable()
    try:
        work()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [found for found in gc.garbage if issubclass(type(found), torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_the_collector_finds_a_cycle():
    def work():
        cycle = [torch.zeros(3)]
        cycle.append(cycle)

    assert [x.shape for x in left_to_the_collector(work)] == [(3,)]


@pytest.mark.parametrize("family", ["sd3", pytest.param("wan", marks=pytest.mark.long)])
def test_states_and_graphs_of_a_policys_calls(family):
    policy, trajectory, _ = make(family)
    condition = trajectory.condition
    calls = {
        "roll-out": lambda: policy.rollout(PROMPTS, seeds=SEEDS),
        "replay": lambda: policy.replay(trajectory, lambda k, kernel: None),
        "kernel with its graph": lambda: policy.transition(trajectory, 1),
        "gradient of a step": lambda: policy.transition(trajectory, 1).mean.sum().backward(),
        "completion": lambda: policy.complete(trajectory, 1),
        "outcome": lambda: policy.outcome(trajectory),
        "roll-out with its graph": lambda: differentiable_rollout(policy, condition, grad_steps=[trajectory.num_steps - 1]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert {name: len(left_to_the_collector(call)) for name, call in calls.items()} == dict.fromkeys(calls, 0)


CALLS = [
    (BestOfNPipeline, {"num_candidates": 2}),
    (RewardGuidedPipeline, {"preset": "dps", "reward_scale": 0.1}),
    (ParticleSteeringPipeline, {"num_particles": 2}),
    (NoiseOptimizationPipeline, {"num_iterations": 1}),
]


def test_encoded_prompts_go_with_their_policy():
    policy, *_ = make("sd3")
    assert not left_to_the_collector(lambda: Policy(policy.pipeline, **policy.call_kwargs).rollout(PROMPTS, seeds=SEEDS))


@pytest.mark.parametrize("cls, options", CALLS)
def test_those_of_a_pipelines_call(cls, options):
    policy, trajectory, _ = make("sd3")
    wrapped = cls(policy.pipeline, brightness)
    assert not left_to_the_collector(lambda: wrapped("a cat", **options, **policy.call_kwargs))
