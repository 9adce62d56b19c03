"""When prompts are encoded anew: after each change of what encodes them, and only then."""

import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, inject_adapter_in_model
from tiny_pipelines import FAMILIES
from torch import nn

from diffusers_align import Policy, lora
from diffusers_align.data import TensorCache
from diffusers_align.driving.encoder_state import encoder_digest, encoder_state

torch.set_num_threads(1)
FAMILY = FAMILIES["sd15"]
PROMPTS = ["a fox", "a cat"]


def adapted(encoder, seed=0):
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False), encoder, "style")


def written(pipeline):
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).mul_(2.0)


def replaced_weight(pipeline):
    linear = next(part for part in pipeline.text_encoder.modules() if isinstance(part, nn.Linear))
    linear.weight = nn.Parameter(2 * linear.weight.detach())


def other(pipeline):
    pipeline.text_encoder = type(pipeline.text_encoder)(pipeline.text_encoder.config).eval()


def swapped(pipeline):
    adapted(pipeline.text_encoder)
    first = encoder_state(pipeline)
    for layer in lora.layers_of(pipeline.text_encoder):
        layer.delete_adapter("style")
    adapted(pipeline.text_encoder, seed=1)
    assert encoder_state(pipeline) != first


CHANGES = {"LoRA": lambda pipeline: adapted(pipeline.text_encoder), "another LoRA": swapped, "written": written, "a weight": replaced_weight, "another": other}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_encoders_encode_anew(name):
    policy = Policy(FAMILY.build(), **FAMILY.call)
    before = policy.rollout(PROMPTS, seeds=[1, 2]).final
    CHANGES[name](policy.pipeline)
    after = policy.rollout(PROMPTS, seeds=[1, 2]).final
    policy.prompt_memory.entries.clear()
    assert torch.equal(after, policy.rollout(PROMPTS, seeds=[1, 2]).final) and not torch.equal(after, before)


def test_an_adapter_that_comes_back_is_known():
    pipeline = FAMILY.build()
    adapted(pipeline.text_encoder)
    on = encoder_state(pipeline)
    with lora.disabled([pipeline.text_encoder]):
        off = encoder_state(pipeline)
    layer = lora.layers_of(pipeline.text_encoder)[0]
    assert encoder_state(pipeline) == on != off
    layer.scale_layer(0.5)
    assert encoder_state(pipeline) != on
    layer.unscale_layer(0.5)
    layer.merge()
    assert encoder_state(pipeline) != on


def test_what_changes_no_encoding_leaves_it():
    policy = Policy(FAMILY.build(), **FAMILY.call)
    policy.rollout(PROMPTS[:1], seeds=[1])
    before = encoder_state(policy.pipeline)
    for parameter in policy.add_lora(2):
        parameter.data.add_(1.0)
    policy.pipeline.text_encoder.to("cpu").requires_grad_(True).train()
    assert encoder_state(policy.pipeline) == before
    cpu_offload(policy.pipeline.text_encoder, torch.device("cpu"))
    away = encoder_state(policy.pipeline)
    policy.pipeline.text_encoder(torch.zeros(1, 4, dtype=torch.long))
    assert encoder_state(policy.pipeline) == away
    policy.pipeline.text_encoder = None
    assert encoder_state(policy.pipeline) != away


def test_an_encoder_that_is_replaced_is_not_kept():
    pipeline = FAMILY.build()
    encoder_state(pipeline)
    gone = weakref.ref(pipeline.text_encoder)
    pipeline.text_encoder = None
    gc.collect()
    assert gone() is None


def test_a_store_is_of_the_encoders_that_it_was_given_for(tmp_path):
    """What others make does not go there, and comes from there to nobody else."""

    def rolled(policy):
        return policy.rollout(PROMPTS, seeds=[1, 2]).final

    policy, store = Policy(FAMILY.build(), **FAMILY.call), TensorCache(tmp_path, "model")
    policy.remember_prompts(4, store)
    plain, entries = rolled(policy), store.size()
    adapted(policy.pipeline.text_encoder)
    tuned = rolled(policy)
    policy.prompt_memory.entries.clear()
    assert torch.equal(rolled(policy), tuned) and not torch.equal(tuned, plain) and store.size() == entries
    resumed = Policy(FAMILY.build(), **FAMILY.call)
    adapted(resumed.pipeline.text_encoder)
    resumed.remember_prompts(4, TensorCache(tmp_path, "model"))
    assert torch.equal(rolled(resumed), tuned) and store.size() == entries


def test_encoders_away_encode_what_they_are():
    policy = Policy(FAMILY.build(), **FAMILY.call)
    policy.offload_text_encoders()
    first = policy.rollout(PROMPTS, seeds=[1, 2]).final
    visits = policy.prompt_memory.encoders.visits
    policy.rollout(PROMPTS, seeds=[1, 2])
    features = policy.prompt_features(policy.condition(PROMPTS))
    assert policy.prompt_memory.encoders.visits == visits, "that they come and go is no change"
    written(policy.pipeline)
    assert not torch.equal(policy.rollout(PROMPTS, seeds=[1, 2]).final, first)
    assert not torch.equal(policy.prompt_features(policy.condition(PROMPTS)), features)


@pytest.mark.parametrize("change", [written, replaced_weight, other, lambda pipeline: pipeline.vae.register_to_config(scaling_factor=0.5)])
def test_a_digest_is_of_weights_and_configs_and_not_of_the_denoiser(change):
    pipeline = FAMILY.build()
    first = encoder_digest(pipeline)
    with torch.no_grad():
        next(pipeline.unet.parameters()).mul_(2.0)
    assert encoder_digest(pipeline) == first
    change(pipeline)
    assert encoder_digest(pipeline) != first


def test_a_digest_takes_any_precision_and_weights_that_are_elsewhere():
    pipeline = FAMILY.build()
    assert encoder_digest(pipeline) == encoder_digest(pipeline)
    half = encoder_digest(pipeline.to(torch.bfloat16))
    pipeline.text_encoder.to("meta")
    assert encoder_digest(pipeline) != half
