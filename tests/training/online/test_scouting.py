"""A scout pool: the extremes are chosen, sampled as they would be without a pool, counted, resumed and divided as any samples."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from script_tools import assert_same_lora, make_run, rows, run_script, run_script_on_two_processes, write_task

from diffusers_align import Policy, embedded
from diffusers_align.data.prompts import Prompt
from diffusers_align.training.online.sampling import sample_epoch
from diffusers_align.training.online.scouting import Asked, extremes, scout_metrics

PROMPTS = [Prompt("a cat"), Prompt("two dogs on a blue background")]
NAN = float("nan")


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


def test_the_extremes_of_each_group_are_chosen():
    groups = [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    rewards = torch.tensor([3.0, 0.0, 1.0, 1.0, 2.0, 2.0, 5.0, 3.0, 4.0, 4.0])
    assert extremes(rewards, groups, 2) == [1, 2, 6, 9]
    assert extremes(rewards, groups, 4) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert extremes(rewards, groups, 3) == [1, 2, 6, 7, 8, 9]  # one of the best more


def test_equal_ones_and_those_without_a_reward():
    assert extremes(torch.zeros(5), [0] * 5, 2) == [0, 4]
    assert extremes(torch.tensor([NAN, 1.0, NAN, 2.0, 3.0]), [0] * 5, 2) == [1, 4]
    assert extremes(torch.tensor([NAN, 1.0, NAN, 2.0, NAN]), [0] * 5, 4) == [0, 1, 2, 3]  # others do not suffice


def test_the_correlation_is_that_within_groups():
    groups, scouted, rewards = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([1.0, 2, 3, 11, 12, 13]), torch.tensor([5.0, 6, 7, 0, -1, -2])
    assert scout_metrics(scouted, rewards, groups)["scout_correlation"] == pytest.approx(0.0, abs=1e-6)
    found = scout_metrics(scouted[:3], rewards[:3], groups[:3])
    assert found["scout_correlation"] == pytest.approx(1.0, abs=1e-6) and found["scout_std"] == pytest.approx((2 / 3) ** 0.5)
    assert scout_metrics(torch.tensor([NAN, 1.0]), torch.tensor([1.0, 1.0]), groups[:2]) == {}


@pytest.fixture(scope="module")
def policy():
    return Policy(DiffusionPipeline.from_pretrained(embedded.path("mini-sd3")), num_inference_steps=3, guidance_scale=1.0, max_sequence_length=1)


def samples_of(policy, folder, group_size, **flags):
    run = make_run(folder, **{"scout_pool": 0, "scout_steps": 1, **flags})
    with run.meter.running():
        run.meter.watch(policy.denoisers.values())
        return sample_epoch(run, policy, brightness, PROMPTS, 3, 2, group_size), run.meter.total()


def by_seed(samples):
    finals = torch.cat([batch.final for batch in samples.batches])
    seeds = [seed for batch in samples.batches for seed in batch.condition.seeds]
    return {seed: (final, float(reward)) for seed, final, reward in zip(seeds, finals, samples.rewards[torch.cat(samples.index)])}


def test_chosen_samples_are_those_of_a_run_without_a_pool(policy, tmp_path):
    """Of six candidates a prompt two are kept: the best and the worst of one-step samples, sampled in three steps with the noise that they had anyway."""
    whole, _ = samples_of(policy, tmp_path / "whole", 6)
    chosen, cost = samples_of(policy, tmp_path / "pool", 2, scout_pool=6)
    every, kept = by_seed(whole), by_seed(chosen)
    assert len(kept) == 4 and set(kept) <= set(every) and chosen.groups.bincount().tolist() == [2, 2]
    for seed, (final, reward) in kept.items():
        torch.testing.assert_close(final, every[seed][0], rtol=1e-4, atol=1e-4)
        assert reward == pytest.approx(every[seed][1], abs=1e-5)
    for group, prompt in enumerate(dict.fromkeys(p for _, p in sorted(zip(whole.groups.tolist(), whole.prompts)))):
        seeds = [seed for batch, index in zip(whole.batches, whole.index) for seed, i in zip(batch.condition.seeds, index) if whole.groups[i] == group]
        condition = policy.condition([prompt] * 6, seeds=seeds, num_inference_steps=1)
        scores = brightness(policy.decode(policy.rollout(condition, deterministic=True).final), None)
        expected = {seeds[int(scores.argmin())], seeds[int(scores.argmax())]}
        assert expected == set(kept) & set(seeds)
    assert cost.images == 12 + 4
    assert cost.denoiser_evaluations == 12 * 1 + 4 * 3  # that roll-outs are reproducible was seen before
    assert {"scout_std", "scout_correlation"} <= chosen.metrics().keys() and not {"scout_std"} & whole.metrics().keys()


def test_a_select_keeps_what_belongs_together():
    asked = Asked(list("abc"), [0, 1, 1], [5, 6, 7], [8, 9, 10])
    assert asked.select([2, 0]) == Asked(["c", "a"], [1, 0], [7, 5], [10, 8])


FLAGS = {"num_prompts_per_epoch": 2, "group_size": 2, "scout_pool": 5, "scout_steps": 1, "num_eval_samples": 2, "num_validation_images": 1}


@pytest.mark.slow
def test_a_run_with_a_pool_resumes_exactly(tmp_path):
    task = write_task(tmp_path)
    whole = run_script("flow_grpo", tmp_path / "whole", task, num_epochs=2, **FLAGS)
    run_script("flow_grpo", tmp_path / "parts", task, num_epochs=1, **FLAGS)
    parts = run_script("flow_grpo", tmp_path / "parts", task, num_epochs=2, resume_from_checkpoint="latest", **FLAGS)
    assert_same_lora(whole, parts)
    assert [row["scout_std"] > 0 for row in rows(parts)] == [True, True]
    assert json.loads((whole / "costs.json").read_text())["images"] == 2 * (10 + 4)


@pytest.mark.long
def test_one_process_and_two_choose_the_same(tmp_path):
    """Five candidates of three prompts do not divide among two: one is sampled again, and counted once."""
    task, flags = write_task(tmp_path), {**FLAGS, "num_prompts_per_epoch": 3, "train_batch_size": 2, "gradient_accumulation_steps": 3}
    one = run_script("flow_grpo", tmp_path / "one", task, reward=f"{task / 'rewards.py'}:recorded", **flags)
    two = run_script_on_two_processes("flow_grpo", tmp_path / "two", task, **flags)
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-5) and a["scout_std"] == pytest.approx(b["scout_std"], abs=1e-5)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"scout_pool": 2}, "--scout_pool must be more than --group_size 2"),
        ({"same_latent": True}, "--same_latent gives a group one alone"),
        ({"scout_pool": 0}, "--scout_steps has no effect without --scout_pool"),
    ],
)
def test_what_a_pool_cannot_be(tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit):
        run_script("flow_grpo", tmp_path / "run", write_task(tmp_path), **{**FLAGS, **flags})
    assert said in capsys.readouterr().err
