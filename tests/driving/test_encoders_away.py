"""Text encoders off the device: where they are when, how often they encode, and that placement alone changes no bit."""

import copy
from collections import Counter

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, embedded
from diffusers_align.driving.encoders_away import EncodersAway, KeptOnCPU

CALL = {"max_sequence_length": 1, "num_inference_steps": 2, "guidance_scale": 1.0}
PROMPTS = ["a fox", "two red lemons on grass", "a cat", "a blue bird"]
HERE, CPU = "cuda", "cpu"


class Placed:
    """Where a pipeline's text encoders are said to be, by their `to`, which moves nothing; and where that is at each call of theirs and of the denoiser."""

    def __init__(self, policy):
        self.places, self.moves, self.calls, self.texts = {}, [], [], Counter()
        for name, part in policy.pipeline.components.items():
            if isinstance(part, torch.nn.Module) and name.startswith(("text_encoder", "transformer")):
                part.register_forward_pre_hook(lambda module, args, name=name: self._called(name, args))
            if name.startswith("text_encoder") and part is not None:
                part.__dict__["to"] = lambda device, name=name: self._to(name, device)

    def _to(self, name, device):
        self.places[name] = device.type
        if set(self.places.values()) == {device.type} and self.moves[-1:] != [device.type]:
            self.moves.append(device.type)

    def _called(self, name, args):
        self.calls.append((name, set(self.places.values())))
        if name == "text_encoder":
            self.texts.update(tuple(row) for row in args[0].tolist())


def placed(**call):
    policy = Policy(DiffusionPipeline.from_pretrained(embedded.path("mini-sd3")), **{**CALL, **call})
    found = Placed(policy)
    policy.remember_prompts(8)
    policy.offload_text_encoders()
    policy.prompt_memory.encoders.device = torch.device(HERE)
    return policy, found


def test_they_are_on_the_device_only_while_they_encode():
    policy, found = placed()
    assert found.moves == [CPU]
    policy.expect_prompts(PROMPTS)
    first = policy.rollout(PROMPTS[:2], seeds=[0, 1])
    second = policy.rollout(PROMPTS[2:], seeds=[2, 3])
    for trajectory in (first, second, first):
        policy.replay(trajectory, lambda k, transition: None)
        policy.outcome(trajectory)
    assert found.moves == [CPU, HERE, CPU], "one visit for all that was announced"
    assert {tuple(where) for name, where in found.calls if name.startswith("text_encoder")} == {(HERE,)}
    denoised = [where for name, where in found.calls if name == "transformer"]
    assert denoised and all(where == {CPU} for where in denoised)


def test_each_prompt_is_encoded_once_a_run():
    policy, found = placed()
    tokenizer = policy.pipeline.tokenizer
    tokens = [tuple(tokenizer(p, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids) for p in PROMPTS]
    for epoch in range(3):
        order = [PROMPTS[(i * (epoch + 1) + epoch) % 4] for i in range(4)]
        policy.expect_prompts(order)
        for batch in (order[:2], order[2:], [order[0], order[0], order[3]]):
            policy.rollout(batch, seeds=list(range(len(batch))))
    assert [found.texts[row] for row in tokens] == [1] * 4
    policy.rollout(PROMPTS[:2], seeds=[0, 1], guidance_scale=5.0)
    assert [found.texts[row] for row in tokens] == [2] * 4, "another kind of call, with a negative prompt"


def test_a_negative_prompt_for_all_brings_them_once_and_one_of_each_prompt_again():
    policy, found = placed()
    for negative in ("grey", ["grey", "blue"]):
        visits = policy.prompt_memory.encoders.visits
        policy.expect_prompts(PROMPTS)
        for batch in (PROMPTS[:2], PROMPTS[2:]):
            policy.rollout(batch, seeds=[0, 1], guidance_scale=3.0, negative_prompt=negative)
        assert policy.prompt_memory.encoders.visits == visits + (1 if negative == "grey" else 2)


def test_placement_changes_no_bit_and_the_memory_rounds_alone():
    finals = []
    for away in (False, True, None):
        policy = Policy(DiffusionPipeline.from_pretrained(embedded.path("mini-sd3")), **{**CALL, "guidance_scale": 3.0})
        policy.remember_prompts(4, KeptOnCPU() if away is False else None)
        if away:
            policy.offload_text_encoders()
        finals.append(policy.rollout(PROMPTS, seeds=[0, 1, 2, 3]).final)
    assert torch.equal(finals[0], finals[1])
    torch.testing.assert_close(finals[2], finals[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "qwen_image", "sdxl", "wan"])
def test_any_pipelines_encoders_leave(family):
    finals = []
    for away in (False, True):
        policy = Policy(FAMILIES[family].build(), **{**FAMILIES[family].call, "num_inference_steps": 2})
        policy.remember_prompts(4, None if away else KeptOnCPU())
        if away:
            policy.offload_text_encoders()
        finals.append([policy.rollout(PROMPTS[:2], seeds=[0, 1]).final, policy.prompt_features(policy.condition(PROMPTS[:1], seeds=[0]))])
    assert all(map(torch.equal, *finals))


def test_features_of_prompts_are_those_of_the_memory():
    policy, found = placed()
    policy.rollout(PROMPTS[:2], seeds=[0, 1])
    moves = list(found.moves)
    features = policy.prompt_features(policy.condition(PROMPTS[:2], seeds=[0, 1]))
    assert found.moves == moves and features.shape[0] == 2
    alone = Policy(DiffusionPipeline.from_pretrained(embedded.path("mini-sd3")), **CALL)
    assert torch.equal(features, alone.prompt_features(alone.condition(PROMPTS[:2], seeds=[0, 1])))


def test_given_embeddings_bring_nobody():
    policy, found = placed()
    reference = Policy(DiffusionPipeline.from_pretrained(embedded.path("mini-sd3")), **CALL)
    embeds, _, pooled, _ = reference.pipeline.encode_prompt(PROMPTS[:1], None, None, do_classifier_free_guidance=False, max_sequence_length=1)
    policy.rollout(policy.condition(None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, seeds=[0]))
    assert found.moves == [CPU]


def test_a_copy_has_encoders_of_its_own():
    policy = Policy(DiffusionPipeline.from_pretrained(embedded.path("mini-sd3")), **CALL)
    policy.offload_text_encoders()
    copied = copy.deepcopy(policy)
    away = copied.prompt_memory.encoders
    assert away is not policy.prompt_memory.encoders and away.encoders["text_encoder"] is copied.pipeline.text_encoder
    assert torch.equal(copied.rollout(PROMPTS[:1], seeds=[0]).final, policy.rollout(PROMPTS[:1], seeds=[0]).final)
    assert policy.prompt_memory.encoders.visits == away.visits == 1


def test_what_cannot_be_is_refused_in_a_sentence():
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    away = EncodersAway(pipeline, torch.device("cpu"))
    with pytest.raises(ValueError, match="runs its text_encoder_2 also where it encodes no prompt.*leave the flag out"):
        pipeline.text_encoder_2(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="text_encoder also"):  # a part of it, past the model's own forward
        next(part for part in pipeline.text_encoder.modules() if isinstance(part, torch.nn.Embedding))(torch.zeros(1, 4, dtype=torch.long))
    with away.called(lambda prompt: pipeline.text_encoder(torch.zeros(1, 4, dtype=torch.long))) as encode:
        encode(None)
    assert away.visits == 1 and not away.here
    pipeline.text_encoder = pipeline.text_encoder_2 = pipeline.text_encoder_3 = None
    with pytest.raises(ValueError, match="has no text encoder that could leave"):
        EncodersAway(pipeline, torch.device("cpu"))


def test_it_is_said_once_where_batches_are_encoded_whole(monkeypatch):
    said = []
    monkeypatch.setattr("diffusers_align.driving.encoders_away.logger.warning", said.append)
    policy, found = placed()
    for images in (torch.zeros(1), torch.ones(1)):
        policy.prompt_memory.recall(policy.pipeline, lambda prompt, image: torch.zeros(1), (PROMPTS[:1],), {"image": images})
    assert len(said) == 1 and "more than texts" in said[0] and found.moves == [CPU, HERE, CPU, HERE, CPU]


def test_a_store_keeps_the_latest_and_what_is_common_once():
    store = KeptOnCPU(limit=100)
    negative = torch.zeros(10)
    for i in range(4):
        store.put(str(i), (torch.full((5,), float(i)), negative.clone(), "text", None))
    assert store.get("0") is None and store.get("3")[0].tolist() == [3.0] * 5 and store.get("3")[2:] == ("text", None)
    assert store.get("3")[1] is store.get("2")[1] and store.size == 60
    assert not copy.deepcopy(store).entries
