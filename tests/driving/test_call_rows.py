"""Calls are joined and taken apart by rows: each answer is what the call by itself, or the whole, would have given."""

import pytest
import torch

from diffusers_align.driving.call_rows import Call, joined, parted, put_together


def denoiser(x, t, text, ids, beside=None):
    """Rows by themselves, at their own times: (rows, 3), and a list of one number a row."""
    ids = 0.0 if ids is None else ids.sum()
    scale = sum(residual.mean(1, keepdim=True) for residual in beside["residuals"]) if beside else 1.0
    out = x * t.reshape(-1, 1) + text.mean((1, 2))[:, None] * scale + ids
    return {"sample": out, "sizes": [float(row.sum()) for row in out], "name": "x"}


def call(t, seed, beside=False):
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(4, 3, generator=generator), torch.randn(4, 2, 5, generator=generator)
    own = {"beside": {"residuals": [torch.randn(4, 2, generator=generator) for _ in range(2)], "scale": 0.5}} if beside else {}
    return Call((x, torch.tensor(float(t))), {"text": text, "ids": torch.ones(7, 3), **own})


@pytest.mark.parametrize("beside", [False, True])
def test_a_joint_call_answers_as_each_by_itself(beside):
    calls = [call(t, seed, beside) for seed, t in enumerate((0.9, 0.5, 0.1))]
    joint = joined(calls)
    assert joint.rows == 12 and joint.args[1].tolist() == pytest.approx([0.9] * 4 + [0.5] * 4 + [0.1] * 4)
    for part, alone in zip(parted(joint.ask(denoiser), 4, 3), calls):
        expected = alone.ask(denoiser)
        torch.testing.assert_close(part["sample"], expected["sample"])
        assert part["sizes"] == pytest.approx(expected["sizes"]) and part["name"] == "x"


def test_parts_of_a_call_give_the_whole():
    whole = call(0.5, 0, beside=True)
    parts = [(index, whole.take(index).ask(denoiser)) for index in ([3, 1], [0, 2])]
    together, expected = put_together(parts, 4), whole.ask(denoiser)
    torch.testing.assert_close(together["sample"], expected["sample"])
    assert together["sizes"] == pytest.approx(expected["sizes"])


def test_lists_of_samples_are_lists_of_rows():
    """Where the first argument is a list, so are its kin, however long the samples' own tensors are."""
    calls = [Call(([torch.full((2, 3), float(k)), torch.zeros(2, 3)], torch.tensor([0.1 * k, 0.2])), {"caption": [torch.ones(k + 1, 2)] * 2}) for k in (0, 1)]
    with pytest.raises(ValueError, match="told something|several forms"):
        joined([calls[0], Call(calls[1].args, {"caption": "a cat"})])
    joint = joined(calls)
    assert joint.rows == 4 and [float(x.mean()) for x in joint.args[0]] == [0.0, 0.0, 1.0, 0.0]
    assert [len(x) for x in joint.kwargs["caption"]] == [1, 1, 2, 2]
    assert [len(x) for x in joint.take([2, 0]).kwargs["caption"]] == [2, 1]


def test_what_is_no_row_must_be_the_same():
    one = call(0.5, 0)
    same = Call(one.args, {**one.kwargs})
    assert one.is_same(same) and not one.is_same(call(0.5, 1)) and not one.is_same(call(0.4, 0))
    with pytest.raises(ValueError, match="neither a row's nor a time"):
        joined([one, Call(one.args, {**one.kwargs, "ids": torch.zeros(7, 3)})])
    with pytest.raises(ValueError, match="several forms"):
        joined([one, Call(one.args, {"text": one.kwargs["text"], "ids": None})])


def test_a_cache_is_refused():
    class Cache:
        def __init__(self):
            self.keys = []

    calls = [Call((torch.zeros(2, 3), torch.tensor(0.5)), {"cache": Cache()}) for _ in range(2)]
    with pytest.raises(ValueError, match="cache"):
        joined(calls)
