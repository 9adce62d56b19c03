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


class Cache:
    def __init__(self):
        self.layers = [None]


class Caching(Two):
    """Keeps what it computes in a cache that it is handed, and reads it afterwards, as transformers do with keys and values."""

    def forward(self, video, cache=None, mode="fill"):
        self.calls += 1
        if mode == "fill":
            cache.layers[0] = self.layer(video)
        return (video + cache.layers[0],)


def test_a_call_that_fills_a_cache_is_made_with_its_graph_and_one_that_reads_it_is_not():
    module, x = Caching(), torch.ones(2, 3)
    for calls in (2, 3):  # the second kind of call is learned once
        cache = Cache()
        closed(module, x, cache=cache)
        closed(module, x, cache=cache, mode="read")
        assert torch.equal(cache.layers[0], module.layer(x)) and cache.layers[0].requires_grad and module.calls == calls
    assert not closed(module, x, cache=cache, mode="read")[0].any() and module.calls == 3


def test_a_denoiser_that_is_looked_into_is_called_without_its_graph():
    module, x, seen = Two(), torch.ones(2, 3), []
    module.layer.register_forward_hook(lambda layer, args, output: None)  # the user's own, from before
    closed(module, x)
    assert not closed(module, x)["video"].any() and module.calls == 1
    with gated(module, lambda: False), module.layer.register_forward_hook(lambda layer, args, output: seen.append(output)):
        output = module(x)["video"]
    assert torch.equal(output, module.layer(x)) and not output.requires_grad and len(seen) == 1 and module.calls == 2
