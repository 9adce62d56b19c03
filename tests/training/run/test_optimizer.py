"""The optimizer that the flags ask for."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from diffusers_align.training.checkpoints.state_adapters import OptimizerState
from diffusers_align.training.run import optimizer
from diffusers_align.training.run.optimizer import adamw, bytes_of_moments, check_average, check_library

FLAGS = {"learning_rate": 1e-2, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-7, "adam_weight_decay": 0.1}


def args(use_8bit_adam=False, **others):
    return SimpleNamespace(use_8bit_adam=use_8bit_adam, **FLAGS, **others)


def test_adamw_has_the_flags():
    made = adamw(args(), [torch.nn.Parameter(torch.ones(3))])
    assert type(made) is torch.optim.AdamW
    assert {name: made.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")} == {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.1}


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(optimizer.importlib.util, "find_spec", lambda name: None)
    check_library(args())
    with pytest.raises(ImportError, match="--use_8bit_adam takes bitsandbytes, which is not installed: run `pip install bitsandbytes`"):
        check_library(args(True))


def test_an_average_that_never_begins_is_refused():
    check_average(SimpleNamespace(use_ema=True, ema_interval=8), 8)
    with pytest.raises(ValueError, match="the run makes 7: the average would never begin"):
        check_average(SimpleNamespace(use_ema=True, ema_interval=8), 7)


def test_moments_take_what_is_counted():
    assert bytes_of_moments(args(), [100, 8192]) == 8 * 8292
    assert bytes_of_moments(args(True), [100, 8192]) == 800 + 2 * 8192 + 2 * 4 * 32


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_eight_bits_go_on_to_the_same_weights():
    def gradient(weights, step):
        for i, weight in enumerate(weights):
            weight.grad = torch.sin(torch.arange(weight.numel(), dtype=torch.float32) * (step + i + 1)).reshape(weight.shape)

    def made():
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(128, 64)), torch.nn.Parameter(torch.randn(4, 64))]
        return weights, adamw(args(True), weights)

    weights, own = made()
    for step in range(6):
        gradient(weights, step)
        own.step()
        if step == 2:
            kept, at = {"state": OptimizerState(own).state_dict()}, [weight.detach().clone() for weight in weights]
            kept = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, kept)
    state = own.state[weights[0]]
    assert state["state1"].dtype == torch.uint8
    moments = sum(x.nbytes for w in weights for name, x in own.state[w].items() if isinstance(x, torch.Tensor) and not name.startswith("qmap"))
    assert bytes_of_moments(args(True), [w.numel() for w in weights]) == moments
    again, other = made()
    OptimizerState(other).load_state_dict(kept["state"])
    for weight, value in zip(again, at):
        weight.data.copy_(value)
    for step in range(3, 6):
        gradient(again, step)
        other.step()
    assert all(map(torch.equal, again, weights))
