"""Step callbacks: called as they are, and refused where what they do after the last step would be lost."""

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from wrapping import brightness, g, stacked

from diffusers_align.pipelines import BestOfNPipeline, RewardGuidedPipeline
from diffusers_align.pipelines.callbacks import Watched, check_last_step, watched


def editing(at, last):
    """Dims the latents at one solver step."""

    def edit(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.5} if step == at % (last + 1) else {}

    return edit


@pytest.mark.parametrize("wrapped", [BestOfNPipeline, RewardGuidedPipeline])
def test_latents_changed_after_the_last_step_are_refused_and_before_it_are_seen(wrapped, pipes):
    pipe, call = pipes("sd15")
    call, last = {**call, "output_type": "pt"}, call["num_inference_steps"] - 1
    own = {"num_candidates": 1} if wrapped is BestOfNPipeline else {"reward_scale": 0.0}
    with pytest.raises(ValueError, match="changes the latents after the last step"):
        wrapped(pipe, brightness)("a", callback_on_step_end=editing(-1, last), generator=g(0), **own, **call)
    early = editing(0, last)
    found = wrapped(pipe, brightness)("a", callback_on_step_end=early, generator=g(0), **own, **call)
    stock = pipe("a", callback_on_step_end=early, generator=g(0), **call)
    assert torch.equal(stacked(found), stacked(stock)) and not torch.equal(stacked(stock), stacked(pipe("a", generator=g(0), **call)))
    torch.testing.assert_close(found.rewards.flatten(), brightness(stacked(found), None))


def test_a_callback_that_looks_is_left_alone(pipes):
    pipe, call = pipes("sd15")
    seen = []
    BestOfNPipeline(pipe, brightness)(
        "a", num_candidates=1, generator=g(0), callback_on_step_end=lambda p, step, t, tensors: seen.append(step) or tensors, **call
    )
    assert seen == list(range(call["num_inference_steps"]))


def test_what_counts_as_a_change():
    latents = torch.ones(2)
    for answer, changed in [({}, False), (None, False), ({"latents": latents}, False), ({"latents": latents.clone()}, False), ({"latents": 2 * latents}, True)]:
        callback = Watched(lambda *_, answer=answer: answer)
        assert callback(None, 0, 0, {"latents": latents}) is answer and callback.changed is changed
    broken = torch.tensor([1.0, float("nan")])
    looks = Watched(lambda *_: {"latents": broken.clone()})
    looks(None, 0, 0, {"latents": broken})
    assert not looks.changed, "latents that the solver has broken are not the callback's"
    inside = Watched(lambda pipeline, step, timestep, tensors: {} if tensors["latents"].mul_(2) is None else {})
    inside(None, 0, 0, {"latents": torch.zeros(1)})
    assert not inside.changed
    inside(None, 0, 0, {"latents": torch.ones(1)})
    assert inside.changed
    with pytest.raises(ValueError, match="after the last step"):
        check_last_step({"callback_on_step_end": inside})
    unseen = Watched(lambda *_: {"latents": latents})
    unseen(None, 0, 0, {})
    assert unseen.changed, "it was not asked what they were"


def test_diffusers_own_kinds_stay_what_pipelines_look_for():
    kind = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    assert watched(kind) is kind and watched(watched(print)).callback is print
