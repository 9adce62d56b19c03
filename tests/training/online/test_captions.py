"""Other captions of a group's images: from files and functions, and the log-probabilities under them."""

import json
import sys

import pytest
import torch
from captioner import CAPTIONER
from diffusers import DiffusionPipeline
from script_tools import make_run

from diffusers_align import Policy, embedded
from diffusers_align.algorithms.mv_grpo import mv_grpo_loss
from diffusers_align.data.prompts import Prompt
from diffusers_align.training.online.captions import decoded, load_views, view_rewards, view_trajectories, write_views
from diffusers_align.training.online.policy_gradient import add_gradient
from diffusers_align.training.online.sampling import Samples, sample_epoch


def written(folder, name, data):
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


def test_views_files_are_read_by_the_same_rules(tmp_path):
    from diffusers_align.data import Prompt

    file = written(tmp_path, "v.jsonl", '{"prompt": "a\u2028b", "captions": ["c", "d"]}\n')
    assert load_views(str(file), [Prompt("a\u2028b")], 2)("a\u2028b", None) == ["c", "d"]
    with pytest.raises(ValueError, match=r"v\.jsonl, line 1: no object with the fields"):
        load_views(str(written(tmp_path, "v.jsonl", '{"prompt": "a"}\n')), [Prompt("a")], 2)


PROMPTS = [Prompt("a cat", {"weight": 1.0}), Prompt("two dogs", {"weight": 2.0})]


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
    by_sample = {i: image for index, batch in zip(samples.index, images) for i, image in zip(index.tolist(), batch.images)}
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
