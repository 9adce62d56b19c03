"""Models are walked once a call, by us, and their devices are looked up when they have moved."""

import diffusers.hooks.group_offloading as group_offloading
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import HookRegistry, ModelHook
from tiny_pipelines import FAMILIES
from torch import nn

from diffusers_align import Policy
from diffusers_align.driving.module_tree import ModuleTree, device_of, modules_of, walks_spared

PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]


def test_modules_come_as_torch_walks_them():
    shared = nn.Linear(1, 1)
    module = nn.Sequential(shared, nn.ModuleList([nn.Sequential(shared, nn.ReLU()), nn.Identity()]), nn.Linear(1, 1))
    module.register_module("absent", None)
    assert modules_of(module) == list(module.modules())
    for component in FAMILIES["sd3"].build().components.values():
        if isinstance(component, nn.Module):
            assert modules_of(component) == list(component.modules())


@pytest.fixture
def looked(monkeypatch) -> list[nn.Module]:
    """The models that diffusers has walked to look for offloading."""
    found, stock = [], group_offloading._get_top_level_group_offload_hook
    monkeypatch.setattr(group_offloading, "_get_top_level_group_offload_hook", lambda module: (found.append(module), stock(module))[1])
    return found


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_diffusers_walks_no_modules_again(looked, name):
    policy = Policy(FAMILIES[name].build(), **FAMILIES[name].call)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    assert len(looked) > 0
    looked.clear()
    policy.transition(trajectory, 1)
    policy.rollout(PROMPTS, seeds=SEEDS)
    assert looked == []


def test_a_call_sees_the_pipelines_own_class_and_leaves_it():
    pipeline = FAMILIES["sd3"].build()
    cls = type(pipeline)
    with walks_spared(pipeline, ModuleTree.of(pipeline)):
        assert type(pipeline) is not cls and isinstance(pipeline, cls) and type(pipeline).__name__ == cls.__name__
        assert pipeline.device == pipeline._execution_device == torch.device("cpu")
    assert type(pipeline) is cls and "_devices" not in vars(pipeline) and "maybe_free_model_hooks" not in vars(pipeline)


def test_devices_follow_the_models():
    pipeline = FAMILIES["sd3"].build()
    for device in ("cpu", "meta"):
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.to(device)
        expected = pipeline.device, pipeline._execution_device
        assert expected[0].type == device
        with walks_spared(pipeline, ModuleTree.of(pipeline)):
            assert (pipeline.device, pipeline._execution_device) == expected


def test_components_are_those_of_now_within_a_call():
    pipeline = FAMILIES["sd3"].build()
    expected, other = pipeline.components, nn.Linear(1, 1)
    with walks_spared(pipeline, ModuleTree.of(pipeline)):
        assert pipeline.components == expected and list(pipeline.components) == list(expected)
        pipeline.vae = other
        assert pipeline.components["vae"] is other
    assert "_names" not in vars(pipeline) and pipeline.components == {**expected, "vae": other}


@pytest.mark.parametrize("accelerator", [False, True])
def test_a_models_device_is_looked_up_without_a_walk_where_nothing_can_wait_elsewhere(looked, monkeypatch, accelerator):
    model = FAMILIES["sd3"].build().transformer
    looked.clear()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    assert device_of(model) == torch.device("cpu") and bool(looked) is accelerator
    model.to("meta")
    looked.clear()
    assert device_of(model) == torch.device("meta") and bool(looked) is accelerator


@pytest.mark.parametrize("kind", ["accelerate", "diffusers"])
def test_a_pipeline_with_hooks_looks_as_ever(looked, kind):
    policy = Policy(FAMILIES["sd3"].build(), **FAMILIES["sd3"].call)
    before = policy.rollout(PROMPTS, seeds=SEEDS)
    deep = policy.pipeline.transformer.transformer_blocks[0].attn.to_q
    if kind == "accelerate":
        add_hook_to_module(deep, AlignDevicesHook(execution_device="cpu"))
    else:
        HookRegistry.check_if_exists_or_initialize(deep).register_hook(ModelHook(), "own")
    looked.clear()
    again = policy.rollout(PROMPTS, seeds=SEEDS)
    assert len(looked) > 0
    assert torch.equal(again.final, before.final)


def test_gradients_through_an_offloaded_part_are_refused():
    policy = Policy(FAMILIES["sd3"].build(), **FAMILIES["sd3"].call)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    add_hook_to_module(policy.pipeline.transformer.transformer_blocks[0].attn.to_q, AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(ValueError, match="The pipeline's transformer is offloaded"):
        policy.transition(trajectory, 1)
