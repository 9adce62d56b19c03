"""MV-GRPO: the loss over views, captions from files and functions, the views on a real pipeline, and the script."""

import json
import math
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from script_tools import RECIPES, assert_same_lora, assert_same_run, load_script, make_run, rows, run_script, run_script_on_two_processes, write_task

from diffusers_align import Policy, embedded
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss
from diffusers_align.algorithms.mv_grpo import mv_grpo_loss
from diffusers_align.data.prompts import Prompt, load_prompts
from diffusers_align.embedded.scenes import adjacent_captions, parse
from diffusers_align.training.online.captions import decoded, load_views, view_rewards, view_trajectories, write_views
from diffusers_align.training.online.policy_gradient import add_gradient
from diffusers_align.training.online.sampling import Samples, sample_epoch

torch.set_num_threads(1)
PROMPTS = [Prompt("a cat", {"weight": 1.0}), Prompt("two dogs", {"weight": 2.0})]
CAPTIONER = """
def by_brightness(prompt, images):
    assert images.shape[1:] == (3, 32, 32) and 0 <= images.min() and images.max() <= 1
    return [f"{prompt} {len(images)} {images.mean():.3f}", f"{prompt} at the top"]


def rewritten(prompt, images):
    assert images is None
    return [f"{prompt} on the left", f"{prompt} on the right", f"{prompt} at the top"]


def silent_on_dogs(prompt, images):
    return [] if "dog" in prompt else ["a", "b", "c"]
"""


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    log_ratio, advantage = 64 * double(2e-4, 2e-4, -5e-5), double(1.5, -1.5, 2.0)
    loss = mv_grpo_loss(log_ratio, torch.zeros(3, dtype=torch.float64), advantage, num_views=3, per_dim=64)
    torch.testing.assert_close(loss, double(-0.50005, 0.5 * math.exp(2e-4), -2 / 3 * math.exp(-5e-5)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("views", [1, 2, 4])
def test_equal_views_have_exactly_flow_grpos_gradient(views):
    generator = torch.Generator().manual_seed(0)
    log_prob, old, advantage = (torch.randn(32, generator=generator, dtype=torch.float64) for _ in range(3))
    arguments = {"per_dim": 8, "clip_range": 0.1}
    expected = torch.autograd.grad(flow_grpo_loss(log_prob.requires_grad_(), old, advantage, **arguments).sum(), log_prob)[0]
    total = sum(mv_grpo_loss(log_prob, old, advantage, num_views=views, **arguments) for _ in range(views))
    assert torch.equal(torch.autograd.grad(total.sum(), log_prob)[0], expected) and expected.abs().max() > 0


# --- captions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_views_from_a_file(tmp_path, suffix):
    captions = {"a cat": ["a kitten", "one cat"], "two dogs": ["dogs", "a pair of dogs"]}
    lines = [json.dumps({"prompt": prompt, "captions": views}) for prompt, views in captions.items()]
    path = tmp_path / f"views{suffix}"
    path.write_text(json.dumps(captions) if suffix == ".json" else "\n".join(lines) + "\n")
    writer = load_views(str(path), PROMPTS, 2)
    assert writer("a cat", None) == ["a kitten", "one cat"] and writer("two dogs", None) == ["dogs", "a pair of dogs"]
    with pytest.raises(ValueError, match="at least 3 captions for the prompt 'a cat', got .*one cat.*--num_views"):
        load_views(str(path), PROMPTS, 3)
    with pytest.raises(ValueError, match="at least 2 captions for the prompt 'an owl', got"):
        load_views(str(path), [*PROMPTS, Prompt("an owl")], 2)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("missing.json", "No views file 'missing.json'"),
        ("missing.py:captions", "Cannot load the views 'missing.py:captions': .*missing.py"),
        ("diffusers_align.embedded.scenes:missing", "has no attribute 'missing'"),
        ("no_such_module:captions", "No module named 'no_such_module'"),
        ("captions", "'module:function' or 'path/to/file.py:function'"),
    ],
)
def test_views_that_are_not_there(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_views(spec, PROMPTS, 2)


def test_a_function_of_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewriter.py").write_text(CAPTIONER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    assert load_views("my_rewriter:rewritten", PROMPTS, 2)("a cat", None)[0] == "a cat on the left"


def test_adjacent_captions_keep_the_object_and_the_colour():
    assert adjacent_captions("a cat") == ["a cat on the left", "a cat on the right", "a cat at the top", "a cat at the bottom"]
    assert adjacent_captions("two cacti on a red background") == ["a cactus on a red background", "three cacti on a red background"]
    assert adjacent_captions("a quiet morning") == []
    for prompt in load_prompts("likes_blue_train"):
        captions = adjacent_captions(prompt.text)
        assert len(captions) >= 2 and prompt.text not in captions
        assert {parse(caption)["object"] for caption in captions} == {parse(prompt.text)["object"]}


# --- on a pipeline -----------------------------------------------------------------------------------------------------


def brightness(images, prompts, weight=None, **columns):
    """The dataset's weight reaches every view; captions at the top count double."""
    return images.flatten(1).mean(1) * torch.tensor(weight) * torch.tensor([2.0 if "top" in prompt else 1.0 for prompt in prompts])


@pytest.fixture(scope="module")
def policy():
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    policy = Policy(pipeline, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=1)
    policy.add_lora(4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture
def run(tmp_path):
    (tmp_path / "captioner.py").write_text(CAPTIONER)
    return make_run(tmp_path, num_views=2, posterior_views=False, views="captions")


@pytest.fixture(scope="module")
def samples(policy, tmp_path_factory):
    return sample_epoch(make_run(tmp_path_factory.mktemp("run")), policy, brightness, PROMPTS, 0, 2, 2)


def test_views_are_a_groups_own_drawn_anew_each_epoch(policy, run, samples):
    writer = load_views(f"{run.output_dir / 'captioner.py'}:rewritten", PROMPTS, 2)
    images = decoded(run, policy, samples)
    drawn = [write_views(run, writer, samples, images, epoch) for epoch in range(6)]
    for captions in drawn:
        assert captions[0] == samples.prompts and [len(view) for view in captions] == [4, 4, 4]
        of_sample = list(zip(samples.groups.tolist(), *captions))
        assert len(set(of_sample)) == 2, "the samples of a group share their captions"
        assert all(first != second and first.startswith(prompt) and second.startswith(prompt) for _, prompt, first, second in of_sample)
    assert len({tuple(captions[1]) for captions in drawn}) > 1
    assert write_views(run, writer, samples, images, 3) == drawn[3]


def test_a_posterior_captioner_sees_the_images_of_its_group(policy, run, samples):
    run.args.posterior_views, run.args.num_views = True, 2
    images = decoded(run, policy, samples)
    captions = write_views(run, load_views(f"{run.output_dir / 'captioner.py'}:by_brightness", PROMPTS, 2), samples, images, 0)
    by_sample = {i: image for index, batch in zip(samples.index, images) for i, image in zip(index.tolist(), batch)}
    for i, prompt in enumerate(samples.prompts):
        mean = torch.stack([by_sample[j] for j in range(4) if samples.groups[j] == samples.groups[i]]).mean()
        assert {captions[1][i], captions[2][i]} == {f"{prompt} 2 {mean:.3f}", f"{prompt} at the top"}


def test_a_function_without_captions_is_named_with_the_prompt(policy, run, samples):
    run.args.views = "captioner.py:silent_on_dogs"
    writer = load_views(f"{run.output_dir / 'captioner.py'}:silent_on_dogs", PROMPTS, 2)
    with pytest.raises(ValueError, match=r"captioner.py:silent_on_dogs has to give a list of at least 2 captions for the prompt 'two dogs', got \[\]"):
        write_views(run, writer, samples, decoded(run, policy, samples), 0)


def test_rewards_of_the_same_images_under_each_view(policy, run, samples):
    captions = [samples.prompts, [f"{prompt} at the top" for prompt in samples.prompts], samples.prompts]
    rewards = view_rewards(run, brightness, samples, decoded(run, policy, samples), captions)
    torch.testing.assert_close(rewards, samples.rewards[:, None] * torch.tensor([1.0, 2.0, 1.0]), rtol=1e-6, atol=0)


def gradient_over_views(policy, run, samples: Samples, captions, advantages):
    """What the script does before its optimizer step."""
    views = view_trajectories(run, policy, samples, captions, [0, 1])
    for parameter in policy.trainable_parameters():
        parameter.grad = None
    ratios = []
    for index, of_batch in zip(samples.index, views):
        for view, trajectory in enumerate(of_batch):

            def loss(k, transition, _, trajectory=trajectory, advantage=advantages[index, view]):
                old, new = trajectory.log_probs[:, k], transition.log_prob(trajectory.actions[:, k])
                ratios.append((new - old).detach().abs().max().item())
                return mv_grpo_loss(new, old, advantage, num_views=len(captions), per_dim=1024).sum()

            add_gradient(run, policy, trajectory, [0, 1], loss)
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters()]), ratios


def test_views_equal_to_the_prompt_train_as_flow_grpo_does_and_another_does_not(policy, run, samples):
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.5, 0.5], [-0.5, -0.5]])
    single, _ = gradient_over_views(policy, run, samples, [samples.prompts], advantages)
    twice, ratios = gradient_over_views(policy, run, samples, [samples.prompts] * 2, advantages)
    assert single.abs().max() > 0 and max(ratios) == 0
    torch.testing.assert_close(twice, single, rtol=1e-4, atol=1e-5 * single.abs().max().item())
    other, ratios = gradient_over_views(policy, run, samples, [samples.prompts, ["three stars"] * 4], advantages)
    assert max(ratios) == 0, "the old log-probability is that of the view"
    assert (other - single).norm() > 0.05 * single.norm()


def test_the_prompts_own_old_log_probs_are_the_rollouts_and_a_views_are_not(policy, run, samples):
    own, other = view_trajectories(run, policy, samples, [samples.prompts, ["three stars"] * 4], [0, 1])[0]
    assert own is samples.batches[0] and other.condition.prompts == ["three stars"] * 2 and torch.equal(other.actions, own.actions)
    assert not other.log_probs.requires_grad and (other.log_probs - own.log_probs)[:, :2].abs().min() > 1e-2


# --- the script --------------------------------------------------------------------------------------------------------

FLAGS = {"num_prompts_per_epoch": 2, "group_size": 2, "num_views": 1, "kl_weight": 0.1, "sde_window": (0, 2), "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    task = write_task(tmp_path_factory.mktemp("task"))
    (task / "captioner.py").write_text(CAPTIONER)
    views = f"{task / 'captioner.py'}:by_brightness"
    return task, run_script("mv_grpo", tmp_path_factory.mktemp("mv") / "run", task, num_epochs=2, views=views, posterior_views=True, **FLAGS)


def test_the_script_trains_with_a_posterior_captioner(finished):
    metrics = rows(finished[1])
    assert [row["epoch"] for row in metrics] == [0, 1]
    for row in metrics:
        assert row["ratio_error"] == 0.0 and row["grad_norm"] > 0 and row["reward/view"] > 0
    assert metrics[0]["kl"] == 0 < metrics[1]["kl"], "under each view, the first update starts at the reference"


def test_resumed_equals_uninterrupted(finished, tmp_path):
    task, expected = finished
    flags = {**FLAGS, "views": f"{task / 'captioner.py'}:by_brightness", "posterior_views": True}
    run_script("mv_grpo", tmp_path / "run", task, num_epochs=1, **flags)
    run_script("mv_grpo", tmp_path / "run", task, num_epochs=2, resume_from_checkpoint="latest", **flags)
    assert_same_run(tmp_path / "run", expected, "checkpoint-2")


def test_each_view_is_trained_on_its_own_advantage(finished, tmp_path, monkeypatch):
    def only_view(samples, args, reward, rewards):
        return torch.zeros_like(rewards).index_fill(1, torch.tensor(1), 1.0)

    monkeypatch.setattr("diffusers_align.training.online.group_advantages.advantages_of", only_view)
    views = f"{finished[0] / 'captioner.py'}:rewritten"
    assert rows(run_script("mv_grpo", tmp_path / "run", finished[0], views=views, **{**FLAGS, "kl_weight": 0}))[0]["grad_norm"] > 0


@pytest.mark.parametrize("recipe", ["mv_grpo_flux", "mv_grpo_mini_sd3"])
def test_recipes_parse(recipe):
    args = load_script("mv_grpo").parse_args(["--config", str(RECIPES / f"{recipe}.yaml")])
    assert args.prompts and args.views and args.global_std is False


def test_a_prompt_without_views_is_named_before_anything_is_loaded(finished, tmp_path):
    (tmp_path / "views.json").write_text(json.dumps({"a cat on a red background": ["a red cat"], "a green apple": ["an apple"]}))
    with pytest.raises(ValueError, match="views.json has to give a list of at least 1 captions for the prompt 'two dogs on a blue background'"):
        run_script("mv_grpo", tmp_path / "run", finished[0], views=tmp_path / "views.json", **FLAGS)


@pytest.mark.parametrize("flags, message", [({}, "--views is required"), ({"views": "x.json", "num_views": 0}, "--num_views must be a whole number from 1")])
def test_flags_that_make_no_sense(finished, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_script("mv_grpo", tmp_path / "run", finished[0], **{**FLAGS, **flags})
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_train_what_one_does(tmp_path):
    """A captioner sees its whole group, whichever processes have its images."""
    task = write_task(tmp_path)
    (task / "captioner.py").write_text(CAPTIONER)
    flags = {
        **FLAGS,
        "num_epochs": 2,
        "train_batch_size": 1,
        "seed": 43,
        "views": f"{task / 'captioner.py'}:by_brightness",
        "posterior_views": True,
    }  # with this seed, both groups straddle the processes
    two = run_script_on_two_processes("mv_grpo", tmp_path / "two", task, **flags)
    one = run_script("mv_grpo", tmp_path / "one", task, **flags, reward=f"{task / 'rewards.py'}:recorded")
    assert_same_lora(two, one, rtol=0, atol=1e-5)
    for mine, theirs in zip(rows(two), rows(one)):
        assert mine["ratio_error"] == 0.0 and all(mine[key] == pytest.approx(theirs[key], abs=1e-5) for key in ("reward", "reward/view", "reward_std"))
