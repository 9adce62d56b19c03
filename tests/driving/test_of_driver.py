"""Parts do not keep their driver, and go with it into copies and pickles."""

import copy
import gc
import pickle
import weakref

import torch
from policies import PROMPTS, SEEDS
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.driving.of_driver import OfDriver


class Holder:
    def __init__(self):
        self.part = OfDriver(self)


def test_a_driver_is_freed_although_its_parts_refer_to_it():
    gc.disable()
    try:
        holder = Holder()
        freed = weakref.ref(holder)
        del holder
        assert freed() is None
    finally:
        gc.enable()


def test_copies_have_parts_of_their_own():
    holder = Holder()
    for copied in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert copied.part.driver is copied is not holder


def test_a_policy_is_freed_with_all_that_it_remembers_and_its_copies_predict_encode_and_replay_the_same():
    policy = Policy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call)
    condition = policy.condition(PROMPTS, seeds=SEEDS)
    trajectory = policy.rollout(condition)

    def answers(policy):
        images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        times = torch.tensor([900.0, 700.0, 500.0, 300.0])
        return policy.predict(trajectory.states[:, 1], times, condition), policy.encode(images), policy.transition(trajectory, 1).mean

    with torch.no_grad():
        wanted = answers(policy)
        for copied in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
            assert all(torch.equal(found, expected) for found, expected in zip(answers(copied), wanted, strict=True))
    gc.collect()
    gc.disable()
    try:
        freed = weakref.ref(policy)
        del policy, copied
        assert freed() is None
    finally:
        gc.enable()
