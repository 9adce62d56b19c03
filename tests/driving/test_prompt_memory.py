"""Encoded prompts in a store: a later run encodes none, joined rows are the pipeline's own, and other results are left whole."""

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, embedded
from diffusers_align.data import TensorCache
from diffusers_align.driving.prompt_memory import PromptMemory

torch.set_num_threads(1)
PROMPTS = ["a fox", "two red lemons on grass", "a cat"]
CALL = {"max_sequence_length": 1, "num_inference_steps": 2, "guidance_scale": 3.0}


def sampled(store, prompts=PROMPTS):
    """Final latents of a new process's mini-sd3, and how often its text encoders ran."""
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    calls, encoders = [0], [m for name, m in pipeline.components.items() if name.startswith("text_encoder") and m is not None]
    for encoder in encoders:
        encoder.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    policy = Policy(pipeline, **CALL)
    policy.remember_prompts(4, store)
    return policy.rollout(prompts, seeds=list(range(len(prompts)))).final, calls[0]


def test_a_second_run_encodes_nothing_and_has_the_same_bits(tmp_path):
    plain, calls = sampled(None)
    first, _ = sampled(TensorCache(tmp_path, "model"))
    second, again = sampled(TensorCache(tmp_path, "model"))
    assert calls > 0 and again == 0 and torch.equal(first, second)
    torch.testing.assert_close(first, plain, rtol=1e-4, atol=1e-4)
    # Another batch of known prompts needs no encoder either, and each keeps its own.
    turned, again = sampled(TensorCache(tmp_path, "model"), PROMPTS[::-1])
    assert again == 0 and not torch.equal(turned, second)
    assert sampled(TensorCache(tmp_path, "another model"))[1] > 0


def test_a_damaged_file_is_encoded_again(tmp_path):
    first, _ = sampled(TensorCache(tmp_path, "model"))
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.warns(UserWarning, match="is damaged"):
        second, calls = sampled(TensorCache(tmp_path, "model"))
    assert calls > 0 and torch.equal(first, second) and sampled(TensorCache(tmp_path, "model"))[1] == 0


class Encoder:
    """A pipeline's side of `encode_prompt`."""

    dtype, device, _execution_device, components = torch.float32, torch.device("cpu"), torch.device("cpu"), {}

    def __init__(self, result):
        self.result, self.asked = result, []

    def encode_prompt(self, prompt, device=None, **others):
        self.asked.append(prompt)
        return self.result([vector(text) for text in prompt])


def vector(text):
    return torch.randn(1, 4, generator=torch.Generator().manual_seed(sum(text.encode())))


def padded(rows):
    """As many tokens as the longest text of the batch, whose lengths are in the numbers."""
    longest = max(2 + int(row[0, 0] > 0) for row in rows)
    return torch.stack([row.expand(longest, 4) for row in rows])


# what is returned, and whether a batch of three is made of rows
RESULTS = {
    "tensors": (lambda rows: (torch.cat(rows), None, [torch.cat(rows), 3]), True),
    "lists": (lambda rows: {"embeds": list(rows), "ids": torch.arange(5)}, True),
    "guided": (lambda rows: torch.cat([*(0 * row for row in rows), *rows]), False),
    "reversed": (lambda rows: (torch.cat(rows[::-1]),), False),
    "mixed": (lambda rows: (torch.cat(rows) + torch.cat(rows).mean(),), False),
    "counting": (lambda rows: (torch.cat(rows), len(rows)), False),
}


@pytest.mark.parametrize("name", RESULTS)
def test_rows_are_joined_only_where_the_pipeline_does_so(tmp_path, name):
    result, by_rows = RESULTS[name]
    pipeline, memory = Encoder(result), PromptMemory(store=TensorCache(tmp_path, name))
    with memory.installed(pipeline):
        found = pipeline.encode_prompt(PROMPTS)
    torch.testing.assert_close(found, result([vector(text) for text in PROMPTS]), rtol=0, atol=0)
    assert (PROMPTS not in pipeline.asked) == by_rows
    asked = len(pipeline.asked)
    with PromptMemory(store=TensorCache(tmp_path, name)).installed(pipeline):
        again = pipeline.encode_prompt(PROMPTS)
    torch.testing.assert_close(again, found, rtol=0, atol=0)
    assert pipeline.asked[asked:] == ([] if by_rows else [PROMPTS])


@pytest.mark.parametrize("name", RESULTS)
def test_a_prompt_that_comes_twice_is_encoded_once(name):
    """In memory too: the prompts of a group, and those of a pair's two sides."""
    result, by_rows = RESULTS[name]
    pipeline, batch = Encoder(result), [PROMPTS[i] for i in (0, 0, 1, 0, 2, 1)]
    with PromptMemory(once_each=True).installed(pipeline):
        found = pipeline.encode_prompt(batch, scale=2.0)
        torch.testing.assert_close(found, result([vector(text) for text in batch]), rtol=0, atol=0)
        assert (PROMPTS in pipeline.asked) == by_rows and (batch in pipeline.asked) == (not by_rows)
        asked = len(pipeline.asked)
        pipeline.encode_prompt(batch, scale=2.0)
        pipeline.encode_prompt(PROMPTS[:2], scale=2.0)
    assert pipeline.asked[asked:] == [PROMPTS[:2]], "where none comes twice, nothing is looked for"


def test_a_call_that_is_told_the_number_of_its_prompts_is_told_the_new_one():
    """Hunyuan-Image's reshapes by it."""
    pipeline = Encoder(lambda rows: torch.cat(rows))
    plain = pipeline.encode_prompt

    def counted(prompt, batch_size, **others):
        return plain(prompt).view(batch_size, 4)

    pipeline.encode_prompt = counted
    batch = ["a fox", "a cat", "a fox"]
    with PromptMemory(once_each=True).installed(pipeline):
        torch.testing.assert_close(pipeline.encode_prompt(prompt=batch, batch_size=3), torch.cat([vector(text) for text in batch]), rtol=0, atol=0)
    assert batch not in pipeline.asked


def test_other_lists_of_a_value_each_keep_a_call_whole():
    """VisualCloze has descriptions of contents beside its prompts, which may be None."""
    pipeline = Encoder(lambda rows: torch.cat(rows))
    batch, contents = ["a fox", "a fox"], [None, None]
    with PromptMemory(once_each=True).installed(pipeline):
        pipeline.encode_prompt(batch, contents=contents)
    assert pipeline.asked == [batch]


def test_a_mask_that_is_there_for_padded_prompts_alone_is_that_of_all_rows():
    def masked(rows):
        lengths = [2 + int(row[0, 0] > 0) for row in rows]
        mask = None if len(set(lengths)) == 1 else torch.tensor([[i < length for i in range(3)] for length in lengths])
        return torch.cat(rows), mask

    texts = ["a fox", "two red lemons on grass", "a cat", "dog", "cat"]
    short, long = (next(text for text in texts if (vector(text)[0, 0] > 0) == longer) for longer in (False, True))
    pipeline, batch = Encoder(masked), [short, long, short, long]
    with PromptMemory(once_each=True).installed(pipeline):
        embeds, mask = pipeline.encode_prompt(batch)
    assert torch.equal(embeds, torch.cat([vector(text) for text in batch]))
    assert mask.tolist() == masked([vector(text) for text in batch])[1].tolist()


def test_a_repeated_prompt_keeps_its_padding():
    pipeline, batch = Encoder(padded), ["a fox", "dog", "a fox", "dog", "cat"]
    with PromptMemory(once_each=True).installed(pipeline):
        torch.testing.assert_close(pipeline.encode_prompt(batch), padded([vector(text) for text in batch]), rtol=0, atol=0)


def test_prompts_of_unequal_lengths_are_not_stored_by_batches(tmp_path):
    pipeline = Encoder(padded)
    texts = [*PROMPTS, "dog", "cat"]
    lengths = {text: 2 + int(vector(text)[0, 0] > 0) for text in texts}
    assert len(set(lengths.values())) == 2, "the texts were chosen so"
    store, entries = TensorCache(tmp_path, "model"), []
    with PromptMemory(size=1, store=store).installed(pipeline):
        for epoch in range(3):
            for batch in ([texts[i], texts[j], texts[j]] for i in range(5) for j in range(5) if (i + j + epoch) % 2):
                torch.testing.assert_close(pipeline.encode_prompt(batch), padded([vector(text) for text in batch]))
            entries.append(store.size()[0])
    assert entries == [6, 6, 6], "the five texts, and what the pipeline makes of two"


def test_the_device_is_no_part_of_the_key_and_objects_stay_in_memory(tmp_path):
    pipeline = Encoder(lambda rows: torch.cat(rows))
    store = TensorCache(tmp_path, "model")
    with PromptMemory(store=store).installed(pipeline):
        pipeline.encode_prompt(PROMPTS, device=torch.device("cpu"))
    asked, entries = len(pipeline.asked), store.size()[0]
    with PromptMemory(store=store).installed(pipeline):
        assert pipeline.encode_prompt(PROMPTS, device=torch.device("meta")).device.type == "meta"
        assert len(pipeline.asked) == asked
        pipeline.encode_prompt(PROMPTS, image=torch.ones(1))
        pipeline.encode_prompt(PROMPTS, image=torch.zeros(1))
    assert len(pipeline.asked) == asked + 2 and store.size()[0] == entries
    with PromptMemory(store=store).installed(pipeline):
        pipeline.encode_prompt(["a fox"], scale=2.0)
        pipeline.encode_prompt(["a fox"], scale=3.0)
    assert len(pipeline.asked) == asked + 4, "other arguments are other entries"


@pytest.mark.parametrize("family", ["flux", "qwen_image", "sdxl"])
def test_any_pipelines_prompts_come_back(tmp_path, family):
    call = {**FAMILIES[family].call, "num_inference_steps": 2}
    finals = []
    for store in (None, TensorCache(tmp_path, family), TensorCache(tmp_path, family)):
        policy = Policy(FAMILIES[family].build(), **call)
        policy.remember_prompts(4, store)
        finals.append(policy.rollout(PROMPTS, seeds=[0, 1, 2]).final)
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(finals[1], finals[2])
