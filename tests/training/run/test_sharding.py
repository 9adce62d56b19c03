"""Several processes train what one does, with the denoiser whole on each or spread over them; how accelerate's settings are read."""

import json
import random
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from distributed_worker import SHARDED
from script_runs import LORA, ROOT, assert_same_lora, draw, rows, started, train
from script_runs import task as task  # noqa: F401 - a fixture
from tiny_pipelines import FAMILIES
from torch import nn

from diffusers_align import embedded
from diffusers_align.driving.denoisers import denoisers
from diffusers_align.training.run import sharding
from diffusers_align.training.run.run import Run

CONFIGS = sorted((ROOT / "training_scripts" / "accelerate_configs").glob("*.yaml"))

# --- two processes -----------------------------------------------------------------------------------------------------

# Gradients that are nearly zero are rounding; Adam would make whole steps of them.
TWO = {"num_epochs": 2, "train_batch_size": 2, "seed": 43, "num_eval_samples": 3, "num_validation_images": 3, "adam_epsilon": 1e-3}
FLOW = {**TWO, "use_ema": True, "ema_interval": 1, "kl_form": "gaussian"}
DDPO = {**TWO, "per_prompt_stat_min_count": 2, "per_prompt_stat_buffer_size": 4, "random_timestep_fraction": 0.7}
SPREAD = {"shard_denoiser": True}
JOBS = {
    "flow_grpo": {"script": "flow_grpo", "flags": FLOW},
    "ddpo": {"script": "ddpo", "flags": DDPO},
    "flow_grpo_sharded": {"script": "flow_grpo", "flags": {**FLOW, **SPREAD, "gradient_checkpointing": True}},
    "flow_grpo_stopped": {"script": "flow_grpo", "flags": {**FLOW, **SPREAD, "num_epochs": 1}, "out": "flow_grpo_resumed"},
    "flow_grpo_resumed": {"script": "flow_grpo", "flags": {**FLOW, **SPREAD, "resume_from_checkpoint": "latest"}},
    # As accelerate launch --config_file fsdp2.yaml sets it.
    "ddpo_sharded": {"script": "ddpo", "flags": DDPO, "environment": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}},
}


@pytest.fixture(scope="module")
def two(task, tmp_path_factory):  # noqa: F811
    """All jobs on two processes (gloo), in one launch: the folder with their outputs."""
    out = tmp_path_factory.mktemp("two")
    jobs = {name: {"out": name, **job} for name, job in JOBS.items()}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with started([*launch, distributed_worker.__file__, json.dumps(jobs), str(task), str(out)], out / "log") as process:
        try:
            process.wait(400)
        except subprocess.TimeoutExpired:
            process.terminate()  # so that it ends its workers, which are in sessions of their own
            process.wait(30)
    assert process.returncode == 0, (out / "log").read_text()[-5000:]
    return out


@pytest.fixture(scope="module")
def seen(two):
    """What each of the two processes saw."""
    found = [json.loads((two / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [rank["processes"] for rank in found] == [2, 2] and not (two / "rank-2.json").exists()
    return found


@pytest.fixture(scope="module")
def one(task, tmp_path_factory):  # noqa: F811
    """The same flags on one process."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = train(name, tmp_path_factory.mktemp("one") / name, task, **JOBS[name]["flags"])
        return folders[name]

    return get


def results(folder):
    """The lines of the model card's table."""
    return [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| reward") or "reward, " in line]


def assert_same_training(actual, expected):
    assert_same_lora(actual, expected, rtol=0, atol=1e-5)
    assert len(rows(actual)) == len(rows(expected)) == 2
    for mine, theirs in zip(rows(actual), rows(expected)):
        assert mine["ratio_error"] == 0.0 and mine["reward"] == pytest.approx(theirs["reward"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["flow_grpo", "ddpo"])
def test_two_processes_train_what_one_does(two, seen, one, name):
    """The same two samples make each of an epoch's two optimizer steps, one on each process."""
    assert all(rank[name]["share"] == 1.0 and not rank[name]["classes"][0].startswith(("FSDP", "Distributed")) for rank in seen)
    assert_same_training(two / name, one(name))
    assert results(two / name) == results(one(name)) != [], "three evaluation samples on two processes"


def test_groups_straddle_the_processes():
    for epoch in range(TWO["num_epochs"]):
        order = [group for group in range(2) for _ in range(2)]
        random.Random(f"{TWO['seed']}/{epoch}/order").shuffle(order)
        assert set(order[::2]) == set(order[1::2]) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow_grpo", "ddpo"])
def test_a_sharded_denoiser_trains_what_a_whole_one_does(two, seen, name):
    for rank in seen:
        placed = rank[f"{name}_sharded"]
        assert 0.4 < placed["share"] < 0.6, "each process holds half"
        assert placed["classes"][0] == "FSDP" + placed["classes"][2], "the pipeline sees the class that it knows"
        assert placed["trained"] == ["Parameter"], "the LoRA is whole"
    assert_same_training(two / f"{name}_sharded", two / name)
    assert results(two / f"{name}_sharded") == results(two / name)


@pytest.mark.slow
def test_a_sharded_run_resumes(two, one, task, tmp_path):  # noqa: F811
    """Bit for bit with the same processes; on one process, from a sharded run's checkpoint, to rounding."""
    assert_same_lora(two / "flow_grpo_resumed", two / "flow_grpo_sharded")
    assert (two / "flow_grpo_resumed" / "metrics.jsonl").read_text() == (two / "flow_grpo_sharded" / "metrics.jsonl").read_text()
    checkpoint = two / "flow_grpo_sharded" / "checkpoint-1"
    flags = {**FLOW, "resume_from_checkpoint": checkpoint}
    assert_same_training(train("flow_grpo", tmp_path / "run", task, **flags), one("flow_grpo"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow_grpo", "ddpo"])
def test_the_lora_of_a_sharded_run_loads_into_a_stock_pipeline(two, name):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(embedded.path({"flow_grpo": "mini-sd3", "ddpo": "mini-sd"}[name]))
    before = draw(pipe, name)
    pipe.load_lora_weights(two / f"{name}_sharded", weight_name=LORA)
    assert (draw(pipe, name) - before).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_families(seen, name):
    for rank in seen:
        found = rank["families"][name]
        assert found["final"] <= 1e-5 and found["predicted"] <= 1e-5 and found["gradient"] <= 1e-5 and found["share"] < 0.8
    assert found["own_times"] == (name != "sd15_img2img"), "both ways of predict are tried"


# --- what is gathered at a time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_found_in_every_family(name):
    for module in denoisers(FAMILIES[name].build()).values():
        blocks = sharding.blocks(module)
        assert blocks and not any(isinstance(block, (nn.Linear, nn.ModuleList)) for block in blocks)
        inside = {id(layer) for block in blocks for layer in block.modules()}
        attention = [layer for name, layer in module.named_modules() if name.endswith((".to_q", ".to_k", ".to_v"))]
        assert len(attention) >= 3 and all(id(layer) in inside for layer in attention)


def test_inner_blocks_come_before_outer_ones():
    module = nn.Module()
    feed_forward = nn.ModuleList([nn.Linear(2, 2)])
    inner, outer = nn.Module(), nn.Module()
    inner.net, inner.norm = feed_forward, nn.LayerNorm(2)
    outer.attentions, outer.resnets = nn.ModuleList([inner]), nn.ModuleList([nn.Linear(2, 2)])
    module.down, module.also, module.tables = nn.ModuleList([outer]), nn.ModuleList([outer]), nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)])])
    assert sharding.blocks(module) == [inner, outer]


def test_one_process_cannot_share():
    with pytest.raises(ValueError, match="there is one. Launch several, or leave the flag out"):
        sharding.shard([nn.Linear(2, 2)], torch.device("cpu"))


# --- accelerate's settings ---------------------------------------------------------------------------------------------


def environment(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` hands to the processes."""
    parser = launch_command_parser()
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(config), "script.py"]))
    args.deepspeed_fields_from_accelerate_config = ""
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_parse_and_say_that_they_were_not_run(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 8 and "# Not run" in path.read_text()
    assert str(config.distributed_type).rpartition(".")[2] == {"fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}.get(path.stem, "MULTI_GPU")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_the_scripts_do_under_each_config(path):
    found = environment(path)
    if path.stem == "deepspeed_zero2":
        with pytest.raises(ValueError, match="configured for DEEPSPEED.*multi_gpu.yaml.*--shard_denoiser"):
            sharding.wanted(False, found)
    else:
        assert sharding.wanted(False, found) == (path.stem == "fsdp2")
        assert found.get("ACCELERATE_USE_FSDP", "false") == "false", "accelerate leaves the model alone"


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "configured for MEGATRON_LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP with fsdp_offload_params"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--gradient_accumulation_steps"),
    ],
)
def test_settings_that_would_change_the_gradient_are_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        sharding.wanted(True, dict(variables))


def test_a_script_refuses_deepspeed_before_it_loads_anything(task, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(Run, "load_policy", None)
    with pytest.raises(ValueError, match="configured for DEEPSPEED"):
        train("ddpo", tmp_path / "run", task)


def test_without_settings_only_the_flag_shards():
    assert [sharding.wanted(flag, {}) for flag in (False, True)] == [False, True]
