"""The noise that a pipeline starts from is replaced for that pipeline alone, whatever other threads do meanwhile."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_pipelines import FAMILIES

from diffusers_align.driving.initial_noise import initial_noise, prepared_latents


class Height(int):
    """A height that is read, so before the noise is drawn, when two calls have come that far."""

    both: threading.Barrier

    def __int__(self):
        self.both.wait(30)
        return 16


def prepared(pipeline, height=16):
    return pipeline.prepare_latents(1, 4, height, 16, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(1), None)


@pytest.mark.parametrize("both", [True, False], ids=["both replaced", "one replaced"])
def test_two_threads_draw_their_own_noise(both):
    first, second = FAMILIES["sd15"].build(), FAMILIES["sd15"].build()
    plain, height = prepared(second), Height(16)
    Height.both = threading.Barrier(2)

    def replaced(pipeline, value):
        with initial_noise(pipeline, lambda noise: torch.full_like(noise, value)):
            return prepared(pipeline, height)

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(replaced, first, 1.0)
        two = threads.submit(replaced, second, 2.0) if both else threads.submit(prepared, second, height)
        assert torch.equal(one.result(60), torch.full_like(plain, first.scheduler.init_noise_sigma))
        assert torch.equal(two.result(60), torch.full_like(plain, 2 * second.scheduler.init_noise_sigma) if both else plain)
    assert torch.equal(prepared(first), plain)


def test_the_first_noise_alone_is_replaced_and_later_draws_are_what_they_were():
    pipeline = FAMILIES["sd15"].build()
    with initial_noise(pipeline, lambda noise: torch.zeros_like(noise)):
        assert not prepared(pipeline).any()
        assert prepared(pipeline).any()
    assert "prepare_latents" not in pipeline.__dict__


def test_a_pipeline_without_such_noise_is_told_so():
    pipeline = FAMILIES["sd15"].build()
    with pytest.raises(ValueError, match="drew no initial noise: leave `latents` out"), initial_noise(pipeline, lambda noise: noise):
        pass
    with pytest.raises(ValueError, match="draws no initial noise in prepare_latents"), initial_noise(FAMILIES, lambda noise: noise):
        pass


def test_prepared_latents_are_changed_on_their_way_out():
    pipeline = FAMILIES["sd15"].build()
    plain = prepared(pipeline)
    with prepared_latents(pipeline, lambda latents: latents + 1):
        assert torch.equal(prepared(pipeline), plain + 1)
    assert torch.equal(prepared(pipeline), plain)
