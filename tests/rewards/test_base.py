"""Scores of rewards: every kind of answer in one form, sums with their parts, and wrong answers named."""

import pytest
import torch
from reward_models import PROMPTS, Scaled, brightness

from diffusers_align.rewards import InvalidReward, WeightedSum, load_reward, score


def test_score_normalises_every_kind_of_answer():
    images = torch.rand(2, 3, 4, 4)
    expected = images.flatten(1).mean(1)
    torch.testing.assert_close(score(brightness, images, PROMPTS)["reward"], expected)
    torch.testing.assert_close(score(lambda i, p: expected.double().numpy(), images, PROMPTS)["reward"], expected)
    torch.testing.assert_close(score(lambda i, p: {"anything": expected}, images, PROMPTS), {"reward": expected})
    assert score(lambda i, p: [1, 2], images, PROMPTS)["reward"].tolist() == [1.0, 2.0]
    assert score(lambda i, p: torch.tensor([1, 0]), images, PROMPTS)["reward"].dtype == torch.float32
    assert set(score(Scaled(), images, PROMPTS)) == {"reward", "contrast"}


def test_score_passes_the_columns_and_keeps_the_graph():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    result = score(lambda images, prompts, weight: brightness(images, prompts) * weight, images, PROMPTS, weight=torch.tensor([1.0, 2.0]))
    result["reward"].sum().backward()
    torch.testing.assert_close(images.grad[1], torch.full((3, 4, 4), 2 / 48))


def test_a_wrong_shape_is_an_error():
    with pytest.raises(InvalidReward, match=r"'bad' returned the shape \(2, 1\) for 'reward', for 2 images: expected \(2,\), one number per image"):

        def bad(images, prompts):
            return torch.zeros(2, 1)

        score(bad, torch.rand(2, 3, 4, 4), PROMPTS)
    with pytest.raises(InvalidReward, match=r"none of which is called 'reward'"):
        score(lambda i, p: {"a": torch.zeros(2), "b": torch.zeros(2)}, torch.rand(2, 3, 4, 4), PROMPTS)
    with pytest.raises(InvalidReward, match="returned a str for 'reward'"):
        score(lambda i, p: "good", torch.rand(2, 3, 4, 4), PROMPTS)
    with pytest.raises(ValueError, match="got 2 images and 1 prompts"):
        score(brightness, torch.rand(2, 3, 4, 4), ["a cat"])
    with pytest.raises(ValueError, match="on_invalid"):
        score(brightness, torch.rand(2, 3, 4, 4), PROMPTS, on_invalid="ignore")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_errors_or_masked(value):
    def broken(images, prompts):
        return torch.tensor([1.0, value, value, 2.0, value, value])

    images, prompts = torch.rand(6, 3, 4, 4), [f"prompt {i}" for i in range(6)]
    with pytest.raises(InvalidReward) as caught:
        score(broken, images, prompts)
    message = str(caught.value)
    assert "'broken' is NaN or infinite for 4 of 6 images" in message
    assert "'prompt 1', 'prompt 2', 'prompt 4', ..." in message and "prompt 5" not in message
    assert "--invalid_rewards mask" in message
    masked = score(broken, images, prompts, on_invalid="mask")["reward"]
    assert masked.isnan().tolist() == [False, True, True, False, True, True] and masked[3] == 2


def test_weighted_sum_adds_and_reports_components():
    images = torch.rand(2, 3, 4, 4)
    light = brightness(images, PROMPTS)
    result = score(WeightedSum([(brightness, 2.0), (Scaled(10), -0.1, "scaled")]), images, PROMPTS)
    torch.testing.assert_close(result["reward"], 2 * light - light)
    torch.testing.assert_close(result["brightness"], light)
    torch.testing.assert_close(result["scaled"], 10 * light)
    torch.testing.assert_close(result["scaled/contrast"], images.flatten(1).std(1))
    torch.testing.assert_close(score(WeightedSum({brightness: 3}), images, PROMPTS)["reward"], 3 * light)


def test_weighted_sum_blames_the_component():
    def broken(images, prompts):
        return torch.tensor([1.0, float("nan")])

    total = WeightedSum({brightness: 1.0, broken: 0.5})
    with pytest.raises(InvalidReward, match=r"'brightness\*1\+broken\*0.5' is NaN or infinite for 1 of 2 images because of 'broken'. Prompts: 'two dogs'"):
        score(total, torch.rand(2, 3, 4, 4), PROMPTS)
    assert score(total, torch.rand(2, 3, 4, 4), PROMPTS, on_invalid="mask")["reward"].isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="different names"):
        WeightedSum([(brightness, 1.0), (brightness, 2.0)])
    with pytest.raises(ValueError, match="at least one"):
        WeightedSum({})


@pytest.mark.parametrize(
    "reward, prompt, only",
    [
        ("background_color", "a fox", "background_color scores only prompts that name a colour that it knows, or rows with one in a column `background`"),
        ("scene_score", "a sonnet", "scene_score scores only prompts that name an object that it knows"),
        ("background_color*1+jpeg_compressibility*0.1", "a fox", "background_color scores only prompts that name a colour"),
    ],
)
def test_a_prompt_that_a_reward_cannot_score_is_not_the_rewards_fault(reward, prompt, only):
    with pytest.raises(InvalidReward, match=only) as error:
        score(load_reward(reward), torch.rand(1, 3, 32, 32), [prompt])
    assert "Give it such ones, or leave such images out" in str(error.value) and "Repair" not in str(error.value)
