"""Evaluation: the statistics by hand, the path KL against its sum, LoRAs that leave no trace, the script, and what a run costs."""

import importlib.util
import json
import sys
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from script_runs import started
from script_tools import run_script, write_task
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, embedded
from diffusers_align.files.paths import front_door
from diffusers_align.lora import WEIGHTS
from diffusers_align.rewards.base import InvalidReward, RewardTimeout
from diffusers_align.training.offline.held_out_pairs import HeldOutPairs, margins
from diffusers_align.training.report.comparison import table, without_nan
from diffusers_align.training.report.evaluation import Session, diversities, find_lora, load_rewards, lora_loaded, path_kl
from diffusers_align.training.report.statistics import mean_and_error, wilson_interval, win_rate
from diffusers_align.training.run.costs import Cost

NAN = float("nan")
TINY = {"num_prompts_per_epoch": 2, "group_size": 2}


# --- diversity ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder():
    from diffusers_align.rewards.clip_embedder import CLIPEmbedder

    return CLIPEmbedder(embedded.path("mini-clip"))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 3, 32, 32)])
def test_equal_images_have_no_diversity_and_others_have(embedder, shape):
    generator = torch.Generator().manual_seed(0)
    image, *others = (torch.rand(shape, generator=generator) for _ in range(3))
    found = diversities([image, *others, image], ["same", "other", "other", "same"], embedder, 3)
    assert set(found) == {"pixel_rms", "clip"}
    assert found["pixel_rms"][0] == 0 and found["clip"][0].abs() < 1e-10
    assert found["pixel_rms"][1] > 0.1 and found["clip"][1] > 1e-4
    assert set(diversities([image, image], ["a", "a"], None, 8)) == {"pixel_rms"}


# --- the path KL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_path_kl_is_the_sum_over_the_noisy_steps(name):
    policy = Policy(FAMILIES[name].build(), **FAMILIES[name].call)
    parameters = policy.add_lora(4)
    prompts, seeds = ["a cat", "two dogs"], [3, 4]
    kl, dimensions = path_kl(policy, prompts, seeds)
    assert torch.equal(kl, torch.zeros(2, dtype=torch.float64)), "a fresh LoRA changes nothing"

    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    kl, dimensions = path_kl(policy, prompts, seeds)
    trajectory = policy.rollout(prompts, seeds=seeds)
    expected = torch.zeros(2, dtype=torch.float64)
    for k in trajectory.stochastic.nonzero().flatten().tolist():
        with torch.no_grad():
            own = policy.transition(trajectory, k)
            with policy.reference():
                reference = policy.transition(trajectory, k)
        expected += ((own.mean - reference.mean).double() ** 2 / (2 * own.std.double() ** 2)).flatten(1).sum(1)
    assert trajectory.stochastic.sum() > 1 and dimensions == trajectory.final[0].numel()
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=0)
    assert (kl > 0).all() and kl[0] != kl[1]


def test_path_kl_needs_noise():
    policy = Policy(FAMILIES["sd3"].build(), **FAMILIES["sd3"].call)
    policy.scheduler.register_to_config(noise_level=0.0)
    with pytest.raises(ValueError, match="No step has noise.*--noise_level"):
        path_kl(policy, ["a cat"], [0])


# --- LoRAs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Folders of two different LoRAs of mini-sd3 and one of mini-sd, by name; `a` has costs."""
    folder = tmp_path_factory.mktemp("loras")
    for name, model, seed in (("a", "mini-sd3", 1), ("b", "mini-sd3", 2), ("other", "mini-sd", 3)):
        policy = Policy(DiffusionPipeline.from_pretrained(embedded.path(model)))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.add_lora(4):
                parameter.add_(0.05 * torch.randn(parameter.shape))
        policy.save_lora(folder / name)
    Cost(images=2304, denoiser_evaluations=12345, denoiser_evaluations_with_gradients=678, seconds=4000.0).write(folder / "a")
    return folder


@pytest.fixture(scope="module")
def pipeline():
    return DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))


def draw(pipeline):
    policy = Policy(pipeline, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=1)
    return policy.rollout(["a cat", "two dogs"], seeds=[1, 2], deterministic=True).final


def test_loras_do_not_stack_and_leave_no_trace(pipeline, loras):
    before, drawn = draw(pipeline), []
    for name in ("a", "b", "a"):
        with lora_loaded(pipeline, loras / name, name):
            drawn.append(draw(pipeline))
    with lora_loaded(pipeline, loras / "b" / WEIGHTS, "file"):
        assert torch.equal(draw(pipeline), drawn[1])
    assert torch.equal(draw(pipeline), before)
    assert torch.equal(drawn[0], drawn[2])
    assert (drawn[0] - before).abs().max() > 1e-2 and (drawn[0] - drawn[1]).abs().max() > 1e-2


def test_a_lora_can_be_scaled(pipeline, loras):
    """As `set_adapters` does it; 0 is the base, and the scale is gone with the LoRA."""
    before = draw(pipeline)
    with lora_loaded(pipeline, loras / "a", "a"):
        whole = draw(pipeline)
    for path in (loras / "a", loras / "a" / WEIGHTS):
        with lora_loaded(pipeline, path, "a", 0.0):
            assert torch.equal(draw(pipeline), before)
        with lora_loaded(pipeline, path, "a", 0.5):
            half = draw(pipeline)
            pipeline.set_adapters(pipeline.get_active_adapters(), 0.5)
            assert torch.equal(draw(pipeline), half)
    with lora_loaded(pipeline, loras / "a", "a"):
        assert torch.equal(draw(pipeline), whole) and not torch.equal(whole, half)


@pytest.mark.parametrize("path", ["other", f"other/{WEIGHTS}"])
def test_a_lora_of_another_model_is_an_error_and_leaves_no_trace(pipeline, loras, path):
    before = draw(pipeline)
    with (
        pytest.raises(ValueError, match="LoRA 'other' .* is not of this StableDiffusion3Pipeline.*Name the model"),
        lora_loaded(pipeline, loras / path, "other"),
    ):
        pass
    assert torch.equal(draw(pipeline), before)


def test_a_lora_that_fits_in_part_is_an_error(pipeline, loras, tmp_path):
    """As one of a deeper model with blocks of the same shape."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    weights = load_file(loras / "a" / WEIGHTS)
    with safe_open(loras / "a" / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    deeper = {key.replace("transformer_blocks.0.", "transformer_blocks.90."): value.clone() for key, value in weights.items()}
    save_file({**weights, **deeper}, tmp_path / WEIGHTS, metadata)
    with pytest.raises(ValueError, match="is not of this"), lora_loaded(pipeline, tmp_path, "deep"):
        pass


def test_a_missing_lora_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers_align.files.lora_finder.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(FileNotFoundError, match="No LoRA 'runs/a': there is no such folder or file, and from the Hub: offline"):
        find_lora("runs/a")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="No LoRA in runs/a: it holds no pytorch_lora_weights.safetensors"):
        find_lora("runs/a")


# --- the script --------------------------------------------------------------------------------------------------------


def script():
    spec = importlib.util.spec_from_file_location("evaluate", front_door("training_scripts", "evaluate"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(loras, out, **flags):
    """The command line: a tuple is several values, True a bare flag, None leaves one out."""
    values = {
        "pretrained_model_name_or_path": "mini-sd3",
        "call_kwargs": '{"max_sequence_length": 1}',
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "lora": (loras / "a", loras / "b"),
        "prompts": loras / "prompts.jsonl",
        "reward": ("background_color", "scene_score"),
        "output_dir": out,
        "kl_samples": 3,
        "batch_size": 4,
        **flags,
    }
    argv = []
    for key, value in values.items():
        given = [] if value is True else value if isinstance(value, tuple) else [value]
        argv += [] if value is None else [f"--{key}", *map(str, given)]
    return argv


@pytest.fixture(scope="module")
def task(loras):
    rows = [{"prompt": "a cat", "background": "blue"}, {"prompt": "two dogs", "background": "red"}, {"prompt": "a castle", "background": "green"}]
    (loras / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = []
    for i, prompt in enumerate(["a fox", "two cats", "a tree", "a red car", "a bird"]):
        for side, color in enumerate([(20, 20 + 40 * i, 220), (200, 60, 20 + 40 * i)]):
            Image.new("RGB", (32, 32), color).save(loras / f"{i}_{side}.png")
        pairs.append({"prompt": prompt, "image_0": f"{i}_0.png", "image_1": f"{i}_1.png", "label_0": 1})
    (loras / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, {**pairs[0], "label_0": 0.5}]))
    (loras / "turned.jsonl").write_text("".join(json.dumps({**pair, "label_0": 0}) + "\n" for pair in pairs))
    return loras


@pytest.fixture(scope="module")
def evaluated(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    flags = {
        "lora_names": ("blue", "other"),
        "diversity_model": "mini-clip",
        "num_grid_images": 4,
        "eval_dataset_name": task / "pairs.jsonl",
        "pair_timesteps": 2,
    }
    script().main(arguments(task, out, **flags))
    return out, json.loads((out / "evaluation.json").read_text())


def test_the_json_holds_every_image_and_the_statistics_follow_from_it(evaluated):
    _, content = evaluated
    assert content["prompts"] == ["a cat", "two dogs", "a castle"] * 2 and len(set(content["seeds"])) == 6
    assert list(content["models"]) == ["base", "blue", "other"]
    base = content["models"]["base"]["rewards"]
    for name in ("blue", "other"):
        for key, reward in content["models"][name]["rewards"].items():
            mine, theirs = (torch.tensor([NAN if v is None else v for v in values]) for values in (reward["values"], base[key]["values"]))
            assert len(mine) == 6 and reward["left_out"] == int(mine.isnan().sum())
            expected = without_nan(dict(zip(("mean", "se"), mean_and_error(mine - theirs))))
            assert reward["gain"] == pytest.approx(expected, abs=1e-7)
            assert reward["win_rate"]["rate"] == without_nan(win_rate(mine, theirs).rate)
    assert "gain" not in base["background_color"]
    # the embedded classifier knows no castle
    assert content["models"]["blue"]["rewards"]["scene_score"]["win_rate"]["left_out"] == 2
    assert {"scene_score/object", "scene_score/correct"} <= base.keys()


def test_models_differ_from_the_base_by_reward_diversity_and_kl(evaluated):
    models = evaluated[1]["models"]
    assert models["base"]["kl"] == {"nats": {"mean": 0.0, "se": 0.0}, "nats_per_dimension": {"mean": 0.0, "se": 0.0}}
    assert len({models[name]["rewards"]["background_color"]["mean"] for name in models}) == 3
    for name in ("blue", "other"):
        nats, each = models[name]["kl"]["nats"], models[name]["kl"]["nats_per_dimension"]
        assert nats["mean"] > 0 and nats["se"] > 0 and nats["mean"] == pytest.approx(1024 * each["mean"])
    for model in models.values():
        assert all(model["diversity"][kind]["mean"] > 0 for kind in ("pixel_rms", "clip"))
    assert models["blue"]["costs"]["images"] == 2304 and "costs" not in models["base"] and "costs" not in models["other"]


def test_the_table_says_what_the_json_says(evaluated):
    out, content = evaluated
    text = (out / "evaluation.md").read_text()
    assert table(restored(content["models"]), ["background_color", "scene_score"]) in text
    lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    rows = {cells[1].strip(" *"): [cell.strip() for cell in cells[2:-1]] for cells in lines}
    models = content["models"]
    assert rows[""] == ["base", "blue", "other"] and all(len(row) == 3 for row in rows.values())
    estimate = models["blue"]["rewards"]["background_color"]
    assert rows["background_color"][1] == f"{estimate['mean']:.4g} ± {estimate['se']:.2g}"
    wins = models["other"]["rewards"]["scene_score"]["win_rate"]
    assert rows["scene_score: win rate"][0] == "" and rows["scene_score: win rate"][2].startswith(f"{wins['rate']:.1%} [{wins['low']:.1%}, {wins['high']:.1%}]")
    assert rows["scene_score: win rate"][2].endswith(f", {wins['ties']} ties, 2 pairs left out")
    assert "scene_score/object: gain" in rows and "scene_score/color" not in rows, "no prompt asks for a colour"
    assert rows["training: images generated"] == ["", "2,304", ""] and rows["training: wall time"] == ["", "1 h 06 min", ""]
    assert rows["KL to the base, nats per trajectory"][0] == "0 ± 0"
    assert "noise_level 0.7" in text and content["kl_noise"]["sde_type"] == "flow_grpo"


def restored(value):
    """JSON's null back as NaN, among numbers."""
    if isinstance(value, dict):
        return {key: NAN if item is None else restored(item) for key, item in value.items()}
    return value


def test_the_picture_has_a_row_a_model(evaluated):
    with Image.open(evaluated[0] / "evaluation.png") as picture:
        captions, cells = json.loads(picture.info["captions"]), [picture.crop(box).tobytes() for box in json.loads(picture.info["cells"])]
    assert captions == evaluated[1]["prompts"][:4] and len(cells) == 3 * 4 == len(set(cells)), "an image per model and prompt, none of them blank or twice"


def held_out(task, name):
    """The pairs, and mini-sd3 with LoRA `a`, without a script."""
    args = Namespace(pretrained_model_name_or_path="mini-sd3", revision=None, variant=None, batch_size=2, seed=42)
    pairs = HeldOutPairs(Session(args, Accelerator()), str(task / f"{name}.jsonl"), 2)
    policy = Policy(DiffusionPipeline.from_pretrained(embedded.path("mini-sd3")), num_inference_steps=3, guidance_scale=1.0, max_sequence_length=1)
    policy.load_lora(task / "a")
    return pairs, policy


def test_implicit_accuracy_is_measured_against_the_adapters_off(evaluated, task):
    content = evaluated[1]["models"]
    assert "held_out_pairs" not in content["base"]
    found = content["blue"]["held_out_pairs"]
    pairs, policy = held_out(task, "pairs")
    own = pairs.errors(policy)
    with policy.reference():
        reference = pairs.errors(policy)
        assert margins(pairs.errors(policy), reference).eq(0).all(), "the same noise again"
    assert len(own) == 5 and found["values"] == pytest.approx(margins(own, reference).tolist(), rel=1e-3, abs=1e-6)
    assert found["values"] == pytest.approx([(r[0] - o[0] - (r[1] - o[1])).item() for o, r in zip(own, reference)], rel=1e-3, abs=1e-6)
    accuracy, values = found["accuracy"], found["values"]
    assert accuracy["wins"] == sum(value > 0 for value in values) and accuracy["rate"] == accuracy["wins"] / 5
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(wilson_interval(accuracy["wins"], 5)) and len(set(values)) == 5
    turned, policy = held_out(task, "turned")
    with policy.reference():
        reference = turned.errors(policy)
    torch.testing.assert_close(margins(turned.errors(policy), reference), -torch.tensor(values, dtype=torch.float64), rtol=1e-3, atol=1e-6)
    assert "implicit accuracy on held-out pairs" in (evaluated[0] / "evaluation.md").read_text()


def test_pairs_in_other_columns_are_mapped_as_in_training(task, tmp_path):
    """Their images lie elsewhere, too."""
    rows = [json.loads(line) for line in (task / "pairs.jsonl").read_text().splitlines()]
    names = {"prompt": "words", "image_0": "left", "image_1": "right", "label_0": "label_0"}
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({names[key]: value for key, value in row.items()}) + "\n" for row in rows))
    own = {"eval_dataset_name": tmp_path / "other.jsonl", "column_map": "prompt=words,image_0=left,image_1=right", "image_root": task}
    args, session = script().parse_args(arguments(task, tmp_path / "eval", **own)), Namespace(accelerator=Accelerator(), print=print)
    session.args = Namespace(**vars(args), train_batch_size=2)
    pairs, plain = script().load_pairs(args, session), HeldOutPairs(session, str(task / "pairs.jsonl"), 2)
    assert [row["image_0"].content_hash() for row in pairs.rows] == [row["image_0"].content_hash() for row in plain.rows]
    with pytest.raises(SystemExit):
        script().parse_args(arguments(task, tmp_path / "eval", column_map="prompt=words"))


def test_scales_are_models_of_their_own(evaluated, task, tmp_path):
    flags = {"lora": (task / "a",), "lora_names": ("blue",), "lora_scale": (0.0, 0.5, 1.0), "kl_samples": 1}
    script().main([*arguments(task, tmp_path / "eval", **flags), "--no-diversity"])
    models, before = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["models"], evaluated[1]["models"]
    assert list(models) == ["base", "blue @ 0", "blue @ 0.5", "blue @ 1"]
    assert models["blue @ 0"]["rewards"]["background_color"]["values"] == models["base"]["rewards"]["background_color"]["values"]
    assert models["blue @ 1"]["rewards"]["background_color"]["values"] == before["blue"]["rewards"]["background_color"]["values"]
    nats = [models[f"blue @ {scale}"]["kl"]["nats"]["mean"] for scale in ("0", "0.5", "1")]
    assert nats[0] == 0 < nats[1] < nats[2]


def test_evaluation_is_repeatable_and_depends_on_no_other_lora(evaluated, task, tmp_path):
    script().main([*arguments(task, tmp_path / "eval", lora=(task / "b",), kl_samples=0, batch_size=6), "--no-diversity"])
    again, before = (json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path / "eval", evaluated[0]))
    for name, earlier in (("base", "base"), ("b", "other")):
        mine, theirs = (content["models"][key]["rewards"]["background_color"] for content, key in ((again, name), (before, earlier)))
        assert mine["values"] == pytest.approx(theirs["values"], abs=1e-5)
    assert again["seeds"] == before["seeds"] and again["models"]["b"]["kl"] == {} and again["models"]["b"]["diversity"] == {}


def test_every_process_makes_as_many_calls_on_held_out_pairs(task, monkeypatch):
    """Five pairs, one at a time, on two processes: three each, with one pair twice, and the same errors as on one."""
    pairs, policy = held_out(task, "pairs")
    expected, calls, found, predict, rollouts, rollout = pairs.errors(policy), [], [], Policy.predict, [], Policy.rollout
    monkeypatch.setattr(Policy, "predict", lambda *args, **more: calls.append(1) or predict(*args, **more))
    monkeypatch.setattr(Policy, "rollout", lambda *args, **more: rollouts.append(1) or rollout(*args, **more))
    monkeypatch.setattr("diffusers_align.training.offline.held_out_pairs.gather_object", lambda own: found.extend(own) or found)
    pairs.run.args.train_batch_size = 1
    for rank in range(2):
        pairs.run.accelerator = Namespace(process_index=rank, num_processes=2, autocast=Accelerator().autocast)
        errors = pairs.errors(policy)
        assert len(calls) == 12 * (rank + 1), "three pairs of two images at two timesteps"
    torch.testing.assert_close(errors, expected, rtol=1e-4, atol=1e-6)
    assert not rollouts, "the size of the latents is found once"


@pytest.mark.long
def test_two_processes_find_what_one_does(evaluated, task, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = arguments(task, tmp_path / "eval", lora_names=("blue", "other"), diversity_model="mini-clip")
    with started([*launch, str(front_door("training_scripts", "evaluate")), *argv], tmp_path / "log") as process:
        assert process.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    two, one = json.loads((tmp_path / "eval" / "evaluation.json").read_text()), evaluated[1]
    assert two["seeds"] == one["seeds"]
    for name, model in one["models"].items():
        assert two["models"][name]["rewards"]["background_color"]["values"] == pytest.approx(model["rewards"]["background_color"]["values"], abs=1e-4)
        assert two["models"][name]["kl"]["nats"]["mean"] == pytest.approx(model["kl"]["nats"]["mean"], rel=1e-3)
        assert two["models"][name]["diversity"]["clip"]["mean"] == pytest.approx(model["diversity"]["clip"]["mean"], abs=1e-3)


@pytest.mark.parametrize(
    "flags, error, message",
    [
        ({"reward": "scene_scoer"}, ValueError, "(?s)no reward 'scene_scoer'.*scene_score"),
        ({"reward": ("scene_score", "scene_score")}, ValueError, "Rewards need different names"),
        (
            {"num_samples": 4},
            ValueError,
            "at least two samples of each prompt, but --num_samples 4 gives 'two dogs' only one. Raise it to 6, or pass --no-diversity",
        ),
        ({"prompts": "mini_trian"}, ValueError, "No prompt file 'mini_trian'"),
    ],
)
def test_errors_come_before_the_pipeline_is_loaded(task, tmp_path, monkeypatch, flags, error, message):
    module = script()
    monkeypatch.setattr(module, "load_pipeline", lambda args: pytest.fail("loaded"))
    with pytest.raises(error, match=message):
        module.main(arguments(task, tmp_path / "eval", **flags))


def test_a_lora_of_another_model_is_found_before_the_others_are_sampled(task, tmp_path, monkeypatch):
    module = script()
    monkeypatch.setattr(module, "evaluate", lambda *args: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="LoRA 'other' .* is not of this StableDiffusion3Pipeline"):
        module.main(arguments(task, tmp_path / "eval", lora=(task / "a", task / "other")))


def test_the_numbers_are_seen_where_they_cannot_be_written(task, tmp_path, monkeypatch, capsys):
    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    module = script()
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="eval could not be written: .*No space left.* are free.*The table above has the numbers"):
        module.main(arguments(task, tmp_path / "eval", lora=(task / "a",), kl_samples=0, num_inference_steps=1, reward="background_color"))
    assert "| **background_color** | -0" in capsys.readouterr().out


def test_columns_that_the_call_would_take_are_said(task, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "negative_prompt": "red"}\n')
    flags = {"prompts": tmp_path / "p.jsonl", "lora": (task / "a",), "kl_samples": 0, "num_inference_steps": 1, "reward": "background_color"}
    script().main(arguments(task, tmp_path / "eval", invalid_rewards="mask", **flags))
    assert capsys.readouterr().out.count("--input_columns negative_prompt hands it to the pipeline as well") == 1


def test_a_reward_without_a_single_score_stays_in_the_table_and_ends_in_an_error(task, tmp_path):
    (tmp_path / "rewards.py").write_text("def none(images, prompts, **columns):\n    return [float('nan')] * len(prompts)\n")
    flags = {"reward": ("background_color", f"{tmp_path / 'rewards.py'}:none"), "lora": (task / "a",), "kl_samples": 0, "num_inference_steps": 1}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "evaluation.md").write_text("earlier")
    with pytest.raises(InvalidReward, match="Reward 'none' scored none of 6 evaluation images.*--invalid_rewards mask"):
        script().main(arguments(task, tmp_path / "eval", **flags))
    text = (tmp_path / "eval" / "evaluation.md").read_text()
    assert (tmp_path / "eval" / ".previous-evaluation.md").read_text() == "earlier"
    row = next(line for line in text.splitlines() if line.startswith("| **none**"))
    assert row.count("no score (6 of 6 images without)") == 2 and "| **background_color** | -0" in text


def test_a_run_is_told_before_training_that_a_reward_has_no_score(tmp_path):
    task = write_task(tmp_path)
    with (task / "rewards.py").open("a") as file:
        file.write("\n\ndef none(images, prompts, **columns):\n    return [float('nan')] * len(prompts)\n")
    with pytest.raises(InvalidReward, match="rewards.py:none' scored none of 4"):
        run_script("flow_grpo", tmp_path / "run", task, eval_reward=f"{task / 'rewards.py'}:none")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("eval_prompts, expected", [(False, "the training prompts"), (True, "held-out prompts")])
def test_the_run_and_its_card_say_what_it_was_judged_on(tmp_path, capsys, eval_prompts, expected):
    task = write_task(tmp_path)
    (task / "others.txt").write_text("a whale\n")
    out = run_script("flow_grpo", tmp_path / "run", task, **TINY, **({"eval_prompts": task / "others.txt"} if eval_prompts else {}))
    said = capsys.readouterr().out
    assert f"Evaluation: 4 images of {expected}, by the pipeline's own FlowMatchEulerDiscreteScheduler." in said
    assert f":brightness on {expected}: " in said and ("held-out" in said) == eval_prompts
    card = (out / "README.md").read_text()
    assert f"Results on {expected}, by the pipeline's own FlowMatchEulerDiscreteScheduler, at equal seeds" in card and ("held-out" in card) == eval_prompts


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lora": None}, "--lora is required"),
        ({"lora_names": "one"}, "--lora_names has 1 names for 2 LoRAs"),
        ({"lora_names": ("same", "same")}, "each LoRA needs a name of its own"),
        ({"lora_names": ("base", "b")}, "other than 'base'"),
        ({"reward_model": "mini-clip"}, "--reward_model has 1 entries for 2 rewards; write 'default'"),
        ({"kl_samples": -1}, "--kl_samples must be a whole number from 0 to 1e9, got -1"),
        ({"pair_timesteps": 0}, "--pair_timesteps must be a whole number from 1 to 1000, got 0"),
        ({"num_samples": 0}, "--num_samples must be a whole number from 1 to 1e9, got 0"),
    ],
)
def test_bad_flags_are_named(task, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        script().parse_args(arguments(task, tmp_path, **flags))
    assert message in capsys.readouterr().err


def test_noise_of_the_other_kind_of_model_is_an_error(task, tmp_path):
    with pytest.raises(ValueError, match="FlowMatchSDEScheduler has no eta"):
        script().main(arguments(task, tmp_path / "eval", eta=1.0))


def test_a_recipe_sets_lists_and_flags_override_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pretrained_model_name_or_path: mini-sd3\nlora: [runs/a, runs/b]\nreward: scene_score\nprompts: mini_heldout\nnoise_level: 5e-1\n")
    args = script().parse_args(["--config", str(recipe), "--output_dir", "eval", "--prompts", "counting"])
    assert (args.lora, args.lora_names, args.reward, args.prompts, args.noise_level) == (["runs/a", "runs/b"], ["a", "b"], ["scene_score"], "counting", 0.5)


def test_each_reward_gets_its_own_checkpoint(tmp_path):
    (tmp_path / "rewards.py").write_text(
        "class First:\n    def __init__(self, model='own'):\n        self.model = model\n    def __call__(self, images, prompts, **columns): ...\n"
        "class Second(First): ...\n"
    )
    first, second = f"{tmp_path / 'rewards.py'}:First", f"{tmp_path / 'rewards.py'}:Second"
    found = load_rewards([first, second], ["default", "mini-clip"], torch.device("cpu"))
    assert {name: reward.model for name, reward in found.items()} == {"First": "own", "Second": embedded.path("mini-clip")}


# --- costs -------------------------------------------------------------------------------------------------------------


def test_costs_of_a_run_by_hand_and_over_a_resume(tmp_path):
    task = write_task(tmp_path)
    out = run_script("flow_grpo", tmp_path / "run", task, validation_epochs=1, **TINY)
    cost = Cost.read(out)
    # 4 samples of 3 steps without guidance; replay and reference of the first two; two steps of a batch of two again, to see that a roll-out
    # can be made again; evaluation and validation do not count
    assert (cost.images, cost.denoiser_evaluations, cost.denoiser_evaluations_with_gradients) == (4, 4 * 3 + 2 * 4 * 2 + 2 * 2, 4 * 2)
    assert 0 < cost.seconds < 600 and Cost.read(out / "checkpoint-1") == cost
    assert "images" not in (out / "metrics.jsonl").read_text()

    run_script("flow_grpo", out, task, num_epochs=2, resume_from_checkpoint="latest", **TINY)
    total = Cost.read(out)
    assert (total.images, total.denoiser_evaluations, total.denoiser_evaluations_with_gradients) == (8, 64, 16)
    assert total.seconds > cost.seconds and Cost.read(out / "checkpoint-1") == cost


def test_a_hanging_reward_is_given_up(task, tmp_path):
    (tmp_path / "slow.py").write_text("import time\n\n\ndef hangs(images, prompts, **columns):\n    time.sleep(5)\n    return images.flatten(1).mean(1)\n")
    flags = {"lora": task / "a", "reward": f"{tmp_path / 'slow.py'}:hangs", "reward_timeout": 0.2, "kl_samples": 0}
    with pytest.raises(RewardTimeout, match="--reward_timeout"):
        script().main(arguments(task, tmp_path / "eval", **flags))
