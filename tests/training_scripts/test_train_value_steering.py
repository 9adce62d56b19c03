"""`train_value_steering.py` on the embedded mini-sd, as small as it gets."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from script_tools import load_script, rows, write_task

from diffusers_align import embedded
from diffusers_align.pipelines import ValueSteeringPipeline
from diffusers_align.pipelines.value_steering import SteeredPolicy, load_value
from diffusers_align.rewards import InvalidReward
from diffusers_align.training.checkpoints.state_files import read_state

SMALL = {
    "pretrained_model_name_or_path": "mini-sd", "call_kwargs": "{}", "num_samples_per_epoch": 4, "num_own_epochs": 1, "num_noises": 3, "num_updates": 6,
    "update_batch_size": 8, "value_width": 16, "q_lambda": 0.9, "num_epochs": 2, "validation_epochs": 2,
}  # fmt: skip
WEIGHTS = "value/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


def words(name, value):
    """A flag with its values as one would type it."""
    return (f"--{name}", *(() if value is True else map(str, value) if isinstance(value, tuple) else (str(value),)))


def run(out, task, **flags):
    """Without the LoRA's rank, which this script has not."""
    script = load_script("value_steering")
    prompts, reward = task / "prompts.jsonl", f"{task / 'rewards.py'}:brightness"
    own = {"prompts": prompts, "reward": reward, "output_dir": out, "num_inference_steps": 3, "guidance_scale": 1.0, "train_batch_size": 2}
    own |= {"learning_rate": 3e-3, "num_eval_samples": 4, "num_validation_images": 3, "checkpointing_epochs": 1, **SMALL, **flags}
    script.main([word for name, value in own.items() for word in words(name, value)])
    return out


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), task)


def test_it_leaves_a_value_that_steers_a_pipeline_with_numbers_pictures_and_a_card(whole):
    history = rows(whole)
    assert [row["epoch"] for row in history] == [0, 1]
    assert all({"reward", "value_loss", "explained_variance", "advantage_of_best", "grad_norm"} <= set(row) for row in history)
    assert history[0]["advantage_of_best"] > 0 and history[1]["advantage_of_best"] == 0, "the first epoch's samples are the plain sampler's"
    assert {"README.md", "before_after.png", "costs.json", "value"} <= {path.name for path in whole.iterdir()}
    assert (whole / "samples" / "epoch-0002.png").is_file()
    card = (whole / "README.md").read_text()
    assert "ValueSteeringPipeline" in card and "sde_twin" not in card, "the pipeline's own twin is what it takes without"
    assert json.loads((whole / "costs.json").read_text())["images"] == 8

    pipe = DiffusionPipeline.from_pretrained(embedded.path("mini-sd"))
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "pt"}
    found = ValueSteeringPipeline(pipe)("a cat", value=whole, num_noises=8, generator=torch.Generator().manual_seed(0), **options)
    assert found.step_values.shape == (1, 3)
    assert load_value(whole).config.prompt_size > 0


def test_a_resumed_run_is_the_uninterrupted_one(whole, task, tmp_path):
    out = run(tmp_path / "again", task, num_epochs=1)
    run(out, task, resume_from_checkpoint="latest")
    expected, found = load_file(whole / WEIGHTS), load_file(out / WEIGHTS)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [row["reward"] for row in rows(out)] == [row["reward"] for row in rows(whole)]
    replay = [read_state(folder / "checkpoint-2", "replay") for folder in (whole, out)]
    assert all(torch.equal(x, y) for x, y in zip(replay[0]["columns"], replay[1]["columns"]))


def test_the_lines_of_the_card_draw_as_the_samples_of_the_card_were_drawn(task, tmp_path, monkeypatch):
    flags = {"eta": 0.5, "sde_window": (0, 2), "height": 32, "width": 32, "num_epochs": 1}
    out = run(tmp_path / "run", task, **flags)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    seen = {}

    def drawn(self, condition, **options):
        config = self.scheduler.config
        seen.update(eta=config.eta, window=tuple(config.sde_window), number=self.steering.number, kwargs={**self.call_kwargs, **condition.kwargs})
        return rolled_out(self, condition, **options)

    rolled_out = SteeredPolicy.rollout
    monkeypatch.setattr(SteeredPolicy, "rollout", drawn)
    monkeypatch.chdir(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd"))
    pipeline.set_progress_bar_config(disable=True)
    exec(code, {"pipeline": pipeline, "prompt": "a cat"})
    call = {"num_inference_steps": 3, "guidance_scale": 1, "height": 32, "width": 32}
    assert (seen["eta"], seen["window"], seen["number"]) == (0.5, (0, 2), 3) and call.items() <= seen["kwargs"].items()


def test_a_reward_that_scores_nothing_is_found_before_training(task, tmp_path):
    (tmp_path / "blind.py").write_text("def blind(images, prompts, **columns):\n    return images.flatten(1).mean(1) * float('nan')\n")
    with pytest.raises(InvalidReward, match="scored none of 4 evaluation images"):
        run(tmp_path / "run", task, eval_reward=f"{tmp_path / 'blind.py'}:blind")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_resumed_run_may_have_batches_of_another_size(task, tmp_path, capsys):
    run(tmp_path, task, num_epochs=1)
    run(tmp_path, task, resume_from_checkpoint="latest", train_batch_size=4)
    assert "Changed without effect on what is learned: --train_batch_size was 2, now 4." in capsys.readouterr().out


def test_prompts_without_a_reward_leave_no_transitions(task, tmp_path):
    out = run(tmp_path, task, reward=f"{task / 'rewards.py'}:no_dogs", invalid_rewards="mask", num_epochs=1)
    assert rows(out)[0]["invalid_rewards"] > 0 and torch.isfinite(torch.tensor(rows(out)[0]["value_loss"]))
