"""`train_reward.py`: a head on CLIP from pairs, likes or scores, its report, and the reward that it leaves behind."""

import importlib.util
import json
import math

import huggingface_hub
import pytest
import torch
from script_tools import load_script, run_script, script, write_task

from diffusers_align.rewards import load_reward
from diffusers_align.rewards.learned import LearnedReward
from diffusers_align.training.offline import reward_fitting
from diffusers_align.training.report.pictures import to_pil

torch.set_num_threads(1)
PROMPTS = [f"{number} {animal}" for number in ("a", "two", "three") for animal in ("cat", "dog", "fox", "bird")]


def picture(share, seed):
    """Mostly blue for a share of 1, mostly red for 0, with noise."""
    noise = 0.3 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return (noise + 0.7 * torch.tensor([1 - share, 0.0, share]).view(3, 1, 1)).clamp(0, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Somebody likes blue: the same preference as pairs (with a tie), likes and scores."""
    folder = tmp_path_factory.mktemp("data")
    rows = {"pair": [], "binary": [], "scored": []}
    for i, prompt in enumerate(PROMPTS):
        shares = [0.1, 0.4, 0.6, 0.9]
        for j, share in enumerate(shares):
            to_pil(picture(share, 10 * i + j)).save(folder / f"{i}_{j}.png")
            rows["binary"].append({"prompt": prompt, "image": f"{i}_{j}.png", "label": share > 0.5})
            rows["scored"].append({"prompt": prompt, "image": f"{i}_{j}.png", "reward": 20 + 5 * share})
        couples = [(a, b) for a in range(4) for b in range(a)]
        # The better image comes first and second in turn.
        for n, (a, b) in enumerate(couples):
            first, second, label = (a, b, 1) if n % 2 else (b, a, 0)
            rows["pair"].append({"prompt": prompt, "image_0": f"{i}_{first}.png", "image_1": f"{i}_{second}.png", "label_0": label})
        rows["pair"].append({"prompt": prompt, "image_0": f"{i}_0.png", "image_1": f"{i}_0.png", "label_0": 0.5})
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def train(data, kind, out, *more):
    argv = ["--dataset_name", data / f"{kind}.jsonl", "--kind", kind, "--model", "mini-clip", "--output_dir", out, "--num_epochs", "40", *more]
    load_script("reward").main([str(word) for word in argv])
    return json.loads((out / "learned_reward.json").read_text())


@pytest.mark.parametrize("hidden", [0, 16])
def test_pairs_give_a_reward_that_generalises(data, tmp_path, hidden):
    config = train(data, "pair", tmp_path / "mine", "--hidden", hidden)
    held_out = config["metrics"]["held_out"]
    assert held_out["accuracy"] > 0.9 and held_out["loss"] < 0.7 * math.log(2) and 0 <= held_out["calibration_error"] < 0.3
    assert held_out["rows"] == 14 and config["metrics"]["train"]["rows"] == 70  # two of twelve prompts, seven pairs each
    reward = load_reward(str(tmp_path / "mine"))
    values = reward(torch.stack([picture(share, 999) for share in (0.0, 0.3, 0.7, 1.0)]), ["a bear"] * 4)
    assert isinstance(reward, LearnedReward) and (values.diff() > 0).all()


def test_likes_give_a_calibrated_probability(data, tmp_path):
    held_out = train(data, "binary", tmp_path / "mine", "--num_epochs", "80")["metrics"]["held_out"]
    assert held_out["accuracy"] > 0.9 and held_out["rows"] == 8
    reward = load_reward(str(tmp_path / "mine"))
    likes = torch.sigmoid(reward(torch.stack([picture(0.1, 5), picture(0.9, 5)]), ["a bear"] * 2))
    assert likes[0] < 0.4 and likes[1] > 0.6


def test_scores_are_fitted_on_their_own_scale(data, tmp_path):
    config = train(data, "scored", tmp_path / "mine", "--num_epochs", "150")
    assert config["metrics"]["held_out"]["r2"] > 0.7 and config["shift"] == pytest.approx(22.5, abs=0.1)
    values = load_reward(str(tmp_path / "mine"))(torch.stack([picture(0.1, 5), picture(0.9, 5)]), ["a cat"] * 2)
    assert values[0] == pytest.approx(20.5, abs=1.0) and values[1] == pytest.approx(24.5, abs=1.0)


def test_the_reward_is_differentiable_takes_videos_and_adds_up(data, tmp_path):
    train(data, "pair", tmp_path / "mine")
    reward = load_reward(str(tmp_path / "mine"))
    images = torch.stack([picture(0.2, 1), picture(0.8, 2)]).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["a cat", "a dog"]).sum(), images)
    assert gradient.isfinite().all() and (gradient[:, 2].mean() > gradient[:, 0].mean())  # more blue, less red
    single = reward(images.detach(), ["a cat"] * 2)
    torch.testing.assert_close(reward(images.detach()[None], ["a cat"]), single.mean()[None], rtol=1e-4, atol=1e-4)
    total = load_reward(f"{tmp_path / 'mine'}*2.0+jpeg_compressibility*0.5")(images.detach(), ["a cat"] * 2)
    torch.testing.assert_close(total["reward"], 2 * single + 0.5 * load_reward("jpeg_compressibility")(images.detach(), ["a cat"] * 2), rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_reward(data, tmp_path):
    for name in ("one", "two"):
        train(data, "pair", tmp_path / name, "--num_epochs", "3", "--hidden", "8")
    assert (tmp_path / "one" / "head.safetensors").read_bytes() == (tmp_path / "two" / "head.safetensors").read_bytes()


def test_what_was_measured_is_seen_where_it_cannot_be_written(data, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_align.rewards.learned.weight_files.save", full)
    with pytest.raises(OSError, match="could not be written: .*No space left.* are free.*give the same command again"):
        train(data, "pair", tmp_path, "--num_epochs", 1)
    assert "held_out: loss" in capsys.readouterr().out


def test_a_reward_that_is_there_is_set_aside(data, tmp_path, capsys):
    first = train(data, "pair", tmp_path, "--num_epochs", 1)
    second = train(data, "binary", tmp_path, "--num_epochs", 1)
    assert (first["kind"], second["kind"]) == ("pair", "binary")
    assert json.loads((tmp_path / ".previous-learned_reward.json").read_text()) == first and (tmp_path / ".previous-head.safetensors").is_file()
    assert "holds earlier results: learned_reward.json, head.safetensors renamed to .previous-*" in capsys.readouterr().out


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    error = reward_fitting.calibration_error
    probabilities = torch.tensor([0.85] * 10 + [0.15] * 10)
    labels = torch.tensor([1.0] * 7 + [0.0] * 3 + [1.0] * 2 + [0.0] * 8)
    assert error(probabilities, labels) == pytest.approx((abs(0.85 - 0.7) + abs(0.15 - 0.2)) / 2, abs=1e-6)
    assert error(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0
    assert error(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])) == 1


def test_losses_are_those_of_bradley_terry_and_of_logistic_regression():
    losses = reward_fitting.losses
    outputs, labels = torch.tensor([[1.0, -0.5], [0.2, 0.4]]), torch.tensor([1.0, 0.5])
    tie = -0.5 * math.log(1 / (1 + math.exp(0.2))) - 0.5 * math.log(1 / (1 + math.exp(-0.2)))
    torch.testing.assert_close(losses("pair", outputs, labels), torch.tensor([math.log(1 + math.exp(-1.5)), tie]))
    torch.testing.assert_close(
        losses("binary", outputs[:, :1], torch.tensor([1.0, 0.0])), torch.tensor([math.log(1 + math.exp(-1)), math.log(1 + math.exp(0.2))])
    )


def test_no_prompt_is_trained_on_and_held_out():
    split = reward_fitting.split
    rows = [{"prompt": str(i % 5)} for i in range(20)]
    train_on, held_out = split(rows, 0.4, seed=1)
    assert sorted([*train_on.tolist(), *held_out.tolist()]) == list(range(20)) and len(held_out) == 8
    assert not {i % 5 for i in train_on.tolist()} & {i % 5 for i in held_out.tolist()}
    with pytest.raises(ValueError, match="The data has 1 prompts"):
        split(rows[::5], 0.4, seed=1)


def test_errors_say_what_to_do(data, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="lacks learned_reward.json.*train_reward.py"):
        LearnedReward(tmp_path)
    train(data, "pair", tmp_path / "mine", "--num_epochs", "1")
    (tmp_path / "mine" / "head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks head.safetensors"):
        load_reward(str(tmp_path / "mine"))
    with pytest.raises(SystemExit):
        load_script("reward").parse_args(["--dataset_name", "d", "--output_dir", "o", "--held_out", "1.0"])
    assert "above 0 and below 1" in capsys.readouterr().err


def test_without_a_network_the_embedded_clip_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="No CLIP model 'openai/clip-vit-large-patch14': .* HF_HUB_OFFLINE is set.*--model .* mini-clip"):
        load_script("reward").main(["--dataset_name", str(data / "pair.jsonl"), "--output_dir", str(tmp_path / "mine")])


def test_rows_of_no_weight_are_left_out(data, tmp_path, capsys):
    pairs = [json.loads(line) for line in (data / "pair.jsonl").read_text().splitlines()]
    weighed = [{**row, "weight": float(i % 3 > 0)} for i, row in enumerate(pairs)]
    (data / "weighed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weighed))
    (data / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weighed if row["weight"]))
    of_both = [train(data, name, tmp_path / name, "--kind", "pair", "--train_batch_size", "1", "--num_epochs", "2") for name in ("weighed", "kept")]
    assert of_both[0]["metrics"] == of_both[1]["metrics"] and math.isfinite(of_both[0]["metrics"]["train"]["loss"])
    assert "28 of 84 rows have the weight 0 and are left out." in capsys.readouterr().out
    (data / "none.jsonl").write_text("".join(json.dumps({**row, "weight": 0}) + "\n" for row in pairs))
    with pytest.raises(ValueError, match="all 84 rows have the weight 0"):
        train(data, "none", tmp_path / "none", "--kind", "pair")


def test_a_loss_that_is_no_number_ends_the_fit(data, tmp_path):
    with pytest.raises(ValueError, match="loss of the fit has become .* Lower --learning_rate 10"):
        train(data, "scored", tmp_path / "mine", "--learning_rate", "10", "--adam_weight_decay", "100", "--hidden", "16", "--num_epochs", "200")
    assert not (tmp_path / "mine" / "learned_reward.json").exists()


@pytest.mark.parametrize("flags, message", [
    (["--kind", "scored", "--ties", "drop"], "--ties has no effect without --kind pair"), (["--single_file_config", "x"], "--single_file_config has no effect"),
])  # fmt: skip
def test_flags_without_effect_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        load_script("reward").parse_args(["--dataset_name", "d", "--output_dir", "o", *flags])
    assert message in capsys.readouterr().err


def test_from_preferences_of_the_model_to_a_policy_trained_on_the_learned_reward(tmp_path):
    """The whole way: sample, learn what is preferred, and align with that."""
    task = write_task(tmp_path)
    spec = importlib.util.spec_from_file_location("make_preferences", script("any").parent / "make_preferences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([
        "--pretrained_model_name_or_path", "mini-sd3", "--call_kwargs", '{"max_sequence_length": 1}', "--prompts", str(task / "prompts.jsonl"),
        "--reward", f"{task / 'rewards.py'}:redness", "--num_inference_steps", "2", "--guidance_scale", "1.0", "--pairs", "all",
        "--output_dir", str(tmp_path / "made"),
    ])  # fmt: skip
    argv = ["--dataset_name", tmp_path / "made" / "pairs", "--model", "mini-clip", "--output_dir", tmp_path / "mine", "--num_epochs", "2"]
    load_script("reward").main([str(word) for word in argv])
    out = run_script("d3po", tmp_path / "run", task, num_prompts_per_epoch=1, group_size=2, reward=tmp_path / "mine")
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["pairs"] == 1


@pytest.mark.parametrize("kind, same", [("pair", {"label_0": 0.5}), ("scored", {"reward": 3.0}), ("binary", {"label": True})])
def test_data_that_prefer_nothing_are_fitted_where_that_is_asked_for(data, tmp_path, kind, same):
    lines = (data / f"{kind}.jsonl").read_text().splitlines()
    (data / f"alike_{kind}.jsonl").write_text("".join(json.dumps({**json.loads(line), **same}) + "\n" for line in lines))
    argv = ["--dataset_name", data / f"alike_{kind}.jsonl", "--kind", kind, "--model", "mini-clip", "--output_dir", tmp_path / "mine", "--num_epochs", "2"]
    with pytest.raises(ValueError, match="there is nothing to learn. Give other data, or pass --allow_no_signal"):
        load_script("reward").main([str(word) for word in argv])
    load_script("reward").main([str(word) for word in [*argv, "--allow_no_signal"]])
    assert math.isfinite(json.loads((tmp_path / "mine" / "learned_reward.json").read_text())["metrics"]["train"]["loss"])
