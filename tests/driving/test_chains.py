"""Several chains of states in one call are told apart, and best-of-n puts the final state of each back where it was."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_align import Policy
from diffusers_align.driving.chains import Chains, Recorder, put_state
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline, RewardGuidedPipeline
from tests.families.cases import CASES


class Step(SimpleNamespace):
    """A scheduler's step, as far as chains look at it."""

    portion = 0

    def run(self):
        return SimpleNamespace(prev_sample=self.sample + 1)

    def skip(self):
        pass

    def like(self, x):
        return x


def step(time, *shape, child=0, state=None):
    return Step(child=child, time=time, sample=torch.randn(shape) if state is None else state)


def built(name):
    case = CASES[name][0]
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, case


def chosen(name, cls, **options):
    pipeline, case = built(name)
    size = 1 if case.one_sample else 2
    own = {argument: value[:size] for argument, value in case.per_sample.items()}
    prompts, generators = (case.prompts or ["", ""])[:size], [torch.Generator().manual_seed(i) for i in range(size)]
    wrapped = cls(pipeline, reward=lambda images, prompts: images.flatten(1).mean(1))
    return wrapped(prompts, generator=generators, output_type="pt", per_sample=own, **case.call, **options)


@pytest.mark.parametrize(
    "steps, expected",
    [
        ([(3, 2, 4), (2, 2, 4), (1, 2, 4)], [0, 0, 0]),
        ([(1, 2, 4), (2, 2, 4), (3, 2, 4)], [0, 0, 0]),  # an inversion
        ([(3, 2, 4), (3, 2, 4), (2, 2, 4), (2, 2, 4)], [0, 0, 0, 0]),  # of second order
        ([(3, 2, 4), (1, 2, 4), (3, 2, 4), (1, 2, 4)], [0, 0, 1, 1]),  # windows
        ([(3, 2, 4), (2, 2, 16), (1, 2, 16)], [0, 1, 1]),  # stages
    ],
)
def test_a_chain_ends_where_the_size_changes_or_time_turns_round(steps, expected):
    chains = Chains()
    assert [chains.of(step(*one))[1] for one in steps] == expected


def test_schedulers_have_chains_of_their_own():
    chains = Chains()
    assert [chains.of(step(time, 1, 4, child=child)) for time, child in ((3, 0), (9, 1), (2, 0), (8, 1))] == [(0, 0), (1, 0), (0, 0), (1, 0)]


def test_frames_that_begin_alike_are_no_copies():
    record = Recorder(2)
    state = torch.randn(2, 3).repeat(2, 1)
    made = step(1.0, state=state)
    made.run = lambda: SimpleNamespace(prev_sample=torch.arange(12.0).reshape(4, 3))
    record(made)
    torch.testing.assert_close(record.finals[0, 0], torch.arange(12.0).reshape(2, 2, 3))


def test_rows_of_an_output_are_its_frames_and_equal_halves_are_copies():
    frames, half = torch.randn(4, 3), torch.randn(2, 3)
    for state, expected in ((frames, (frames + 1).reshape(2, 2, 3)), (half.repeat(2, 1), half + 1)):
        record = Recorder(2)
        record(step(1.0, state=state))
        finals = record.finals
        torch.testing.assert_close(finals[0, 0], expected)
        torch.testing.assert_close(put_state(Chains(), step(1.0, state=state), finals, "states"), state + 1)
    with pytest.raises(ValueError, match="of 3 samples, its call of 2 outputs"):
        record = Recorder(2)
        record(step(1.0, 3, 4))
        assert record.finals


@pytest.mark.filterwarnings("ignore:Default grid_sample")
@pytest.mark.parametrize(
    "name", ["VisualClozePipeline", "HeliosPyramidPipeline", "LTXI2VLongMultiPromptPipeline", "TextToVideoZeroPipeline", "KarrasVePipeline"]
)
def test_best_of_n_returns_what_the_reward_saw_of_several_chains(name):
    output = chosen(name, BestOfNPipeline, num_candidates=2)
    own = output[0] if isinstance(output[0], torch.Tensor) else torch.as_tensor(output[0])
    best = output["rewards"].max(1).values
    torch.testing.assert_close(own.float().reshape(len(best), -1).mean(1), best, rtol=1e-4, atol=1e-5)


def test_best_of_n_takes_all_frames_of_a_candidate():
    output = chosen("TextToVideoSDPipeline", BestOfNPipeline, num_candidates=3)
    best = output["rewards"].max(1).values
    assert bool((output.chosen > 0).any())
    torch.testing.assert_close(output.frames.flatten(1).mean(1), best, rtol=1e-4, atol=1e-5)


def test_what_walks_one_chain_says_so():
    pipeline, case = built("VisualClozePipeline")
    with pytest.raises(ValueError, match="change their size on the way, from \\(64, 16\\) to \\(16, 16\\)"):
        Policy(pipeline, **case.call).rollout(None, seeds=[1, 2], per_sample=dict(case.per_sample))
    for cls, who, options in ((RewardGuidedPipeline, "guided samplings", {"reward_scale": 0.0}), (ParticleSteeringPipeline, "particles", {})):
        with pytest.raises(ValueError, match=f"several chains of states.*{who} need one chain"):
            chosen("VisualClozePipeline", cls, **options)


def test_sections_of_a_video_are_decoded_from_their_own_states():
    pipeline, case = built("HunyuanVideoFramepackPipeline")
    policy = Policy(pipeline, **{**case.call, "num_frames": 17, "num_inference_steps": 2})
    trajectory = policy.rollout([case.prompts[0]], seeds=[1], deterministic=True)
    seen = []

    def keep(one):
        seen.append(one.run().prev_sample)

    with torch.no_grad(), policy.noise(trajectory.condition, deterministic=True):
        expected = policy.drive(trajectory.condition, keep, output_type="pt")[0]
    assert len(seen) == trajectory.num_steps == 4
    torch.testing.assert_close(policy.outcome(trajectory).images, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="portion after portion .*give policy.outcome the trajectory"):
        policy.decode(trajectory.final, trajectory.condition)
