"""Scoring in a run: rewards that fail, are late, or have no score for some samples; and the background."""

import json
import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from reward_servers import no_proxy, serving  # noqa: F401
from script_runs import rows, train

from diffusers_align.data.prompts import Prompt
from diffusers_align.rewards import InvalidReward, RewardError, RewardTimeout, load_reward, web
from diffusers_align.rewards.server import RewardServer
from diffusers_align.training.online.scoring import MAX_PENDING, Scorer, gather_scores

# --- scoring in a run --------------------------------------------------------------------------------------------------


ASKED = [Prompt(f"prompt {i}", {"weight": i}) for i in range(4)]


def raises_on(*bad):
    def picky(images, prompts, weight, **columns):
        if set(weight) & set(bad):
            raise ZeroDivisionError("too bad")
        return torch.tensor([float(w) for w in weight])

    return picky


def values(result):
    return [row["reward"] for row in result]


def test_an_exception_names_the_prompts_or_costs_only_its_samples():
    images = torch.rand(4, 3, 4, 4)
    message = "'picky' raised ZeroDivisionError: too bad, for 4 images of the prompts 'prompt 0', 'prompt 1', 'prompt 2', .... .*--invalid_rewards mask"
    with pytest.raises(RewardError, match=message) as caught:
        Scorer(raises_on(2))(images, ASKED)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    scorer = Scorer(raises_on(2), on_failure="mask")
    assert values(scorer(images, ASKED)) == pytest.approx([0, 1, math.nan, 3], nan_ok=True)
    assert len(scorer.failures) == 1 and "for 1 images of the prompts 'prompt 2'" in scorer.failures[0]


def test_a_server_that_is_down_is_not_asked_for_each_sample():
    calls = []

    def down(images, prompts, **columns):
        calls.append(len(prompts))
        raise web.Unreachable("gone")

    assert all(value != value for value in values(Scorer(down, on_failure="mask")(torch.rand(4, 3, 4, 4), ASKED))) and calls == [4]


def test_a_wrong_shape_is_an_error_even_when_masking():
    with pytest.raises(InvalidReward, match="shape"):
        Scorer(lambda images, prompts, **columns: torch.zeros(1, 1), on_nan="mask", on_failure="mask")(torch.rand(2, 3, 4, 4), ASKED[:2])


def test_a_hanging_reward_is_given_up():
    release, calls = threading.Event(), []

    def hangs(images, prompts, **columns):
        calls.append(len(prompts))
        release.wait(20)
        return torch.zeros(len(prompts))

    try:
        with pytest.raises(RewardTimeout, match="'hangs' gave no answer in 0.1 s, for 4 images of the prompts 'prompt 0'.*--reward_timeout"):
            Scorer(hangs, timeout=0.1)(torch.rand(4, 3, 4, 4), ASKED)
        scorer = Scorer(hangs, on_failure="mask", timeout=0.1)
        assert all(value != value for value in values(scorer(torch.rand(4, 3, 4, 4), ASKED))) and calls == [4, 4]
    finally:
        release.set()


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_the_background_changes_no_bit_and_no_order(timeout):
    batches = [torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    layer = torch.nn.Conv2d(3, 8, 3)

    def convolved(images, prompts, **columns):
        assert not torch.is_grad_enabled()
        time.sleep(0.01 * float(images[0, 0, 0, 0]))
        return layer(images).relu().flatten(1).mean(1)

    results = []
    for background in (False, True):
        with Scorer(convolved, timeout=timeout, background=background) as scorer:
            for i, images in enumerate(batches):
                scorer.submit([10 * i, 10 * i + 1], images, ASKED[:2])
            results.append(scorer.finish())
    assert results[0] == results[1] and [key for key, _ in results[0]] == [10 * i + j for i in range(6) for j in range(2)]


def test_the_background_overlaps_is_bounded_and_scores_one_batch_at_a_time():
    gate, running, most, submitted = threading.Semaphore(0), [0], [0], []

    def gated(images, prompts, **columns):
        running[0] += 1
        most[0] = max(most[0], running[0])
        assert gate.acquire(timeout=20)
        running[0] -= 1
        return torch.zeros(len(prompts))

    def submit_all(scorer):
        for i in range(6):
            scorer.submit([i], torch.rand(1, 3, 4, 4), ASKED[:1])
            submitted.append(i)

    with Scorer(gated, background=True) as scorer:
        main = threading.Thread(target=submit_all, args=(scorer,))
        main.start()
        time.sleep(0.3)
        assert len(submitted) == MAX_PENDING, "sampling went on without any score, but not without bound"
        for _ in range(6):
            gate.release()
        main.join(20)
        assert len(scorer.finish()) == 6 and most[0] == 1


def test_exceptions_in_the_background_surface():
    with Scorer(raises_on(0), background=True) as scorer, pytest.raises(RewardError, match="too bad"):
        scorer.submit([0], torch.rand(1, 3, 4, 4), ASKED[:1])
        scorer.finish()


def finished_run(scorer, capsys):
    run = SimpleNamespace(print=print)
    return gather_scores(run, scorer, ASKED), capsys.readouterr().out


def test_samples_without_a_reward_are_named_and_none_with_one_is_an_error(capsys):
    scorer = Scorer(lambda i, p, weight: {"reward": raises_on(1)(i, p, weight), "extra": torch.ones(len(p))}, on_failure="mask")
    scorer.submit([2, 3, 0, 1], torch.rand(4, 3, 4, 4), [ASKED[i] for i in (2, 3, 0, 1)])
    scores, out = finished_run(scorer, capsys)
    assert scores["reward"].tolist() == pytest.approx([0, math.nan, 2, 3], nan_ok=True)
    assert scores["extra"].tolist() == pytest.approx([1, math.nan, 1, 1], nan_ok=True)
    assert "no score for 1 of 4 samples. Prompts: 'prompt 1'." in out and "ZeroDivisionError: too bad" in out

    scorer = Scorer(raises_on(*range(4)), on_failure="mask")
    scorer.submit(range(4), torch.rand(4, 3, 4, 4), ASKED)
    with pytest.raises(InvalidReward, match="no score for 4 of 4 samples.*too bad.*Nothing is left to train on"):
        finished_run(scorer, capsys)


# --- a whole run -------------------------------------------------------------------------------------------------------


TASK = """
import torch


def brightness(images, prompts, weight=None, **columns):
    return images.flatten(1).mean(1) * torch.tensor([float(w) for w in weight])


def afraid_of_dogs(images, prompts, **columns):
    if any("dog" in prompt for prompt in prompts):
        raise RuntimeError("a dog!")
    return images.flatten(1).mean(1)


def always_nan(images, prompts, **columns):
    return torch.full((len(prompts),), torch.nan)
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    prompts = [("a cat on a red background", 0.5), ("two dogs on a blue background", 1.0)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "weight": weight}) + "\n" for text, weight in prompts))
    (folder / "rewards.py").write_text(TASK)
    return folder


def test_a_run_masks_or_stops(task, tmp_path, capsys):
    reward = f"{task / 'rewards.py'}:afraid_of_dogs"
    with pytest.raises(RewardError, match="(?s)'afraid_of_dogs' raised RuntimeError: a dog!.*two dogs on a blue background.*--invalid_rewards mask"):
        train("flow_grpo", tmp_path / "error", task, reward=reward)
    train("flow_grpo", tmp_path / "mask", task, reward=reward, invalid_rewards="mask")
    metrics = rows(tmp_path / "mask")[0]
    assert metrics["invalid_rewards"] == 2 and metrics["reward"] > 0 and metrics["grad_norm"] > 0
    out = capsys.readouterr().out
    assert "no score for 2 of 4 samples. Prompts: 'two dogs on a blue background'" in out and "Left out of the evaluation" in out
    with pytest.raises(InvalidReward, match="(?s)no score for 4 of 4 samples.*Nothing is left to train on"):
        train("flow_grpo", tmp_path / "nothing", task, reward=f"{task / 'rewards.py'}:always_nan", invalid_rewards="mask")
    assert not (tmp_path / "nothing" / "metrics.jsonl").exists()


def test_a_remote_reward_in_the_background_trains_bit_for_bit_the_same(task, tmp_path):
    local = f"{task / 'rewards.py'}:brightness"
    train("flow_grpo", tmp_path / "local", task, reward=local)
    with serving(RewardServer(load_reward(local))) as running:
        train("flow_grpo", tmp_path / "remote", task, reward=running.url, reward_in_background=True, reward_timeout=60)
    assert (tmp_path / "remote" / "metrics.jsonl").read_text() == (tmp_path / "local" / "metrics.jsonl").read_text()
    assert rows(tmp_path / "local")[0]["grad_norm"] > 0
