"""Rankings, a LoRA on the vision tower, and step-aware rewards: their losses by hand, what they learn, and their way into SPO."""

import json
import math
from argparse import Namespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMapEulerDiscreteScheduler
from script_tools import load_script, run_script, write_task

from diffusers_align.forward_process import ForwardProcess
from diffusers_align.rewards import load_reward
from diffusers_align.rewards.learned import Head, LearnedReward, RewardModel
from diffusers_align.rl.pair_losses import pair_loss, plackett_luce_loss
from diffusers_align.schedulers import DDIMSDEScheduler, FlowMatchSDEScheduler, sde_twin
from diffusers_align.training.offline.reward_fitting import Example, Logits, Picture, comparisons, fit, judge
from diffusers_align.training.online.step_candidates import noise_levels
from diffusers_align.training.report.pictures import to_pil

torch.set_num_threads(1)
PROMPTS = ["a cat", "two dogs", "a fox", "a bird", "three cats", "a dog", "two foxes", "a bear"]
NAN = float("nan")


def picture(share, seed):
    """Mostly blue for a share of 1, mostly red for 0, with noise."""
    noise = 0.3 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return (noise + 0.7 * torch.tensor([1 - share, 0.0, share]).view(3, 1, 1)).clamp(0, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Somebody likes blue: rankings of three or four images, some of them ties, and pairs."""
    folder = write_task(tmp_path_factory.mktemp("data"))
    rankings, pairs = [], []
    for i, prompt in enumerate(PROMPTS):
        shares = [0.1, 0.9, 0.5, 0.5][: 3 + i % 2]
        for j, share in enumerate(shares):
            to_pil(picture(share, 10 * i + j)).save(folder / f"{i}_{j}.png")
        rankings.append({"prompt": prompt, "images": [f"{i}_{j}.png" for j in range(len(shares))], "ranks": [3, 1, 2, 2][: len(shares)]})
        pairs.append({"prompt": prompt, "image_0": f"{i}_0.png", "image_1": f"{i}_1.png", "label_0": 0})
    for name, lines in (("ranked", rankings), ("pair", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def train(data, kind, out, **flags):
    argv = {"dataset_name": data / f"{kind}.jsonl", "kind": kind, "model": "mini-clip", "output_dir": out, "num_epochs": 30, "held_out": 0.4, **flags}
    load_script("reward").main([f"--{name}" if value is True else f"--{name}={value}" for name, value in argv.items()])
    return json.loads((out / "learned_reward.json").read_text())


# --- rankings ----------------------------------------------------------------------------------------------------------


def test_plackett_luce_by_hand():
    scores = torch.tensor([[0.5, 2.0, -1.0]], dtype=torch.float64)
    e = scores[0].exp().tolist()
    # ranks 2, 1, 3: the second of all, then the first of the other two, then the last
    expected = -math.log(e[1] / sum(e)) - math.log(e[0] / (e[0] + e[2]))
    assert plackett_luce_loss(scores, torch.tensor([[2.0, 1.0, 3.0]])).item() == pytest.approx(expected, rel=1e-12)
    # a tie on top: each is chosen from all three
    expected = -math.log(e[1] / sum(e)) - math.log(e[0] / sum(e))
    assert plackett_luce_loss(scores, torch.tensor([[1.0, 1.0, 2.0]])).item() == pytest.approx(expected, rel=1e-12)
    assert plackett_luce_loss(torch.zeros(1, 5), torch.arange(5.0)[None]).item() == pytest.approx(math.log(120))


def test_of_two_it_is_bradley_terrys_and_absent_ones_count_nowhere():
    scores = torch.tensor([[0.3, -0.4, NAN], [1.0, 2.0, NAN]], dtype=torch.float64, requires_grad=True)
    loss = plackett_luce_loss(scores, torch.tensor([[1.0, 2.0, NAN], [2.0, 1.0, NAN]]))
    torch.testing.assert_close(loss, pair_loss(torch.stack([scores[0, 0] - scores[0, 1], scores[1, 1] - scores[1, 0]])))
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert gradient.isfinite().all() and gradient[:, 2].eq(0).all()
    with pytest.raises(ValueError, match="need one shape"):
        plackett_luce_loss(scores, torch.ones(2, 2))


def test_equal_ranks_pull_scores_together():
    scores = torch.tensor([[1.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(plackett_luce_loss(scores, torch.ones(1, 2)).sum(), scores)
    assert gradient[0, 0] > 0 > gradient[0, 1]
    found, labels, rows = comparisons("ranked", torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, NAN]]), torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, NAN]]))
    assert found.tolist() == [2, 1, -1, -1] and labels.tolist() == [1, 1, 0.5, 1] and rows.tolist() == [0, 0, 0, 1]


def test_rankings_give_a_reward(data, tmp_path):
    held_out = train(data, "ranked", tmp_path / "mine")["metrics"]["held_out"]
    assert held_out["accuracy"] > 0.8 and held_out["rows"] == 3 and 0 <= held_out["calibration_error"] <= 1
    values = load_reward(str(tmp_path / "mine"))(torch.stack([picture(share, 999) for share in (0.0, 0.5, 1.0)]), ["a bear"] * 3)
    assert (values.diff() > 0).all()


# --- LoRA --------------------------------------------------------------------------------------------------------------


def test_a_lora_learns_is_saved_and_comes_back(data, tmp_path):
    config = train(data, "pair", tmp_path / "mine", rank=2, num_epochs=4, learning_rate=5e-3)
    assert config["rank"] == 2 and config["metrics"]["held_out"]["accuracy"] > 0.9
    reward = LearnedReward(tmp_path / "mine")
    lora = reward.model.lora()
    assert lora and all("vision_model" in name for name in lora)
    assert all(value.abs().sum() > 0 for name, value in lora.items() if "lora_B" in name), "B starts at 0: gradients came to all of them"
    images = torch.stack([picture(0.2, 1), picture(0.8, 2)])
    with_lora = reward(images, ["a cat"] * 2)
    for name, value in reward.model.clip.model.named_parameters():
        if "lora_B" in name:
            value.zero_()
    assert not torch.equal(reward(images, ["a cat"] * 2), with_lora)
    (tmp_path / "mine" / "lora.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks lora.safetensors"):
        LearnedReward(tmp_path / "mine")


@pytest.mark.parametrize("rank, step_aware", [(0, True), (3, True), (3, False)])
def test_saved_and_loaded_are_bit_equal(tmp_path, rank, step_aware):
    torch.manual_seed(0)
    model = RewardModel("mini-clip", 8, rank, step_aware).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "head" in name:
            parameter.data.normal_(std=0.3)
    model.save(tmp_path / "mine", 2.0, 1.0)
    images, levels = torch.stack([picture(0.2, 1), picture(0.8, 2)]), [0.3, 0.9]
    expected = model(model.clip.images(images), model.clip.texts(["a cat", "a dog"]), torch.tensor(levels)) * 2.0 + 1.0
    reward = load_reward(str(tmp_path / "mine"))
    assert torch.equal(reward(images, ["a cat", "a dog"], noise_level=levels), expected)
    turned = reward(images, ["a cat", "a dog"], noise_level=levels[::-1])
    assert torch.equal(turned, expected) != step_aware
    finished = reward(images, ["a cat", "a dog"])
    assert torch.equal(finished, reward(images, ["a cat", "a dog"], noise_level=[0.0, 0.0]))
    video = reward(images[None], ["a cat"], noise_level=[0.3])
    torch.testing.assert_close(video, reward(images, ["a cat"] * 2, noise_level=[0.3, 0.3]).mean()[None], rtol=1e-4, atol=1e-4)


# --- noise levels ------------------------------------------------------------------------------------------------------


def test_a_head_starts_without_the_level():
    torch.manual_seed(0)
    head, features = Head(4, step_aware=True), torch.randn(3, 12)
    assert torch.equal(head(features, torch.tensor([0.0, 0.5, 1.0])), head(features))
    head(features, torch.tensor([0.1, 0.5, 1.0])).sum().backward()
    assert head.level[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("step_aware", [True, False])
def test_a_preference_that_turns_with_the_level_needs_a_step_aware_reward(step_aware):
    """Blue is preferred in finished images, red under much noise: no reward of the image alone can tell."""
    torch.manual_seed(0)
    images = [Picture(i, lambda i=i: picture(i, 7 + i)) for i in range(2)]
    examples = [Example("a cat", images, torch.tensor([float(level > 0.5)]), noise_level=level) for level in (0.0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0)]
    logits = Logits(RewardModel("mini-clip", step_aware=step_aware), 8)
    logits.embed(examples)
    own = {"learning_rate": 1e-2, "adam_weight_decay": 0.0, "num_epochs": 150, "train_batch_size": 8, "allow_no_signal": False}
    fit(Namespace(kind="pair", seed=0, **own), logits, examples)
    found = judge("pair", logits, examples)
    assert list(found["by_noise_level"]) == ["0", "0 to 0.25", "0.25 to 0.5", "0.5 to 0.75", "0.75 to 1"]
    if step_aware:
        assert found["accuracy"] == 1.0 and all(worth["accuracy"] == 1.0 for worth in found["by_noise_level"].values())
        for example in examples:
            example.noise_level = 1 - example.noise_level
        assert judge("pair", logits, examples)["accuracy"] < 0.5
    else:
        assert found["accuracy"] == 0.5


def test_levels_of_spos_candidates_are_those_of_the_forward_process():
    flow, diffusion = FlowMatchSDEScheduler(shift=3.0), DDIMSDEScheduler()
    flow.set_timesteps(5)
    diffusion.set_timesteps(5)
    for scheduler, sigmas in ((flow, flow.sigmas[:-1]), (diffusion, torch.full((5,), NAN))):
        found = noise_levels(scheduler, Namespace(timesteps=scheduler.timesteps.float(), sigmas=sigmas))
        assert found[-1] == 0 and found == sorted(found, reverse=True)
        assert found[:-1] == pytest.approx(ForwardProcess(scheduler).sigma(scheduler.timesteps[1:]).tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["euler karras", "dpm exponential", "edm", "flow map"])
def test_levels_off_the_table_are_weights_too(name):
    """Of noise beyond 1 as well: the share of it in a state of unit variance. Candidates and examples of training alike."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    stock = {
        "euler karras": lambda: EulerDiscreteScheduler.from_config(config, use_karras_sigmas=True),
        "dpm exponential": lambda: DPMSolverMultistepScheduler.from_config(config, use_exponential_sigmas=True),
        "edm": lambda: EDMEulerScheduler(sigma_max=80.0),
        "flow map": lambda: FlowMapEulerDiscreteScheduler(shift=3.0),
    }[name]()
    scheduler = sde_twin(stock)
    scheduler.set_timesteps(5)
    stock.set_timesteps(5)
    flow, sigmas = name == "flow map", stock.sigmas[:5].double()
    found = noise_levels(scheduler, Namespace(timesteps=scheduler.timesteps[:5].float(), sigmas=getattr(scheduler, "levels", scheduler.sigmas)[:5]))
    expected = (sigmas if flow else sigmas / (1 + sigmas**2).sqrt())[1:]
    assert found == pytest.approx([*expected.tolist(), 0.0], abs=1e-5) and 1 > max(found) and found == sorted(found, reverse=True)
    assert scheduler.noise_weight(scheduler.timesteps[1:5]).tolist() == pytest.approx(expected.tolist(), abs=1e-2)  # some of these times are rounded


LEVELS = """
from pathlib import Path


def reward(images, prompts, noise_level=None, **columns):
    with open(Path(__file__).with_name("levels.txt"), "a") as file:
        file.write(repr(noise_level) + "\\n")
    return images.flatten(1).mean(1)
"""


def test_from_pairs_to_spo(data, tmp_path):
    """Clean samples are predicted from noise, a step-aware reward learns from them, and SPO trains on it."""
    model = {"pretrained_model_name_or_path": "mini-sd3", "call_kwargs": '{"max_sequence_length": 1}', "num_noise_levels": 4}
    config = train(data, "pair", tmp_path / "mine", step_aware=True, **model)
    held_out = config["metrics"]["held_out"]
    assert config["step_aware"] and held_out["rows"] == 15 and held_out["accuracy"] > 0.6
    assert held_out["by_noise_level"]["0"]["accuracy"] > 0.9 and len(held_out["by_noise_level"]) == 5
    flags = {"num_samples_per_epoch": 4, "num_candidates": 2, "divert_start_step": 0, "threshold": 0.0, "num_epochs": 2, "num_inference_steps": 2}
    out = run_script("spo", tmp_path / "run", data, reward=tmp_path / "mine", **flags)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_spo_tells_a_reward_the_level(data, tmp_path):
    (data / "levels.py").write_text(LEVELS)
    flags = {"num_samples_per_epoch": 2, "num_candidates": 2, "divert_start_step": 0, "num_inference_steps": 3, "allow_no_signal": True}
    run_script("spo", tmp_path / "run", data, reward=f"{data / 'levels.py'}:reward", **flags)
    seen = [json.loads(line) for line in (data / "levels.txt").read_text().splitlines() if line != "None"]
    assert all(level == row[0] for row in seen for level in row) and len({row[0] for row in seen}) == 3
    assert min(row[0] for row in seen) == 0 and max(row[0] for row in seen) < 1
    assert "None" in (data / "levels.txt").read_text(), "finished images have none"


def test_flags_of_step_aware_rewards_go_together(capsys):
    for more, message in ((["--step_aware"], "go together"), (["--rank", "-1"], "--rank must be a whole number from 0 to 4096, got -1")):
        with pytest.raises(SystemExit):
            load_script("reward").parse_args(["--dataset_name", "d", "--output_dir", "o", *more])
        assert message in capsys.readouterr().err
