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
    assert "names_of_components" not in vars(pipeline) and pipeline.components == {**expected, "vae": other}


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


CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_groups_that_are_offloaded_sample_and_have_no_gradients(kind):
    chosen = FAMILIES["flux"]
    policy = Policy(chosen.build(), **{**chosen.call, "num_inference_steps": 2})
    whole = policy.rollout(["a cat"], seeds=[0])
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    policy.pipeline.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **groups)
    assert torch.equal(policy.rollout(["a cat"], seeds=[0]).final, whole.final)
    with torch.no_grad():
        policy.replay(whole, lambda k, transition: None)
    with pytest.raises(ValueError, match="The pipeline's transformer is offloaded.*--offload_text_encoders"):
        policy.replay(whole, lambda k, transition: None)


def test_weights_that_are_cast_layer_by_layer_are_those_that_were_rounded():
    """`enable_layerwise_casting`: the gradients, too, are those of a model with these weights."""
    chosen, found = FAMILIES["flux"], []
    for cast in (True, False):
        pipeline = chosen.build()
        if cast:
            pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        policy = Policy(pipeline, **{**chosen.call, "num_inference_steps": 2})
        lora = policy.add_lora(4)
        assert {weight.dtype for weight in lora} == {torch.float32}
        for weight in lora:
            nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
        if cast:
            policy.rollout(["a cat"], seeds=[0])
            stored = {name for name, weight in pipeline.transformer.named_parameters() if weight.dtype == torch.float8_e4m3fn}
            assert stored
        for name, weight in pipeline.transformer.named_parameters():
            if not cast and name in stored:
                weight.data = weight.data.to(torch.float8_e4m3fn).float()
        trajectory = policy.rollout(["a cat"], seeds=[0])
        policy.replay(trajectory, lambda k, transition, actions=trajectory.actions: transition.log_prob(actions[:, k]).sum().backward())
        found.append([trajectory.final, *(weight.grad for weight in lora)])
    assert all(map(torch.equal, *found))
