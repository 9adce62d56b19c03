"""What gives the outputs of a call their rewards."""

from types import SimpleNamespace

import pytest
import torch
from wrapping import brightness

from diffusers_align.condition import Condition
from diffusers_align.driving.outcome import Outcome
from diffusers_align.pipelines.judge import Judge
from diffusers_align.rewards import InvalidReward

TWO_OF_EACH = Condition(["a", "a", "b", "b"], {})


def test_rows_are_judged_against_their_own_prompts_and_columns():
    def wanted(images, prompts, wish):
        return torch.tensor([float(w == p) for w, p in zip(wish, prompts)])

    judge = Judge.of(wanted, TWO_OF_EACH, {"wish": ["a", "c"]})
    assert judge(torch.rand(4, 3, 2, 2), [0, 1, 2, 3]).tolist() == [1, 1, 0, 0]
    assert judge(torch.rand(2, 3, 2, 2), [3, 0]).tolist() == [0, 1]
    images = torch.rand(1, 3, 2, 2, dtype=torch.bfloat16)
    assert torch.equal(Judge.of(brightness, TWO_OF_EACH)(images, [2]), brightness(images.float(), None))


def test_a_column_stands_for_the_outputs_of_its_own_prompt_alone():
    four = Condition(["a", "b", "c", "d"], {})
    for columns in ({"tag": ["A", "B"]}, {"tag": ["A"]}):
        with pytest.raises(ValueError, match=f"{len(columns['tag'])} entries, which do not go with 4 outputs: give one per prompt"):
            Judge.of(brightness, four, columns)
    assert Judge.of(brightness, four, {"tag": [1, 2, 3, 4]}).columns == {"tag": [1, 2, 3, 4]}
    assert Judge.of(brightness, Condition(["a", "a", "a"], {}), {"tag": ["A"]}).columns == {"tag": ["A", "A", "A"]}


@pytest.mark.parametrize(
    "message, columns, on_invalid",
    [
        ("entry per prompt, got 'red'", {"wish": "red"}, "error"),
        ("3 entries, which do not go with 4 outputs", {"wish": [1, 2, 3]}, "error"),
        ("columns are the reward's other arguments", ["wish"], "error"),
        ("error, mask", None, "drop"),
    ],
)
def test_wrong_columns_say_what_to_do(message, columns, on_invalid):
    with pytest.raises(ValueError, match=message):
        Judge.of(brightness, TWO_OF_EACH, columns, on_invalid)


def test_rewards_hear_what_a_pipeline_makes():
    def rate_of(sounds, prompts, sampling_rate):
        return sounds.flatten(1).mean(1) + sampling_rate

    def volume(videos, prompts, audio, sampling_rate):
        return audio.abs().mean((1, 2)) * sampling_rate

    pipeline, sounds = SimpleNamespace(components={}, sampling_rate=8000), torch.rand(2, 1, 50)
    judge = Judge.of(rate_of, TWO_OF_EACH, pipeline=pipeline)
    torch.testing.assert_close(judge(sounds, [0, 2]), sounds.mean((1, 2)) + 8000)
    videos = Judge.of(volume, TWO_OF_EACH, pipeline=pipeline)
    torch.testing.assert_close(videos(Outcome(torch.rand(2, 3, 3, 4, 4), sounds, 100), [0, 2]), sounds.mean((1, 2)) * 100)
    with pytest.raises(InvalidReward, match="there is none with these"):
        videos(torch.rand(2, 3, 3, 4, 4), [0, 2])
    with pytest.raises(InvalidReward, match="judges sounds .* and these are pictures"):
        judge(torch.rand(2, 3, 4, 4), [0, 2])
