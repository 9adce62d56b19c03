"""States as data: they come back with their types, order and bits."""

import pytest
import torch
from states import same

from diffusers_align.training.checkpoints.state_files import read_state, write_state

STATE = {
    "numbers": [1, -2.5, 0.1 + 0.2, 1e300, float("inf"), True, None, "text"],
    0: {"step": torch.tensor(3.0), "moments": torch.randn(2, 3)},
    "tuple": (1, (2, 3)),
    "half": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
    "empty": [{}, [], (), torch.zeros(0)],
}


# --- data, not code --------------------------------------------------------------------------------------------------------


def test_a_state_comes_back_with_its_types_order_and_bits(tmp_path):
    write_state(tmp_path, "state", STATE)
    assert same(read_state(tmp_path, "state"), STATE)
    write_state(tmp_path, "plain", {"a": 1})
    assert not (tmp_path / "plain.safetensors").exists() and read_state(tmp_path, "plain") == {"a": 1}


def test_tensors_that_share_memory_are_written(tmp_path):
    whole = torch.arange(6.0)
    write_state(tmp_path, "state", [whole, whole[2:4], whole.view(2, 3).T])
    assert same(read_state(tmp_path, "state"), [whole, whole[2:4], whole.view(2, 3).T.contiguous()])


@pytest.mark.parametrize("state, where", [({"a": [object()]}, r"state\['a'\]\[0\] is a object"), ({(1, 2): 3}, "has a tuple as a key")])
def test_what_is_no_data_is_refused_with_its_place(tmp_path, state, where):
    with pytest.raises(TypeError, match=where):
        write_state(tmp_path, "state", state)
