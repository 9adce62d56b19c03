"""AlignProp: where its gradient is cut."""

import pytest
import torch
from velocity_chain import EXACT, STEPS, Velocity, chain, drawn, gradient, reward

from diffusers_align.algorithms import alignprop, draft

# --- the chain's gradient, four ways -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 2, STEPS - 1])
def test_alignprops_detached_outputs_are_drafts_truncation(cut):
    model, calls = Velocity(), iter(range(STEPS))

    def official(x, sigma):
        velocity = model(x, sigma)
        return velocity.detach() if next(calls) < cut else velocity

    detached = gradient(reward(chain(model, range(STEPS), call=official)), model)
    assert alignprop.grad_steps(STEPS, cut) == draft.grad_steps(STEPS, STEPS - cut)
    torch.testing.assert_close(gradient(reward(chain(model, alignprop.grad_steps(STEPS, cut))), model), detached, **EXACT)


# --- which steps ---------------------------------------------------------------------------------------------------------


def test_alignprops_cuts_are_the_official_ones_rescaled():
    """The official loop by hand: a normal draw until it lies in 1 to 49."""
    generator, official = torch.Generator().manual_seed(0), []
    while len(official) < 2000:
        step = int(42 + 5 * float(torch.randn((), generator=generator)))
        official += [step] if 0 < step < 50 else []
    cuts = drawn(lambda g: alignprop.truncation(50, g))
    assert cuts == official
    assert sum(cut == 49 for cut in cuts) / 2000 == pytest.approx(0.027, abs=0.01), "a clamp would make it 8%"
    assert 50 - sum(cuts) / 2000 == pytest.approx(9.10, abs=0.3)
    assert drawn(lambda g: alignprop.truncation(10, g)) == [cut // 5 for cut in official]


def test_alignprops_other_cuts():
    assert set(drawn(lambda g: alignprop.truncation(5, g, strategy="uniform"))) == {1, 2, 3, 4}
    assert set(drawn(lambda g: alignprop.truncation(4, g, mean=1.0, std=1.0))) == {1}, "the first step has no gradient on short chains either"
    assert alignprop.truncation(50, strategy="fixed") == 49 and alignprop.truncation(25, strategy="fixed") == 24
    assert alignprop.truncation(10, strategy="fixed", fixed=0) == 0
    assert [alignprop.truncation(1, strategy=strategy) for strategy in alignprop.STRATEGIES] == [0, 0, 0]
    for options, match in (
        ({"strategy": "sometimes"}, "strategy"),
        ({"strategy": "fixed", "fixed": 50}, "fixed cut"),
        ({"mean": 60.0, "std": 0.0}, "gave no step"),
    ):
        with pytest.raises(ValueError, match=match):
            alignprop.truncation(50, **options)
