"""D3PO and SPO on trajectories: gradients, candidates and their scores, stored trajectories, and their scripts."""

import json

import pytest
import torch
from script_tools import RECIPES, assert_same_lora, assert_same_run, load_script, make_run, rows, run_script, run_script_on_two_processes, script, write_task
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, embedded
from diffusers_align.algorithms.d3po import d3po_loss
from diffusers_align.rl.matching import error_coefficients
from diffusers_align.rl.pair_losses import ranked_pairs
from diffusers_align.training.online.sampling import Samples
from diffusers_align.training.online.step_candidates import roll_out_candidates
from diffusers_align.training.online.stored_trajectories import StoredTrajectories, descend, log_probs

torch.set_num_threads(1)
PROMPTS, SEEDS = ["a cat", "a cat", "a dog", "a dog"], [1, 2, 3, 4]
D3PO = {"num_prompts_per_epoch": 2, "group_size": 2, "num_train_timesteps": 1}
SPO = {"num_samples_per_epoch": 4, "num_candidates": 2, "divert_start_step": 1, "score_scale": 10000, "threshold": 0.1}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def policy():
    """A policy that has moved a little from its reference."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    policy = Policy(pipeline, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=1)
    torch.manual_seed(0)  # of the LoRA, whatever ran before
    for i, parameter in enumerate(policy.add_lora(2)):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return policy


def samples_of(policy):
    """Four samples of two prompts in two batches, out of order."""
    index = [torch.tensor([2, 0]), torch.tensor([3, 1])]
    batches = [policy.rollout([PROMPTS[i] for i in part], seeds=[SEEDS[i] for i in part]) for part in index]
    rewards = torch.tensor([0.0, 1.0, 3.0, 2.0])
    return Samples(batches, index, PROMPTS, torch.tensor([0, 0, 1, 1]), rewards, {"reward": rewards}, [])


def gradients(policy):
    found = [parameter.grad.clone() for parameter in policy.trainable_parameters()]
    for parameter in policy.trainable_parameters():
        parameter.grad = None
    return found


# D3PO


def test_log_probs_are_those_of_the_rollout_in_the_order_of_the_samples(policy, tmp_path):
    samples = samples_of(policy)
    found = log_probs(make_run(tmp_path), policy, samples, [0, 1])
    for trajectory, index in zip(samples.batches, samples.index):
        torch.testing.assert_close(found[index], trajectory.log_probs[:, :2].double(), rtol=0, atol=0)


def test_gradients_from_coefficients_are_those_of_the_loss(policy, tmp_path):
    run, samples, steps, dimensions = make_run(tmp_path), samples_of(policy), [0, 1], 1024
    winners, losers = ranked_pairs(samples.rewards, samples.groups)
    assert sorted(zip(winners.tolist(), losers.tolist())) == [(1, 0), (2, 3)]
    with policy.reference():
        reference = log_probs(run, policy, samples, steps)

    def loss(own):
        return d3po_loss(own[winners], own[losers], reference[winners], reference[losers], per_dim=dimensions, beta=500.0, clip="none")

    _, (coefficients,) = error_coefficients(loss, log_probs(run, policy, samples, steps))
    descend(run, policy, samples, steps, coefficients)
    found = gradients(policy)

    rows: dict[tuple, torch.Tensor] = {}
    for trajectory, index in zip(samples.batches, samples.index):
        for k in steps:
            values = policy.transition(trajectory, k).log_prob(trajectory.actions[:, k])
            rows |= {(i, k): value for i, value in zip(index.tolist(), values)}
    loss(torch.stack([torch.stack([rows[i, k] for k in steps]) for i in range(4)])).mean().backward()
    expected = gradients(policy)
    assert max(value.abs().max() for value in expected) > 1e-6
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_d3po_resumes_bit_for_bit(task, tmp_path, capsys):
    flags = {**D3PO, "reward": f"{task / 'rewards.py'}:redness", "use_ema": True, "ema_interval": 1}
    whole = run_script("d3po", tmp_path / "whole", task, num_epochs=2, **flags)
    (metrics, later) = rows(whole)
    assert {"loss", "accuracy", "margin", "clip_fraction", "pairs"} <= metrics.keys() and metrics["pairs"] == 2
    assert metrics["grad_norm"] > 0 and later["loss"] != metrics["loss"]
    parts = run_script("d3po", tmp_path / "parts", task, num_epochs=1, **flags)
    run_script("d3po", parts, task, num_epochs=2, resume_from_checkpoint="latest", **flags)
    assert_same_run(parts, whole, "checkpoint-2")
    run_script("d3po", parts, task, num_epochs=3, resume_from_checkpoint="latest", **{**flags, "train_batch_size": 4})
    assert "--train_batch_size was 2, now 4" in capsys.readouterr().out, "each update is on all of an epoch's pairs, whatever the batches"


def test_d3po_learns_from_stored_trajectories(task, tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_preferences", script("any").parent / "make_preferences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "made"
    module.main([
        "--pretrained_model_name_or_path", "mini-sd3", "--call_kwargs", '{"max_sequence_length": 1}', "--prompts", str(task / "prompts.jsonl"),
        "--reward", f"{task / 'rewards.py'}:redness", "--num_images_per_prompt", "2", "--num_inference_steps", "3", "--guidance_scale", "1.0",
        "--save_trajectories", "--noise_level", "0.4", "--output_dir", str(folder),
    ])  # fmt: skip
    stored = StoredTrajectories(str(folder), "mini-sd3", 2)
    assert stored.noise == {"noise_level": 0.4} and len(stored.prompts) == 3 and "weight" in stored.prompts[0].columns
    samples = stored.epoch(make_run(tmp_path / "run"), 0, 2)
    saved = [json.loads(line) for line in (folder / "scored" / "metadata.jsonl").read_text().splitlines()]
    assert [(text, reward) for text, reward in zip(samples.prompts, samples.rewards.tolist())] == [
        (row["prompt"], pytest.approx(row["reward"])) for text in dict.fromkeys(samples.prompts) for row in saved if row["prompt"] == text
    ]
    with pytest.raises(ValueError, match="were drawn with num_inference_steps 3, guidance_scale 1.0, .*leave out --num_inference_steps 2, --guidance"):
        run_script("d3po", tmp_path / "other", task, **{**D3PO, "num_inference_steps": 2, "guidance_scale": 3.0}, trajectories=folder)
    args = load_script("d3po").parse_args(["--pretrained_model_name_or_path=mini-sd3", f"--trajectories={folder}", "--output_dir=o"])
    said = "As the trajectories were drawn, evaluations too: --num_inference_steps 3, --guidance_scale 1.0, --call_kwargs {'max_sequence_length': 1}."
    assert stored.hand_over(args) == [said] and (args.num_inference_steps, args.guidance_scale) == (3, 1.0) and stored.hand_over(args) == []
    out = run_script("d3po", tmp_path / "trained", task, **D3PO, trajectories=folder)
    card = (out / "README.md").read_text()
    assert "aligns `mini-sd3` with the rewards of the trajectories in `made`, trained by D3PO" in card, "the reward of the flags only measures"
    assert "the reward, which only measures, is `rewards.py:brightness`" in card
    # The fresh LoRA is the model that drew them, under the noise that drew them: each gain is exactly 0, each pair a tie.
    first = rows(out)[0]
    assert first["pairs"] == 2 and first["grad_norm"] > 0
    with pytest.raises(ValueError, match="are of pretrained_model_name_or_path 'mini-sd3' and not 'mini-sd', variant None and not 'fp16': train"):
        StoredTrajectories(str(folder), "mini-sd", 2, variant="fp16")
    with pytest.raises(ValueError, match="lower --group_size"):
        StoredTrajectories(str(folder), "mini-sd3", 3)
    settings = json.loads((folder / "sampling.json").read_text())
    assert settings["model_weights"] is None, "an embedded model is always the same"
    (folder / "sampling.json").write_text(json.dumps({**settings, "model_weights": "of a folder that has changed"}))
    with pytest.raises(ValueError, match="are of other weights than mini-sd3 holds now"):
        StoredTrajectories(str(folder), "mini-sd3", 2)
    (folder / "sampling.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds no trajectories"):
        StoredTrajectories(str(task), "mini-sd3", 2)
    settings = json.loads((folder / "sampling.json").read_text())
    (folder / "sampling.json").write_text(json.dumps({**settings, "lora": "my-lora"}))
    with pytest.raises(ValueError, match="of lora 'my-lora' and not None: .*draw new ones without"):
        StoredTrajectories(str(folder), "mini-sd3", 2)


# SPO


@pytest.fixture(scope="module")
def candidates(policy):
    return roll_out_candidates(policy, PROMPTS[1:3], SEEDS[1:3], 3)


def test_candidates_leave_one_state_by_the_policys_own_kernel(policy, candidates):
    trajectory, drawn = candidates.trajectory, candidates.drawn
    steps = trajectory.stochastic.nonzero().flatten().tolist()
    transitions = policy.transitions(trajectory)
    for k in steps:
        torch.testing.assert_close(transitions[k].log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k], rtol=1e-5, atol=1e-2)
        for j in range(3):
            distance = (drawn[:, k, j] - transitions[k].mean) / transitions[k].std
            assert (distance.flatten(1).std(1) - 1).abs().max() < 0.15 and distance.flatten(1).mean(1).abs().max() < 0.15
    assert all((trajectory.actions[i, k] == drawn[i, k]).flatten(1).all(1).sum() == 1 for i in range(2) for k in steps)
    assert torch.equal(trajectory.actions[:, :-1], trajectory.states[:, 1:])
    assert len({candidates.drawn[i, steps[0], j].sum().item() for i in range(2) for j in range(3)}) == 6


def test_a_candidate_is_judged_by_what_the_model_sees_in_it(policy, candidates):
    trajectory = candidates.trajectory
    for k in range(trajectory.num_steps - 1):
        for j in range(3):
            t = trajectory.timesteps[k + 1].expand(2)
            with torch.no_grad():
                velocity = policy.predict(candidates.drawn[:, k, j], t, trajectory.condition)
            expected = candidates.drawn[:, k, j] - trajectory.sigmas[k + 1] * velocity
            torch.testing.assert_close(candidates.clean[:, k, j], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(candidates.clean[:, -1], candidates.drawn[:, -1])


def test_a_path_depends_on_its_seed_and_not_on_the_batch(policy, candidates):
    alone = roll_out_candidates(policy, PROMPTS[2:3], SEEDS[2:3], 3)
    torch.testing.assert_close(alone.drawn[0], candidates.drawn[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.trajectory.final[0], candidates.trajectory.final[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_pipeline_draws_candidates(family):
    policy = Policy(FAMILIES[family].build(), **FAMILIES[family].call)
    found = roll_out_candidates(policy, ["a cat", "a large red dog"], [1, 2], 2)
    trajectory = found.trajectory
    assert found.drawn.shape == found.clean.shape == (2, trajectory.num_steps, 2, *trajectory.final.shape[1:])
    transitions = policy.transitions(trajectory)
    assert transitions
    for k, transition in transitions.items():
        dimensions = trajectory.final[0].numel()
        gap = (transition.log_prob(trajectory.actions[:, k]) - trajectory.log_probs[:, k]) / dimensions
        assert gap.abs().max() < 1e-2
        assert not torch.equal(found.drawn[:, k, 0], found.drawn[:, k, 1])


def test_spo_prefers_the_better_candidate(task, tmp_path):
    reward = f"{task / 'rewards.py'}:redness"
    out = run_script("spo", tmp_path / "run", task, **SPO, reward=reward, num_epochs=2, gradient_accumulation_steps=2)
    first, second = rows(out)
    assert {"kept", "score_gap", "loss", "accuracy", "margin", "clip_fraction", "reward"} <= first.keys()
    assert first["kept"] > 0.5 and first["score_gap"] > 0 and first["grad_norm"] > 0
    assert first["margin"] == pytest.approx(0, abs=1e-3) and second["loss"] != first["loss"]


def test_one_noise_a_group_makes_pairs_where_the_pipeline_hands_its_generator_to_the_scheduler(task, tmp_path):
    """The samples of a group share their initial noise and differ by that of their steps."""
    model = {"pretrained_model_name_or_path": "mini-sd", "call_kwargs": "{}"}
    (row,) = rows(run_script("d3po", tmp_path / "run", task, **{**D3PO, **model, "num_epochs": 1}))
    assert row["pairs"] > 0 and row["zero_std"] == 0 and row["reward_std"] > 1e-4 and row["grad_norm"] > 0


def test_pairs_that_are_not_kept_have_no_gradient(task, tmp_path):
    out = run_script("spo", tmp_path / "run", task, **{**SPO, "score_scale": 1e-6}, allow_no_signal=True)
    assert rows(out)[0]["kept"] == 0 and rows(out)[0]["grad_norm"] == 0


def test_spo_descends_on_the_pairs_that_it_scored(policy, tmp_path):
    """The gradient step of the script raises the winners' log-probability over the losers'."""
    from collections import defaultdict

    from diffusers_align.data.prompts import Prompt
    from diffusers_align.training.online.step_candidates import sample_pairs

    def redness(images, prompts, **columns):
        return images[:, 0].flatten(1).mean(1)

    module = load_script("spo")
    flags = {"num_candidates": 3, "divert_start_step": 0, "score_scale": 1e4, "threshold": 0.0, "beta": 10.0, "clip": "none", "clip_range": 0.1}
    run = make_run(tmp_path, **flags)
    samples = sample_pairs(run, policy, redness, [Prompt("a cat"), Prompt("a dog")], 0, 4)
    assert samples.keep.all() and samples.keep.shape == (4, len(samples.steps)) and samples.gap.min() > 0
    for b in range(2):
        module.accumulate(run, policy, samples, b, 1 / samples.keep.sum().item(), defaultdict(list))
    grads = gradients(policy)

    def margin():
        total = 0.0
        for b, trajectory in enumerate(samples.batches):
            for place, (_, transition) in enumerate(sorted(policy.transitions(trajectory, samples.steps).items())):
                total += float((transition.log_prob(samples.winners[b][:, place]) - transition.log_prob(samples.losers[b][:, place])).sum())
        return total

    before, scale = margin(), 1e-3 / max(float(g.abs().max()) for g in grads)
    for parameter, grad in zip(policy.trainable_parameters(), grads):
        parameter.data -= scale * grad
    after = margin()
    for parameter, grad in zip(policy.trainable_parameters(), grads):
        parameter.data += scale * grad
    assert after > before + 1e-2


# processes, flags and recipes


@pytest.mark.long
@pytest.mark.parametrize("name, flags", [("d3po", {**D3PO, "group_size": 4}), ("spo", {**SPO, "num_samples_per_epoch": 8})])
def test_two_processes_make_the_same_update_as_one(name, flags, task, tmp_path):
    # Adam's own epsilon would make a full step of the rounding in a gradient of 0.
    flags |= {"num_epochs": 2, "adam_epsilon": 1e-6, **({"gradient_accumulation_steps": 2} if name == "spo" else {})}
    one = run_script(name, tmp_path / "one", task, **flags, train_batch_size=4, reward=f"{task / 'rewards.py'}:recorded")
    two = run_script_on_two_processes(name, tmp_path / "two", task, **flags, train_batch_size=4)
    assert rows(two)[0]["grad_norm"] == pytest.approx(rows(one)[0]["grad_norm"], rel=1e-2)
    assert_same_lora(two, one, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("d3po", ["--prompts", "p"], "--prompts and --reward are required"),
        ("d3po", ["--trajectories", "t", "--noise_level", "0.5"], "leave out --noise_level"),
        ("d3po", ["--prompts", "p", "--reward", "r", "--gradient_accumulation_steps", "2"], "unrecognized arguments: --gradient_accumulation_steps"),
        ("spo", ["--prompts", "p", "--reward", "r", "--sde_window", "0", "4"], "--sde_window 0 4 ends before --divert_start_step 4, the first step with pairs"),
        ("d3po", ["--prompts", "p", "--reward", "r", "--group_size", "1"], "--group_size must be a whole number from 2 to 1e6, got 1"),
        ("spo", ["--prompts", "p", "--reward", "r", "--num_candidates", "1"], "--num_candidates must be a whole number from 2 to 10000, got 1"),
        ("spo", ["--prompts", "p", "--reward", "r", "--divert_start_step", "20"], "--divert_start_step must lie in the 20"),
        ("spo", ["--prompts", "p", "--reward", "r", "--threshold", "1.0"], "below 1"),
    ],
)
def test_flags_that_make_no_sense(name, flags, message, capsys):
    with pytest.raises(SystemExit):
        load_script(name).parse_args(["--pretrained_model_name_or_path", "mini-sd3", "--output_dir", "o", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["d3po", "spo"])
def test_recipes_parse(name):
    recipes = sorted(RECIPES.glob(f"{name}_*.yaml"))
    assert {recipe.stem for recipe in recipes} >= {f"{name}_sd15", f"{name}_mini_sd3"}
    for recipe in recipes:
        assert load_script(name).parse_args(["--config", str(recipe)]).prompts
