"""Gated calls return what the real one would, but for its numbers: shapes, precisions and structure."""

import copy

import torch
from torch import nn

from diffusers_align.driving.denoiser_gates import gated


class Two(nn.Module):
    """Two modalities, one of which has a size of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 3), 0

    def forward(self, video, audio=None, prompts=None, return_dict=True):
        self.calls += 1
        outputs = {"video": self.layer(video), "audio": None if audio is None else self.layer(audio), "note": "kept"}
        return outputs if return_dict else tuple(outputs.values())


def form(output):
    return {name: (x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for name, x in output.items()}


def closed(module, *args, **kwargs):
    with gated(module, lambda: False):
        output = module(*args, **kwargs)
    assert "forward" not in module.__dict__
    return output


def test_what_is_gated_is_learned_once_and_is_zero_afterwards():
    module, x = Two(), torch.ones(2, 3)
    assert torch.equal(closed(module, x)["video"], module.layer(x)) and module.calls == 1
    assert not closed(module, x)["video"].any() and closed(module, x)["note"] == "kept" and module.calls == 1
    assert isinstance(closed(module, x, return_dict=False), tuple) and module.calls == 2
    closed(module, torch.ones(3, 3))
    assert module.calls == 3
    closed(copy.deepcopy(module), x)
    assert module.calls == 3


def test_zeros_have_the_precision_that_autocast_gives():
    module, x = Two(), torch.ones(2, 3)
    for _ in range(2):
        plain = closed(module, x)["video"]
        with torch.autocast("cpu", torch.bfloat16):
            cast = closed(module, x)["video"]
        assert (plain.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
    assert module.calls == 2 and not plain.any() and not cast.any()


def test_zeros_have_the_precision_that_other_arguments_give():
    class Promotes(Two):
        def forward(self, video, prompts):
            self.calls += 1
            return {"video": video + prompts.sum()[None]}

    module, x = Promotes(), torch.ones(2, 3)
    for _ in range(2):
        assert closed(module, x, torch.ones(4))["video"].dtype == torch.float32
        assert closed(module, x, torch.ones(4, dtype=torch.float64))["video"].dtype == torch.float64
    assert module.calls == 2


def test_a_second_modality_has_zeros_of_its_own_size():
    module, x = Two(), torch.ones(2, 3)
    for length in (5, 7, 5):
        audio = torch.ones(length, 3)
        assert form(closed(module, x, audio=audio, prompts=None)) == form(module.forward(x, audio=audio))
    assert module.calls == 4, "three real calls, and one that was learned from"


def test_the_number_of_real_calls_does_not_depend_on_prompts():
    """Sharded weights are gathered in step: processes with other prompts must make as many calls."""
    module, x = Two(), torch.ones(2, 3)
    for prompts in (torch.ones(2, 4), torch.ones(2, 9), torch.ones(2, 9)):
        closed(module, x, prompts=prompts)
    assert module.calls == 1


def test_open_gates_call_and_learn():
    module, x = Two(), torch.ones(2, 3)
    with gated(module, lambda: True):
        assert torch.equal(module(x)["video"], module.layer(x))
    assert module.calls == 1 and not closed(module, x)["video"].any() and module.calls == 1
