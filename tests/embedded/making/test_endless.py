"""A training that is killed and goes on is the training that was not."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusers_align.embedded.making import endless
from diffusers_align.embedded.making.endless import Training, shorten, train_on

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def problem():
    """A small network with weights for both optimizers, and a loss that draws its batch."""
    torch.manual_seed(7)
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Conv2d(2, 4, 3)]), "out": nn.Linear(4, 1)})

    def loss_fn():
        x = torch.randn(8, 2, 5, 5)
        return (net["out"](net["blocks"][0](x).tanh().mean((2, 3))).squeeze(1) - x.mean((1, 2, 3))).square().mean()

    return net, Training([net], rates=(0.02, 1e-2), memory=5), loss_fn


def everything(training):
    return [*training.weights, *training.average, *(value for o in training.optimizers for state in o.state() for _, value in sorted(state.items()))]


def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path):
    _, whole, loss_fn = problem()
    losses = [whole.update(loss_fn, 1.0) for _ in range(12)]
    _, first, loss_fn = problem()
    assert [first.update(loss_fn, 1.0) for _ in range(5)] == losses[:5]
    first.write(tmp_path / "state.safetensors")
    _, second, loss_fn = problem()
    torch.rand(11)  # what was drawn elsewhere does not matter
    second.read(tmp_path / "state.safetensors")
    assert second.updates == 5
    assert [second.update(loss_fn, 1.0) for _ in range(7)] == losses[5:]
    found, expected = everything(second), everything(whole)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))


def test_a_shortened_state_is_half_as_long_and_goes_on_nearly_the_same(tmp_path):
    _, whole, whole_loss = problem()
    for _ in range(5):
        whole.update(whole_loss, 1.0)
    whole.write(tmp_path / "long.safetensors")
    shorten(tmp_path / "long.safetensors", tmp_path / "short.safetensors")
    long, short = load_file(tmp_path / "long.safetensors"), load_file(tmp_path / "short.safetensors")
    assert short.keys() == long.keys() and {short["weight.0"].dtype, short["average.0"].dtype} == {torch.float16}
    assert short["muon.0.momentum_buffer"].dtype == torch.bfloat16 and short["adamw.0.step"].item() == 5
    _, resumed, loss_fn = problem()
    resumed.read(tmp_path / "short.safetensors")
    assert resumed.update(loss_fn, 1.0) == pytest.approx(whole.update(whole_loss, 1.0), rel=1e-2)
    for a, b in zip(everything(resumed), everything(whole)):
        torch.testing.assert_close(a, b, atol=0.01, rtol=0.02)
        assert a.dtype == torch.float32


def test_the_average_follows_the_weights_and_swaps_with_them():
    net, training, loss_fn = problem()
    seen = []
    for _ in range(4):
        training.update(loss_fn, 1.0)
        seen.append(net["out"].bias.detach().clone())
    index = [w is net["out"].bias for w in training.weights].index(True)
    _, fresh, _ = problem()
    expected = fresh.average[index]
    for n, value in enumerate(seen):
        expected = expected.lerp(value, 1 - min(1 - 1 / 5, (2 + n) / (11 + n)))
    torch.testing.assert_close(training.average[index], expected)
    training.swap()
    torch.testing.assert_close(net["out"].bias.detach(), expected)
    training.swap()
    assert torch.equal(net["out"].bias.detach(), seen[-1])


class Clock:
    """One second of processor time for every look at it; no other time passes."""

    def __init__(self):
        self.now = 0.0

    def process_time(self):
        self.now += 1
        return self.now

    def monotonic(self):
        return 0.0


def test_training_stops_at_its_budget_writes_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(endless, "time", Clock())
    saved = []
    for expected in (9, 18):
        net, training, loss_fn = problem()
        train_on("toy", training, loss_fn, lambda: saved.append(net["out"].bias.item()), tmp_path, minutes=10 / 60)  # noqa: B023
        assert training.updates == expected
        assert saved[-1] != net["out"].bias.item(), "what is saved is the average"
    assert "from update 9" in capsys.readouterr().out


def test_a_decay_ends_at_rest_and_leaves_the_state(tmp_path, monkeypatch):
    monkeypatch.setattr(endless, "time", Clock())
    _, training, loss_fn = problem()
    train_on("toy", training, loss_fn, lambda: None, tmp_path, minutes=10 / 60)
    state = (tmp_path / "toy.state.safetensors").read_bytes()
    rates, (_, training, loss_fn) = [], problem()
    monkeypatch.setattr(training.optimizers[0], "set_rate", rates.append)
    train_on("toy", training, loss_fn, lambda: None, tmp_path, minutes=10 / 60, decay=True)
    assert len(rates) == 9 and rates == sorted(rates, reverse=True)
    assert [rate * endless.WARM_UP / (0.02 * n) for n, rate in enumerate(rates, 10)] == pytest.approx([1 - n / 10 for n in range(1, 10)])
    assert (tmp_path / "toy.state.safetensors").read_bytes() == state


def test_no_minutes_only_save_the_average(tmp_path):
    _, training, loss_fn = problem()
    training.update(loss_fn, 1.0)
    training.write(tmp_path / "toy.state.safetensors")
    state, saved = (tmp_path / "toy.state.safetensors").read_bytes(), []
    net, again, loss_fn = problem()
    train_on("toy", again, loss_fn, lambda: saved.append(net["out"].bias.item()), tmp_path, minutes=0)
    index = [w is net["out"].bias for w in again.weights].index(True)
    assert saved == [training.average[index].item()]
    assert (tmp_path / "toy.state.safetensors").read_bytes() == state
