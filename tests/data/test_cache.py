"""Tensors on disk by what they were computed from: entries come back whole or not at all."""

import copy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from diffusers_align.data import TensorCache, key_of
from diffusers_align.data.augment import Augmentation


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path, "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_entries_come_back_as_they_went_in(cache, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    cache.put("k" * 8, tensor)
    assert torch.equal(cache.get("k" * 8), tensor) and cache.get("k" * 8).dtype == dtype


def test_nested_entries_keep_their_structure(cache):
    shared = torch.ones(2, 2)
    tree = {"prompt_embeds": (shared, None), "pooled": [shared.t(), shared[:1]], "text": {"length": 3, "scale": 0.5, "prompt": "ü", "on": True}}
    cache.put("key", tree)
    found = cache.get("key")
    assert found["text"] == tree["text"] and found["prompt_embeds"][1] is None and type(found["prompt_embeds"]) is tuple and type(found["pooled"]) is list
    assert torch.equal(found["pooled"][1], shared[:1]) and torch.equal(found["prompt_embeds"][0], shared)


@pytest.mark.parametrize("tree, error", [({"a": object()}, "got object"), ({1: torch.ones(1)}, "string keys"), ({"a": {1, 2}}, "got set")])
def test_what_the_cache_does_not_take(cache, tree, error):
    with pytest.raises(TypeError, match=error):
        cache.put("key", tree)
    assert cache.get("key") is None and cache.size() == (0, 0)


def test_keys_depend_on_everything():
    plain = key_of("hash", 512, 512, Augmentation().key)
    assert plain == key_of("hash", 512, 512, Augmentation().key)
    others = [
        key_of("hash", 512, 512, Augmentation(flip=True).key),
        key_of("hash", 512, 256, Augmentation().key),
        key_of("other", 512, 512, Augmentation().key),
        key_of("hash"),
    ]
    assert len({plain, *others}) == 5 and key_of("ab", "c") != key_of("a", "bc")


def test_models_do_not_share_entries(tmp_path):
    TensorCache(tmp_path, "one").put("key", torch.ones(1))
    assert TensorCache(tmp_path, "two").get("key") is None and TensorCache(tmp_path, "one").get("key") is not None


def test_only_what_is_missing_is_computed(cache):
    asked = []

    def compute(positions):
        asked.append(positions)
        return [torch.full((2,), float(position)) for position in positions]

    cache.put("b", torch.full((2,), 9.0))
    first = cache.get_or_compute(["a", "b", "c", "a"], compute)
    assert asked == [[0, 2]] and [tensor[0].item() for tensor in first] == [0, 9, 2, 0]
    again = cache.get_or_compute(["c", "a"], compute)
    assert asked == [[0, 2]] and [tensor[0].item() for tensor in again] == [2, 0]
    with pytest.raises(ValueError, match="returned 0 entries for 1 positions"):
        cache.get_or_compute(["new"], lambda positions: [])


def test_the_size_report(cache):
    assert cache.size() == (0, 0)
    cache.put("a", torch.zeros(1000))
    cache.put("b", torch.zeros(1000))
    entries, size = cache.size()
    assert entries == 2 and 8000 < size < 9000


def test_half_files_are_not_read(cache):
    cache.put("key", torch.zeros(1000))
    (path,) = cache.folder.glob("*/*.safetensors")
    data = path.read_bytes()
    path.with_name("key-0.partial").write_bytes(data[:100])  # what a killed process leaves
    assert cache.size()[0] == 1 and cache.get("key") is not None
    path.write_bytes(data[:100])
    with pytest.warns(UserWarning, match="is damaged .* will be computed again"):
        (tensor,) = cache.get_or_compute(["key"], lambda positions: [torch.ones(3)])
    assert torch.equal(tensor, torch.ones(3)) and torch.equal(cache.get("key"), torch.ones(3))


def test_a_failed_write_leaves_the_old_entry_and_no_litter(cache, monkeypatch):
    cache.put("key", torch.ones(1))

    def fail(path, content):
        with path.open("wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.put("key", torch.zeros(1))
    assert torch.equal(cache.get("key"), torch.ones(1)) and not list(cache.folder.glob("*/*.partial"))


def test_threads_may_write_and_read_one_entry(cache):
    failures = []

    def work(value):
        for _ in range(20):
            cache.put("key", torch.full((5000,), float(value)))
            found = cache.get("key")
            if found is None or found.unique().numel() != 1:
                failures.append(found)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and cache.size()[0] == 1


WRITER = """
import sys, torch
from diffusers_align.data.cache import TensorCache
cache, value = TensorCache(sys.argv[1], "model"), float(sys.argv[2])
print("ready", flush=True)
while True:
    cache.put("key", torch.full((200000,), value))
"""


@pytest.mark.slow
def test_processes_may_write_one_entry_and_be_killed_while_they_do(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(value)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) for value in range(2)
    ]
    cache, seen = TensorCache(tmp_path, "model"), set()
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        while cache.get("key") is None:
            assert all(writer.poll() is None for writer in writers)
        for _ in range(200):
            seen |= set(cache.get("key").unique().tolist()[:2])
            assert cache.get("key").unique().numel() == 1
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert seen <= {0.0, 1.0} and cache.get("key").unique().numel() == 1


def test_the_latest_entries_stay_in_memory_as_far_as_they_fit(tmp_path):
    cache = TensorCache(tmp_path, "model", at_hand=2 * 4000)
    for key in "abc":
        cache.put(key, [torch.full((1000,), float(ord(key))), None])
        assert cache.get(key)[0][0] == ord(key)
    for path in cache.folder.glob("*/*.safetensors"):
        path.unlink()
    assert cache.get("a") is None, "the oldest went"
    cache.get("c")[0].zero_()
    assert cache.get("c")[0][0] == ord("c") and cache.get("b")[1] is None, "each caller has a copy"

    assert copy.deepcopy(cache).get("c") is None, "copies have the files alone"

    cache.put("c", torch.ones(3))
    assert torch.equal(cache.get("c"), torch.ones(3)), "what is written counts"
    cache.put("large", torch.ones(5000))
    assert cache.get("large").sum() == 5000 and cache.get("b") is None
