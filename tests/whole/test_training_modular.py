"""A training script and the evaluation on the folder of a modular pipeline, and what comes of them in either kind."""

import importlib.util
import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from modular_pipelines import modular_of
from script_tools import RECIPES, rows, run_script, write_task

from diffusers_align import Policy, embedded
from diffusers_align.files import lora_finder

CALL = {"max_sequence_length": 1, "num_inference_steps": 3, "guidance_scale": 1.0}
PROMPTS, SEEDS = ["a cat on a red background", "two dogs"], [1, 2]


def classic():
    return DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))


def near(one, other):
    assert (one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1)


@pytest.mark.long
def test_a_lora_trained_on_a_modular_folder_loads_into_both_kinds(tmp_path, capfd):
    base = tmp_path / "mini"
    modular_of(classic(), "StableDiffusion3").save_pretrained(str(base), overwrite_modular_index=True)
    options = {"num_prompts_per_epoch": 2, "group_size": 2, "num_epochs": 2}
    task = write_task(tmp_path)
    run = run_script("flow_grpo", tmp_path / "run", task, pretrained_model_name_or_path=base, **options)
    assert [row["ratio_error"] for row in rows(run)] == [0.0, 0.0] and all(row["grad_norm"] > 0 for row in rows(run))
    own = run_script("flow_grpo", tmp_path / "own", task, **options)
    for ours, stock in zip(rows(run), rows(own)):
        assert ours["reward"] == pytest.approx(stock["reward"], abs=1e-3)

    card = (run / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    assert "ModularPipeline.from_pretrained" in lines and "pipe.load_components()" in lines and "pipeline_tag: text-to-image" in card
    names = {}
    exec(lines.replace('"mini"', repr(str(base))).replace('"run"', repr(str(run))), names)  # the card's own snippet
    stock = classic()
    stock.load_lora_weights(run, weight_name=lora_finder.WEIGHTS)
    tuned, same, plain = (Policy(pipe, **CALL).rollout(PROMPTS, seeds=SEEDS).final for pipe in (names["pipe"], stock, classic()))
    near(tuned, same)
    assert (tuned - plain).abs().max() > 1e-3

    path = RECIPES.parent / "evaluate.py"
    spec = importlib.util.spec_from_file_location("evaluate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = f"--lora {run} --prompts {task / 'prompts.jsonl'} --reward {task / 'rewards.py'}:brightness --num_samples 6 --kl_samples 2"
    flags = [*words.split(), "--call_kwargs", '{"max_sequence_length": 1}', "--num_inference_steps", "3", "--guidance_scale", "1.0"]
    reports = []
    for name, model in (("of_modular", str(base)), ("of_classic", "mini-sd3")):
        module.main(["--pretrained_model_name_or_path", model, "--output_dir", str(tmp_path / name), *flags])
        reports.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
    numbers = [[float(x) for x in re.findall(r'"mean": (-?[\d.e-]+)', json.dumps(report))] for report in reports]
    assert numbers[0] and torch.allclose(torch.tensor(numbers[0]), torch.tensor(numbers[1]), atol=1e-2)
