import dataclasses

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_align import Condition, Trajectory

torch.set_num_threads(1)
TENSORS = ("states", "actions", "timesteps", "sigmas", "stochastic", "log_probs")


def condition(size: int, first: int = 0, **kwargs) -> Condition:
    kwargs = {"guidance_scale": 4.5, "negative_prompt": "blurry", "sigmas": [1.0, 0.6, 0.3], "height": 32} | kwargs
    kwargs |= {"prompt_2": [f"second {first + i}" for i in range(size)], "prompt_embeds": torch.arange(first, first + size).float()[:, None].repeat(1, 4)}
    return Condition([f"prompt {first + i}" for i in range(size)], kwargs, [100 + first + i for i in range(size)])


def trajectory(size: int, first: int = 0, steps: int = 3, shape=(4, 2, 2), children: int = 0, **kwargs) -> Trajectory:
    generator = torch.Generator().manual_seed(7 + first)
    log_probs = torch.randn(size, steps, generator=generator, dtype=torch.float64)
    log_probs[:, -1] = float("nan")
    shared = condition(size, first, **kwargs)
    return Trajectory(
        states=torch.randn(size, steps, *shape, generator=generator),
        actions=torch.randn(size, steps, *shape, generator=generator),
        timesteps=torch.linspace(1000, 100, steps),
        sigmas=torch.linspace(1, 0.1, steps),
        stochastic=torch.arange(steps) < steps - 1,
        log_probs=log_probs,
        condition=shared,
        children=tuple(dataclasses.replace(trajectory(size, first + 50 + i, steps, (6,)), condition=shared) for i in range(children)),
    )


def assert_same_value(actual, expected):
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(), expected.nan_to_num())
    elif isinstance(expected, list):
        assert isinstance(actual, list) and len(actual) == len(expected)
        for one, other in zip(actual, expected):
            assert_same_value(one, other)
    else:
        assert type(actual) is type(expected) and actual == expected


def assert_same(actual: Trajectory, expected: Trajectory):
    for name in TENSORS:
        assert_same_value(getattr(actual, name), getattr(expected, name))
    assert actual.condition.prompts == expected.condition.prompts and actual.condition.seeds == expected.condition.seeds
    for kind in ("kwargs", "per_sample"):
        mine, theirs = getattr(actual.condition, kind), getattr(expected.condition, kind)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_same_value(mine[name], value)
    assert len(actual.children) == len(expected.children)
    for mine, theirs in zip(actual.children, expected.children):
        assert_same(mine, theirs)


def test_shapes_and_ends():
    whole = trajectory(2)
    assert len(whole) == 2 and whole.num_steps == 3
    assert torch.equal(whole.final, whole.actions[:, -1])
    assert torch.equal(whole.samples[:, :-1], whole.states) and torch.equal(whole.samples[:, -1], whole.final)


def test_select_picks_the_samples_and_what_belongs_to_them():
    whole = trajectory(4, children=1)
    part = whole.select([3, 1])
    assert len(part) == 2 and part.condition.prompts == ["prompt 3", "prompt 1"] and part.condition.seeds == [103, 101]
    assert torch.equal(part.states, whole.states[[3, 1]]) and torch.equal(part.actions, whole.actions[[3, 1]])
    assert torch.equal(part.log_probs[:, :2], whole.log_probs[[3, 1], :2])
    assert torch.equal(part.timesteps, whole.timesteps) and torch.equal(part.sigmas, whole.sigmas)
    assert part.condition.per_sample["prompt_2"] == ["second 3", "second 1"]
    assert part.condition.per_sample["prompt_embeds"][:, 0].tolist() == [3, 1]
    assert part.condition.kwargs["guidance_scale"] == 4.5 and part.condition.kwargs["negative_prompt"] == "blurry"
    assert torch.equal(part.children[0].states, whole.children[0].states[[3, 1]])


def test_select_takes_slices():
    whole = trajectory(5, children=1)
    assert_same(whole.select(slice(1, 4)), whole.select([1, 2, 3]))
    assert_same(whole.select(slice(None)), whole)


def test_select_leaves_a_schedule_of_the_batchs_length_alone():
    part = trajectory(3).select([2])
    assert part.condition.kwargs["sigmas"] == [1.0, 0.6, 0.3]


@pytest.mark.parametrize("children", [0, 2])
def test_cat_undoes_select(children):
    whole = trajectory(5, children=children)
    assert_same(Trajectory.cat([whole.select([0, 1]), whole.select([2]), whole.select(slice(3, 5))]), whole)


def test_cat_keeps_a_schedule_of_the_batchs_length():
    joined = Trajectory.cat([trajectory(3), trajectory(3, first=3)])
    assert joined.condition.kwargs["sigmas"] == [1.0, 0.6, 0.3]
    assert joined.condition.prompts == [f"prompt {i}" for i in range(6)]


def test_cat_without_seeds_has_none():
    parts = [dataclasses.replace(t, condition=dataclasses.replace(t.condition, seeds=None)) for t in (trajectory(1), trajectory(2, first=1))]
    assert Trajectory.cat(parts).condition.seeds is None
    assert parts[1].select([0]).condition.seeds is None


def test_different_schedules_cannot_be_joined():
    one = trajectory(2)
    others = (
        trajectory(2, steps=4),
        dataclasses.replace(one, timesteps=one.timesteps + 1),
        dataclasses.replace(one, stochastic=torch.ones(3, dtype=torch.bool)),
    )
    for other in others:
        with pytest.raises(ValueError, match="different schedules"):
            Trajectory.cat([one, other])


@pytest.mark.parametrize("children", [0, 2])
def test_save_and_load_give_back_the_same(tmp_path, children):
    lengths = [torch.arange(length + 1.0) for length in range(3)]
    whole = trajectory(3, children=children, mask=torch.tensor([True, False, True]), guidance_scale_2=None, negative_prompt_embeds=lengths)
    whole.save(tmp_path / "trajectory.safetensors")
    assert_same(Trajectory.load(tmp_path / "trajectory.safetensors"), whole)


def test_bfloat16_survives_save_and_load(tmp_path):
    whole = trajectory(2)
    whole = dataclasses.replace(whole, states=whole.states.bfloat16(), actions=whole.actions.bfloat16())
    whole.save(tmp_path / "trajectory.safetensors")
    assert_same(Trajectory.load(tmp_path / "trajectory.safetensors"), whole)


@pytest.mark.parametrize("size", [1, 3])
def test_views_of_one_tensor_can_be_saved(tmp_path, size):
    samples = torch.randn(size, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    whole = dataclasses.replace(trajectory(size), states=samples[:, :-1], actions=samples[:, 1:])
    whole.save(tmp_path / "trajectory.safetensors")
    assert_same(Trajectory.load(tmp_path / "trajectory.safetensors"), whole)


def test_one_tensor_in_two_arguments_can_be_saved(tmp_path):
    embeds = torch.randn(2, 3)
    whole = trajectory(2, image_embeds=embeds, negative_image_embeds=embeds)
    whole.save(tmp_path / "trajectory.safetensors")
    assert_same(Trajectory.load(tmp_path / "trajectory.safetensors"), whole)


def test_a_selection_can_be_saved(tmp_path):
    part = trajectory(4, children=1).select([2, 0])
    part.save(tmp_path / "part.safetensors")
    assert_same(Trajectory.load(tmp_path / "part.safetensors"), part)


def test_an_image_among_the_arguments_is_refused_by_name(tmp_path):
    whole = trajectory(2, mask_image=Image.new("RGB", (2, 2)))
    with pytest.raises(TypeError, match="Cannot save.*mask_image.*Image is not JSON serializable"):
        whole.save(tmp_path / "trajectory.safetensors")
    assert not (tmp_path / "trajectory.safetensors").exists()


def test_to_moves_the_children_too():
    moved = trajectory(2, children=1).to("meta")
    assert moved.states.device.type == "meta" and moved.children[0].log_probs.device.type == "meta"


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        trajectory(1).states = torch.zeros(1)


def test_different_call_arguments_cannot_be_joined():
    with pytest.raises(ValueError, match="different guidance_scale cannot be joined"):
        Trajectory.cat([trajectory(2, guidance_scale=3.0), trajectory(2, guidance_scale=4.0)])


def test_tuples_stay_tuples(tmp_path):
    sizes = {"original_size": (64, 64), "nested": [(1, 2), {"a": (torch.ones(2), "b")}]}
    trajectory(2, **sizes).save(tmp_path / "trajectory.safetensors")
    loaded = Trajectory.load(tmp_path / "trajectory.safetensors").condition.kwargs
    assert loaded["original_size"] == (64, 64) and loaded["nested"][0] == (1, 2)
    tensor, text = loaded["nested"][1]["a"]
    assert torch.equal(tensor, torch.ones(2)) and text == "b"


def test_files_that_are_no_trajectories(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Trajectory.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        Trajectory.load(tmp_path / "text")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="is no trajectory"):
        Trajectory.load(tmp_path / "weights")
