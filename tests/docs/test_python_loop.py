"""The loop of docs/python_loop.md: it fits on a screen, the reward rises, and a stock pipeline takes its LoRA."""

import re
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
PAGE = Path(__file__).parents[2] / "docs" / "python_loop.md"


@pytest.mark.slow
def test_the_loop_of_the_docs_raises_its_reward(tmp_path, monkeypatch, capsys):
    from diffusers import DiffusionPipeline

    from diffusers_align import embedded

    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 30
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # of the LoRA
    found = {}
    exec(compile(block, str(PAGE), "exec"), found)
    rewards = [float(value) for value in re.findall(r"reward (-?[\d.]+)", capsys.readouterr().out)]
    assert len(rewards) == 4 and rewards[-1] > rewards[0] + 0.1
    call = {"prompt": "a red apple", "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "pt"}
    stock = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    images = [stock(**call, generator=torch.Generator().manual_seed(0)).images]
    stock.load_lora_weights("blue")
    images.append(stock(**call, generator=torch.Generator().manual_seed(0)).images)
    assert found["reward"](images[1]) > found["reward"](images[0])
