"""How rewards are called: nothing of the caller's reaches them, nothing of theirs but numbers and exceptions comes back."""

import json
import sys

import numpy as np
import pytest
import torch

from diffusers_align.data.prompts import Prompt, load_prompts
from diffusers_align.driving.outcome import Outcome
from diffusers_align.rewards import InvalidReward, RewardError, WeightedSum, load_reward, score
from diffusers_align.rewards.base import score_columns
from diffusers_align.training.gradient.bound_rewards import BoundReward
from diffusers_align.training.online.scoring import Scorer
from diffusers_align.training.run.failures import Interrupted

PROMPTS = ["a cat", "two dogs"]


def means(images, prompts, **columns):
    return images.flatten(1).mean(1)


# --- what a reward is given ----------------------------------------------------------------------------------------------


def scored_by_route(reward, images):
    """The same scores by each way that scripts take."""
    asked = [Prompt(text, {}) for text in PROMPTS]
    return {
        "score": score(reward, images, PROMPTS)["reward"],
        "sum": score(WeightedSum([(reward, 1.0, "part")]), images, PROMPTS)["reward"],
        "run": torch.tensor([row["reward"] for row in Scorer(reward)(images, asked)]),
        "thread": torch.tensor([row["reward"] for row in Scorer(reward, timeout=20.0)(images, asked)]),
        "gradients": BoundReward(reward, asked, "error")(images).detach(),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rewards_run_in_full_precision_whatever_the_caller_does(dtype):
    torch.manual_seed(0)
    layer, images = torch.nn.Linear(3 * 8 * 8, 1), torch.rand(2, 3, 8, 8)

    def linear(images, prompts, **columns):
        assert images.dtype == torch.float32
        return layer(images.flatten(1))[:, 0]

    expected = (images.flatten(1).double() @ layer.weight[0].double() + layer.bias.double()).detach().float()
    with torch.autocast("cpu", dtype=dtype):
        assert not torch.allclose(layer(images.flatten(1))[:, 0].float(), expected, rtol=0, atol=1e-6), "autocast makes a difference"
        for route, values in scored_by_route(linear, images).items():
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-6, msg=route)
        assert torch.is_autocast_enabled("cpu")
    half = images.to(dtype)
    assert torch.equal(score(linear, half, PROMPTS)["reward"], score(linear, half.float(), PROMPTS)["reward"])


def test_a_reward_that_changes_what_it_was_given_changes_nothing_else():
    images, prompts, columns = torch.rand(2, 3, 8, 8), list(PROMPTS), {"wanted": [{"objects": ["cat"]}, {"objects": ["dog"]}]}

    def vandal(images, prompts, wanted=None, **others):
        values = images.flatten(1).mean(1).clone()
        images.zero_()
        prompts.clear()
        for entry in wanted or []:
            entry["objects"].clear()
        return values

    before = images.clone()
    total = WeightedSum([(vandal, 1.0, "first"), (vandal, 1.0, "second")])
    result = score_columns(total, images, prompts, columns)
    assert torch.equal(result["first"], before.flatten(1).mean(1)) and torch.equal(result["first"], result["second"])
    assert torch.equal(images, before) and prompts == PROMPTS and columns["wanted"][1] == {"objects": ["dog"]}
    through_numpy = lambda images, prompts: torch.tensor(images.numpy().__imul__(0).mean((1, 2, 3)))  # noqa: E731
    score(through_numpy, images, prompts)
    assert torch.equal(images, before)

    watched = images.clone().requires_grad_()
    score(lambda i, p: i.mul_(2).flatten(1).sum(1), watched, prompts)["reward"].sum().backward()
    assert torch.equal(watched.grad, torch.full_like(images, 2.0)) and torch.equal(watched, before)


def test_images_that_are_no_floats_are_refused():
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got torch.uint8"):
        score(means, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), PROMPTS)


@pytest.mark.parametrize("name", ["reward", "on_invalid", "seed", "name"])
def test_columns_may_have_the_names_of_our_own_arguments(name):
    def given(images, prompts, **columns):
        return torch.tensor([float(value) for value in columns[name]])

    rows = Scorer(given)(torch.rand(2, 3, 4, 4), [Prompt("a", {name: 1}), Prompt("b", {name: 2})])
    assert [row["reward"] for row in rows] == [1, 2]
    assert score_columns(given, torch.rand(2, 3, 4, 4), PROMPTS, {name: [3, 4]})["reward"].tolist() == [3, 4]


@pytest.mark.parametrize("name", ["images", "prompts", "self"])
def test_a_prompt_file_with_a_field_that_no_reward_can_be_given_is_named(name, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a cat"}) + "\n" + json.dumps({"prompt": "a dog", name: 1}) + "\n")
    said = []
    assert load_prompts(str(file), say=said.append) == [Prompt("a cat"), Prompt("a dog")]
    assert len(said) == 1 and f"prompts.jsonl: the column '{name}' is not handed to rewards, which have an argument of that name" in said[0]
    file.write_text(json.dumps({name: "a cat", "reward": 0.5, "on_invalid": 1}) + "\n")
    assert load_prompts(str(file), column=name) == [Prompt("a cat", {"reward": 0.5, "on_invalid": 1})]


class Callable_:
    def __call__(self, images, prompts, **columns):
        return means(images, prompts)


class Module(torch.nn.Module):
    def forward(self, images, prompts, weight):
        return means(images, prompts)


@pytest.mark.parametrize(
    "reward, columns, reason",
    [
        (means, {"images": [1, 2]}, "multiple values for argument 'images'"),
        (means, {"prompts": [1, 2]}, "multiple values for argument 'prompts'"),
        (Callable_(), {"self": [1, 2]}, "multiple values for argument 'self'"),
        (lambda pictures, texts, **columns: means(pictures, texts), {"texts": [1, 2]}, "multiple values for argument 'texts'"),
        (lambda images, prompts: means(images, prompts), {"tag": [1, 2]}, "unexpected keyword argument 'tag'"),
        (lambda images, prompts, weight: means(images, prompts), {"tag": [1, 2]}, "missing a required argument: 'weight'"),
        (Module(), {}, "missing a required argument: 'weight'"),
        (lambda images: images, {}, "too many positional arguments"),
        (lambda: 0, {}, "too many positional arguments"),
    ],
)
def test_a_reward_that_cannot_be_called_says_what_to_write(reward, columns, reason):
    having = f"with the columns '{next(iter(columns))}'" if columns else "without columns"
    with pytest.raises(InvalidReward, match=rf"cannot be called as reward\(images, prompts, \*\*columns\) {having}: .*{reason}.*Columns are the prompt file"):
        score_columns(reward, torch.rand(2, 3, 4, 4), PROMPTS, columns)
    asked = [Prompt(text, {name: values[i] for name, values in columns.items()}) for i, text in enumerate(PROMPTS)]
    with pytest.raises(InvalidReward, match=reason):  # not a sample's fault: masking does not hide it
        Scorer(reward, on_nan="mask", on_failure="mask")(torch.rand(2, 3, 4, 4), asked)


@pytest.mark.parametrize("reward", [lambda prompts, completions, **kwargs: [len(p) for p in prompts], lambda prompt, image: 0.0])
def test_a_reward_that_takes_prompts_first_is_refused(reward):
    """As text rewards of TRL do: it would count channels for characters."""
    with pytest.raises(InvalidReward, match=r"takes 'prompts?' first, where it would get the images: .*reward\(images, prompts, \*\*columns\)"):
        score(reward, torch.rand(2, 3, 4, 4), PROMPTS)


def test_a_mistake_inside_a_reward_is_not_taken_for_its_signature():
    def broken(images, prompts, **columns):
        return means(images)

    with pytest.raises(TypeError, match="prompts"):
        score(broken, torch.rand(2, 3, 4, 4), PROMPTS)


def test_a_column_that_only_some_prompts_have_reaches_the_reward():
    def given(images, prompts, weight=None, **columns):
        return torch.tensor([0.0 if value is None else value for value in weight])

    asked = [Prompt("a", {}), Prompt("b", {"weight": 2.0})]
    assert [row["reward"] for row in Scorer(given)(torch.rand(2, 3, 4, 4), asked)] == [0, 2]
    assert BoundReward(given, asked, "error")(torch.rand(2, 3, 4, 4)).tolist() == [0, 2]


@pytest.mark.parametrize("name", ["metadata", "prompt_metadata"])
def test_the_signature_of_ddpo_pytorch_and_trl(name):
    scope = {}
    exec(f"def theirs(images, prompts, {name}): return images.flatten(1).mean(1) + 0 * len({name}), {{'seen': {name}}}", scope)
    seen = []

    def watching(images, prompts, metadata):
        seen.append(metadata)
        return np.array([1.0, 2.0]), {}

    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(score(scope["theirs"], images, PROMPTS, tag=["x", "y"])["reward"], images.flatten(1).mean(1))
    assert score(watching, images, PROMPTS, tag=["x", "y"], count=[1, 2])["reward"].tolist() == [1, 2]
    assert score(watching, images, PROMPTS)["reward"].tolist() == [1, 2]
    assert score(watching, images, PROMPTS, metadata=["m", "n"])["reward"].tolist() == [1, 2]
    both = lambda images, prompts, metadata, tag, **columns: torch.tensor([len(metadata), len(tag) + len(columns["count"])])  # noqa: E731
    assert score(both, images, PROMPTS, tag=["x", "y"], count=[1, 2])["reward"].tolist() == [2, 4]
    assert seen == [({"tag": "x", "count": 1}, {"tag": "y", "count": 2}), ({}, {}), ["m", "n"]]


# --- what a reward may answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, expected",
    [
        ([1, 2], [1, 2]), ((1.5, 2), [1.5, 2]), (np.array([1, 2], dtype=object), None), (torch.tensor([True, False]), [1, 0]), ([True, False], [1, 0]),
        (np.array([1, 2], dtype=np.uint8), [1, 2]), ([torch.tensor(1.0), torch.tensor(2.0)], [1, 2]), ([np.float32(1), 2], [1, 2]),
        ((torch.tensor([1.0, 2.0]), {"info": "x"}), [1, 2]), (({"reward": [1, 2], "other": [3, 4]}, {}), [1, 2]),
        (torch.tensor([1.0, 2.0]).to_sparse(), [1, 2]), (torch.tensor([1, 2], dtype=torch.bfloat16), [1, 2]),
    ],
)  # fmt: skip
def test_numbers_in_any_form_are_taken(answer, expected):
    if expected is None:
        with pytest.raises(InvalidReward, match="returned a ndarray for 'reward', which is no tensor of numbers"):
            score(lambda i, p: answer, torch.rand(2, 3, 4, 4), PROMPTS)
    else:
        result = score(lambda i, p: answer, torch.rand(2, 3, 4, 4), PROMPTS)["reward"]
        assert result.tolist() == expected and result.dtype == torch.float32


def test_a_masked_array_is_nan_where_it_is_masked_and_a_list_of_tensors_keeps_its_graph():
    masked = np.ma.array([1, 2], mask=[False, True])
    result = score(lambda i, p: masked, torch.rand(2, 3, 4, 4), PROMPTS, on_invalid="mask")["reward"]
    assert result[0] == 1 and result[1].isnan()
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    score(lambda i, p: [image.sum() for image in i], images, PROMPTS)["reward"].sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))


@pytest.mark.parametrize(
    "answer, message",
    [
        (torch.ones(2, dtype=torch.complex64), "returned a Tensor for 'reward', which is no tensor of numbers: complex numbers have no order"),
        ([1j, 2j], "complex numbers have no order"),
        (np.array(["1", "2"]), "returned a ndarray for 'reward'"),
        (["1", "2"], "returned a list for 'reward'"),
        ([None, 1.0], "returned a list for 'reward'"),
        (None, "returned a NoneType for 'reward'"),
        ([10**400, 1], "returned a list for 'reward', which is no tensor of numbers"),
        ((x for x in (1.0, 2.0)), "returned a generator for 'reward'"),
        ({1.0, 2.0}, "returned a set for 'reward'"),
        (torch.ones(3), r"the shape \(3,\) for 'reward', for 2 images"),
        (torch.ones(2, 1), r"the shape \(2, 1\)"),
        (torch.ones(1, 2), r"the shape \(1, 2\)"),
        (torch.tensor(1.0), r"the shape \(\)"),
        (3.0, r"the shape \(\)"),
        ([], r"the shape \(0,\)"),
        (torch.ones(2, device="meta"), "returned a Tensor for 'reward'"),
        ({}, r"a dict with the names \[\]: names are texts"),
        ({float("nan"): [1, 2]}, r"a dict with the names \[nan\]"),
        ({"reward": [1, 2], 3: [1, 2]}, r"a dict with the names \['reward', 3\]"),
        ({"reward": [1, 2], "other": [1]}, r"the shape \(1,\) for 'other'"),
        ({"reward": [1, 2], "other": "good"}, "returned a str for 'other'"),
        ({"a": [1, 2], "b": [1, 2]}, "none of which is called 'reward'"),
        ((torch.ones(2), torch.ones(2)), r"the shape \(2, 2\)"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), "is NaN or infinite for 1 of 2 images"),
    ],
)
def test_what_is_no_number_an_image_is_named(answer, message):
    with pytest.raises(InvalidReward, match=message):
        score(lambda i, p: answer, torch.rand(2, 3, 4, 4), PROMPTS)


# --- a reward that wants to end the run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, None, 3, "bye"])
@pytest.mark.parametrize("options", [{}, {"timeout": 20.0}, {"background": True}, {"background": True, "timeout": 20.0}])
def test_sys_exit_in_a_reward_is_an_error_of_the_reward(code, options):
    def leaving(images, prompts, **columns):
        sys.exit(code)

    shown = "" if code is None else repr(code)
    with Scorer(leaving, **options) as scorer, pytest.raises(RewardError, match=rf"'leaving' called sys.exit\({shown}\)"):
        scorer.submit([0], torch.rand(1, 3, 4, 4), [Prompt("a cat")])
        scorer.finish()
    asked = [Prompt("a cat")]
    for call in (lambda: score(leaving, torch.rand(1, 3, 4, 4), ["a"]), lambda: BoundReward(leaving, asked)(torch.rand(1, 3, 4, 4))):
        with pytest.raises(RewardError, match=r"called sys.exit"):
            call()
    scorer = Scorer(leaving, on_failure="mask", **options)
    assert scorer(torch.rand(1, 3, 4, 4), asked)[0]["reward"] != 0 and "called sys.exit" in scorer.failures[0]


def test_sys_exit_while_a_reward_is_loaded_is_an_error(tmp_path):
    (tmp_path / "program.py").write_text("import sys\ndef f(images, prompts): return images.mean((1, 2, 3))\nsys.exit(0)\n")
    (tmp_path / "leaving.py").write_text("class Leaving:\n    def __init__(self): raise SystemExit\n    def __call__(self, images, prompts): return 0\n")
    for spec in (f"{tmp_path}/program.py:f", f"{tmp_path}/leaving.py:Leaving", f"{tmp_path}/program.py:f*0.5 + jpeg_compressibility"):
        with pytest.raises(RewardError, match=r"(?s)Reward '.*' called sys.exit.*__main__"):
            load_reward(spec)


@pytest.mark.parametrize("options", [{}, {"timeout": 20.0}, {"background": True}])
@pytest.mark.parametrize("way_out", [KeyboardInterrupt, lambda: Interrupted(130)])
def test_ctrl_c_while_a_reward_runs_is_no_error_of_the_reward(way_out, options):
    def interrupted(images, prompts, **columns):
        raise way_out()

    with Scorer(interrupted, on_nan="mask", on_failure="mask", **options) as scorer, pytest.raises((KeyboardInterrupt, Interrupted)):
        scorer.submit([0], torch.rand(1, 3, 4, 4), [Prompt("a cat")])
        scorer.finish()


# --- sounds --------------------------------------------------------------------------------------------------------------

PICTURES, VIDEOS, SOUNDS = torch.rand(2, 3, 8, 8), torch.rand(2, 5, 3, 8, 8), torch.rand(2, 1, 100)


def rate_of(sounds, prompts, sampling_rate, **columns):
    assert not columns, "what is heard is no column of the data set"
    return sounds.flatten(1).mean(1) + sampling_rate


def either(images, prompts, sampling_rate=None):
    return images.flatten(1).mean(1) + (sampling_rate or 0)


def loudness(videos, prompts, audio, sampling_rate):
    assert audio.dtype == torch.float32
    return audio.abs().flatten(1).mean(1) * sampling_rate


def test_a_reward_that_declares_the_sampling_rate_gets_sounds_with_it():
    torch.testing.assert_close(score(rate_of, SOUNDS, PROMPTS, sampling_rate=16000)["reward"], SOUNDS.flatten(1).mean(1) + 16000)
    summed = score(WeightedSum([(rate_of, 1.0), (either, 0.5)]), SOUNDS, PROMPTS, sampling_rate=10)
    torch.testing.assert_close(summed["reward"], 1.5 * (SOUNDS.flatten(1).mean(1) + 10))
    made = Outcome(SOUNDS, sampling_rate=16000)
    assert [row["reward"] for row in Scorer(rate_of)(made, [Prompt("a"), Prompt("b")])] == score(rate_of, SOUNDS, PROMPTS, sampling_rate=16000)[
        "reward"
    ].tolist()
    bound = BoundReward(rate_of, [Prompt("a"), Prompt("b")], rate=lambda: 16000)
    assert torch.equal(bound(SOUNDS), score(rate_of, SOUNDS, PROMPTS, sampling_rate=16000)["reward"])


def test_rewards_that_do_not_declare_what_is_heard_are_not_given_it():
    def with_metadata(images, prompts, metadata):
        assert metadata == ({"wish": "a"}, {"wish": "b"})
        return images.flatten(1).mean(1)

    def all_columns(images, prompts, **columns):
        assert list(columns) == ["wish"]
        return images.flatten(1).mean(1)

    for reward in (with_metadata, all_columns):
        score_columns(reward, VIDEOS, PROMPTS, {"wish": ["a", "b"], "audio": SOUNDS, "sampling_rate": 16000})


def test_the_sound_of_videos_goes_to_rewards_that_declare_it():
    columns = {"audio": SOUNDS.half(), "sampling_rate": 2}
    expected = SOUNDS.half().float().abs().flatten(1).mean(1) * 2
    assert torch.equal(score_columns(loudness, VIDEOS, PROMPTS, columns)["reward"], expected)
    assert [row["reward"] for row in Scorer(loudness)(Outcome(VIDEOS, SOUNDS.half(), 2), [Prompt("a"), Prompt("b")])] == expected.tolist()
    with pytest.raises(ValueError, match="'audio' has 1 entries for 2 images"):
        score_columns(loudness, VIDEOS, PROMPTS, columns | {"audio": SOUNDS[:1]})


@pytest.mark.parametrize(
    "reward, images, message",
    [
        (means, SOUNDS, r"'means' judges pictures, and these are sounds \(B, C, T\) = \(2, 1, 100\): use a reward of sounds, such as spectral_centroid"),
        ("jpeg_compressibility", SOUNDS, "'jpeg_compressibility' judges pictures"),
        (WeightedSum([(either, 1.0), (means, 1.0)]), SOUNDS, "'means' judges pictures"),
        (rate_of, PICTURES, r"'rate_of' judges sounds \(B, C, T\) by their `sampling_rate`, and these are pictures \(2, 3, 8, 8\): use a reward of pictures"),
        ("spectral_centroid", VIDEOS, "'spectral_centroid' judges sounds .* and these are videos"),
        (rate_of, SOUNDS, "'rate_of' needs the sampling rate of the sounds: give it as `sampling_rate`"),
        (loudness, VIDEOS, "'loudness' judges the sound of videos, its argument `audio`, and there is none with these"),
    ],
)
def test_rewards_of_the_other_kind_are_refused_with_what_to_do(reward, images, message):
    reward = load_reward(reward)
    with pytest.raises(InvalidReward, match=message):
        score(reward, images, PROMPTS)
    with pytest.raises(InvalidReward, match=message):
        Scorer(reward, on_nan="mask", on_failure="mask")(images, [Prompt("a"), Prompt("b")])


def test_a_column_that_is_called_like_what_is_heard_is_refused():
    asked = [Prompt("a", {"audio": "a.wav"}), Prompt("b", {"audio": "b.wav"})]
    with pytest.raises(ValueError, match="column 'audio' is called like what rewards get of the pipeline's sound: rename"):
        Scorer(loudness)(Outcome(VIDEOS, SOUNDS, 2), asked)
    assert Scorer(lambda images, prompts, audio: [len(name) for name in audio])(PICTURES, asked), "without sound it is a column like any other"


@pytest.mark.parametrize(
    "reward, images, error",
    [
        ("clip_score", torch.rand(1, 3, 4, 4), "'clip_score' is a name: load_reward"),
        (lambda images, prompts: images.mean((1, 2, 3)), [torch.rand(3, 4, 4)], "got a list"),
        (lambda images, prompts: images.mean((1, 2, 3)), (255 * torch.ones(1, 3, 4, 4)).byte(), "got torch.uint8"),
    ],
)
def test_what_is_no_reward_and_what_are_no_images_is_said(reward, images, error):
    with pytest.raises((TypeError, ValueError), match=error):
        score(reward, images, ["a"])


def test_images_far_out_of_their_range_get_a_warning_and_a_decoder_may_overshoot():
    with pytest.warns(UserWarning, match="these have values up to 255. `images / 255`"):
        score(lambda images, prompts: images.mean((1, 2, 3)), 255 * torch.ones(1, 3, 4, 4), ["a"])
    assert score(lambda images, prompts: images.mean((1, 2, 3)), torch.full((1, 3, 4, 4), 1.3), ["a"])["reward"] == pytest.approx(1.3)
