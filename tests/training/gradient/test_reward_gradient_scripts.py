"""The scripts that differentiate the reward: what they learn, that they resume exactly, and the functions they share."""

import argparse
import functools
import time
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from script_runs import LORA
from script_tools import RECIPES, assert_same_lora, assert_same_run, load_script, rows, run_script, run_script_on_two_processes, write_task
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, embedded
from diffusers_align.data.prompts import Prompt
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.gradients.check import GradientError
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.rewards import InvalidReward, RewardError, RewardTimeout
from diffusers_align.training.gradient import epoch_log, losses, renoised
from diffusers_align.training.gradient.adjoints import adjoint_backward
from diffusers_align.training.gradient.bound_rewards import BoundReward
from diffusers_align.training.gradient.losses import distance_to_reference, scored_sum, total_loss
from diffusers_align.training.gradient.reward_check import count_frames
from diffusers_align.training.gradient.updates import Batch, updates_of_epoch
from diffusers_align.training.online.scoring import Scorer
from diffusers_align.training.run.run import Run

torch.set_num_threads(1)
FLAGS = {"num_samples_per_epoch": 4, "num_epochs": 2, "learning_rate": 1e-3}
STATEFUL = {**FLAGS, "truncation": 2, "kl_weight": 0.1, "grad_clip_quantile": 0.5, "use_ema": True, "ema_interval": 1}
MINI_SD = {"pretrained_model_name_or_path": "mini-sd", "call_kwargs": "{}"}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def finished(task):
    """DRaFT-2 with everything that has a state of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch_log, "MIN_NORMS", 2)
        return run_script("draft", task / "run", task, **{**STATEFUL, "num_epochs": 3})


# --- the scripts ---------------------------------------------------------------------------------------------------------


def test_a_run_and_its_lora(finished):
    metrics = rows(finished)
    assert [row["epoch"] for row in metrics] == [0, 1, 2]
    assert all(row["grad_norm"] > 0 and 0 < row["reward"] < 2 for row in metrics)
    assert 0 <= metrics[0]["kl"] < metrics[-1]["kl"]
    assert (finished / "reward_curve.png").is_file() and (finished / "before_after.png").is_file()
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "latent"}
    before = pipeline("a cat", generator=torch.Generator().manual_seed(0), **call).images
    pipeline.load_lora_weights(finished, weight_name=LORA)
    assert not torch.equal(pipeline("a cat", generator=torch.Generator().manual_seed(0), **call).images, before)


def test_resumed_equals_uninterrupted(finished, task, tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_log, "MIN_NORMS", 2)
    run_script("draft", tmp_path / "run", task, **STATEFUL)
    run_script("draft", tmp_path / "run", task, **{**STATEFUL, "num_epochs": 3, "resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path / "run", finished, "checkpoint-3")


METHODS = {
    "draft_lv": ("draft", {"method": "draft_lv", "num_renoised": 1}),
    "drtune": ("draft", {"method": "drtune", "num_trained_steps": 2, "skip_last_steps": 1}),
    "srpo": ("draft", {"method": "srpo", "reward_map": "hinge", "reward_target": 3.0, **MINI_SD}),
    "adjoint": ("draft", {"method": "draft", "adjoint": True}),
    "refl": ("refl", {"window": (0.3, 0.9), "reward_target": 5.0, "reward_scale": 1.0}),
    "alignprop": ("alignprop", {"truncation_schedule": "uniform", "reward_scale": 1.0, "kl_weight": 0.1, **MINI_SD}),
    "vader": ("vader", {"backprop_mode": "random", "gradient_checkpointing": True, **MINI_SD}),
}
LOGGED = {"srpo": "penalty", "drtune": "stop_step", "adjoint": "mismatch", "refl": "hinge_inactive", "alignprop": "truncation", "vader": "truncation"}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains(name, task, tmp_path):
    script, flags = METHODS[name]
    run_script(script, tmp_path / "run", task, **{**FLAGS, "num_eval_samples": 2, "num_validation_images": 2, **flags})
    metrics = rows(tmp_path / "run")
    assert len(metrics) == 2 and all(row["grad_norm"] > 0 and LOGGED.get(name, "reward") in row for row in metrics)
    assert (tmp_path / "run" / LORA).is_file()


def test_the_reward_rises(task, tmp_path):
    """Brightness, which needs no more than an offset."""
    (task / "plain.py").write_text("def plain(images, prompts, **columns):\n    return images.flatten(1).mean(1)\n")
    run_script(
        "draft", tmp_path / "run", task, **{**FLAGS, "num_epochs": 4, "learning_rate": 3e-3, "num_eval_samples": 2, "reward": f"{task / 'plain.py'}:plain"}
    )
    metrics = rows(tmp_path / "run")
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.02


def test_a_reward_without_a_gradient_stops_before_training(task, tmp_path):
    with pytest.raises(GradientError, match="reward"):
        run_script("refl", tmp_path / "run", task, **{**FLAGS, "reward": "jpeg_compressibility"})
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("draft", ["--reward_map", "hinge"], "needs --reward_target"),
        ("draft", ["--reward_target", "1"], "--reward_target has no effect without --reward_map hinge or distance or shortfall"),
        ("draft", ["--adjoint", "--kl_weight", "1"], "--adjoint is for"),
        ("draft", ["--method", "srpo", "--kl_weight", "1"], "none to hold"),
        ("draft", ["--eta", "1"], "--eta has no effect without --stochastic"),
        ("draft", ["--grad_clip_quantile", "0"], "grad_clip_quantile"),
        ("refl", ["--window", "0.9", "0.1"], "in order"),
    ],
)
def test_flags_that_make_no_sense(script, flags, message, tmp_path, capsys):
    required = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "clip_score", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        load_script(script).parse_args([*required, *flags])
    assert message in capsys.readouterr().err


def test_a_name_of_the_last_version_is_taken(tmp_path, capsys):
    required = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "clip_score", "--output_dir", str(tmp_path)]
    args = load_script("draft").parse_args([*required, "--method", "drtune", "--early_stop", "2"])
    assert args.skip_last_steps == 2 and "--early_stop is now called --skip_last_steps" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(p.stem for script in ("draft", "refl", "alignprop", "vader") for p in RECIPES.glob(f"{script}_*.yaml")))
def test_recipes_are_read(recipe, tmp_path):
    args = load_script(recipe.split("_")[0]).parse_args(["--config", str(RECIPES / f"{recipe}.yaml"), "--output_dir", str(tmp_path)])
    assert args.num_samples_per_epoch % (args.train_batch_size * args.gradient_accumulation_steps) == 0
    assert args.eval_reward and args.eval_reward != args.reward


@pytest.mark.slow
def test_videos(task, tmp_path):
    family = FAMILIES["wan"]
    family.build().save_pretrained(tmp_path / "wan")
    call = {"pretrained_model_name_or_path": tmp_path / "wan", "call_kwargs": '{"num_frames": 5, "max_sequence_length": 32}', "height": 16, "width": 16}
    flags = {**call, "guidance_scale": 3.0, "frames": "random", "stochastic": True, "backprop_mode": "random"}
    run_script("vader", tmp_path / "run", task, **{**FLAGS, "train_batch_size": 1, **flags})
    assert all(row["grad_norm"] > 0 for row in rows(tmp_path / "run"))


@pytest.mark.long
def test_two_processes_train_what_one_does(task, tmp_path):
    flags = {**FLAGS, "method": "drtune", "num_trained_steps": 1, "skip_last_steps": 2, "adam_epsilon": 1e-3}
    flags |= {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    run_script_on_two_processes("draft", task / "two", task, **flags)
    run_script("draft", tmp_path / "one", task, **{**flags, "reward": f"{task / 'rewards.py'}:recorded"})
    assert_same_lora(task / "two", tmp_path / "one", rtol=1e-3, atol=1e-6)
    assert rows(tmp_path / "one")[-1]["reward"] == pytest.approx(rows(task / "two")[-1]["reward"], abs=1e-4)


# --- what they share -----------------------------------------------------------------------------------------------------


def loss_args(**flags):
    return argparse.Namespace(**{"reward_map": "none", "reward_target": None, "reward_scale": 1.0, "kl_weight": 0.0, "checkpoint_decoder": True, **flags})


@pytest.mark.parametrize("reward_map, expected", [("none", [-1.0, -3.0]), ("hinge", [1.0, 0.0]), ("distance", [1.0, 1.0]), ("shortfall", [1.0, -1.0])])
def test_the_reward_in_the_loss(reward_map, expected):
    args = loss_args(reward_map=reward_map, reward_target=None if reward_map == "none" else 2.0, reward_scale=0.5)
    loss = losses.reward_map(args)(torch.tensor([1.0, 3.0, torch.nan]))
    assert loss[:2].tolist() == [0.5 * e for e in expected] and loss[2].isnan()
    assert scored_sum(loss) == 0.5 * sum(expected)


def undefined_of_dogs(images, prompts, **columns):
    """0/0 where the prompt has a dog: NaN on the way there and, even of a gradient of 0, on the way back."""
    known = torch.tensor([0.0 if "dog" in prompt else 1.0 for prompt in prompts])
    return images.flatten(1).mean(1) * known / known


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_sample_that_could_not_be_scored_has_no_part_in_the_gradient(family):
    """Of a reward that divides 0 by 0 for one of two samples, the gradient is that of the other."""
    policy, asked = tiny(family), [Prompt("a cat"), Prompt("a dog")]
    gradients = []
    for reward in (undefined_of_dogs, lambda images, prompts, **columns: images.flatten(1).mean(1) * torch.tensor([1.0, 0.0])):
        rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[2, 3])
        rewards = BoundReward(reward, asked, "mask")(rollout.images.float())
        found = torch.autograd.grad(scored_sum(-rewards), policy.trainable_parameters(), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    assert gradients[0].isfinite().all() and gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-9)


def test_a_masked_image_gets_the_gradient_zero_and_no_hook_where_nothing_is_masked():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    rewards = BoundReward(undefined_of_dogs, [Prompt("a cat"), Prompt("a dog")], "mask")(images)
    (found,) = torch.autograd.grad(scored_sum(rewards), images)
    assert torch.equal(found[0], torch.full((3, 4, 4), 1 / 48)) and not found[1].any()
    with pytest.raises(InvalidReward, match="a dog"):
        BoundReward(undefined_of_dogs, [Prompt("a dog")], "error")(images[:1])


def raises_for_dogs(images, prompts, **columns):
    if any("dog" in prompt for prompt in prompts):
        raise KeyError("dog")
    return images.flatten(1).mean(1)


def sleeps(images, prompts, **columns):
    time.sleep(5)
    return images.flatten(1).mean(1)


def test_a_reward_that_fails_is_masked_or_named_as_the_flag_says():
    images, asked = torch.rand(2, 3, 4, 4, requires_grad=True), [Prompt("a cat"), Prompt("a dog")]
    rewards = BoundReward(raises_for_dogs, asked, "mask")(images)
    assert rewards[0] == images[0].mean() and rewards[1].isnan()
    (found,) = torch.autograd.grad(scored_sum(rewards), images)
    assert torch.equal(found[0], torch.full((3, 4, 4), 1 / 48)) and not found[1].any()
    with pytest.raises(RewardError, match="raised KeyError: 'dog', for 2 images of the prompts 'a cat', 'a dog'"):
        BoundReward(raises_for_dogs, asked, "error")(images)
    with pytest.raises(RewardTimeout, match="no answer in 0.05 s"):
        BoundReward(sleeps, asked, "error", 0.05)(images)
    late = BoundReward(sleeps, asked, "mask", 0.05)(images)
    assert late.isnan().all() and not torch.autograd.grad(scored_sum(late), images)[0].any()
    timed = BoundReward(brightness, asked, "error", 60.0)(images)
    torch.testing.assert_close(torch.autograd.grad(timed.sum(), images)[0], torch.full_like(images, 1 / 48))


def test_a_reward_that_leaves_the_graph_is_no_matter_of_masks():
    with pytest.raises(RewardError, match="requires grad"):
        BoundReward(lambda images, prompts, **columns: torch.tensor(images.numpy().mean((1, 2, 3))), [Prompt("a cat")], "mask")(
            torch.rand(1, 3, 4, 4, requires_grad=True)
        )


MASKED = """
def dogless(images, prompts, **columns):
    dogs = images.new_tensor([0.0 if "dog" in prompt or "apple" in prompt else 1.0 for prompt in prompts])
    return images.flatten(1).mean(1) * dogs / dogs


with_gradient = []


def never(images, prompts, **columns):
    if images.requires_grad:
        with_gradient.append(len(prompts))  # the check before training, then the training
    return images.flatten(1).mean(1) * (1.0 if len(with_gradient) < 2 else float("nan"))


def nowhere(images, prompts, **columns):
    return images.flatten(1).mean(1) * float("nan")
"""
MASK = {"invalid_rewards": "mask", "num_eval_samples": 2, "num_validation_images": 2, "num_epochs": 1}


@pytest.mark.parametrize("name", ["draft_lv", "refl", "adjoint"])
def test_masked_samples_do_not_stop_a_run(name, task, tmp_path, capsys):
    (task / "masked.py").write_text(MASKED)
    script, flags = METHODS[name]
    run_script(script, tmp_path / "run", task, **{**FLAGS, **flags, **MASK, "reward": f"{task / 'masked.py'}:dogless"})
    (row,) = rows(tmp_path / "run")
    assert row["grad_norm"] > 0 and 0 < row["reward"] < 1
    left_out = int(row["invalid_rewards"])
    assert 0 < left_out < 4 and f"'dogless' has no score for {left_out} of 4 samples. Prompts: " in capsys.readouterr().out


@pytest.mark.parametrize("reward, message", [("never", "no score for 4 of 4 samples. Prompts: 'two dogs"), ("nowhere", "Nothing is left to train on|NaN")])
def test_an_epoch_without_any_reward_stops_the_run(reward, message, task, tmp_path):
    (task / "masked.py").write_text(MASKED)
    with pytest.raises(InvalidReward, match=message):
        run_script("draft", tmp_path / "run", task, **{**FLAGS, **MASK, "reward": f"{task / 'masked.py'}:{reward}"})


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_rewards_in_training_are_those_of_the_evaluation_in_bf16(family):
    """To the bit, although the roll-out around them runs under autocast."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).requires_grad_(False)

    def learned(images, prompts, **columns):
        return model(images.flatten(2).mean(2))[:, 0]

    policy = Policy(FAMILIES[family].build().to(torch.bfloat16), **FAMILIES[family].call)
    policy.add_lora(rank=2)
    asked = [Prompt("a cat"), Prompt("a dog")]
    with torch.autocast("cpu", torch.bfloat16):
        rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[3])
        trained = BoundReward(learned, asked, "error")(rollout.images.float())
    evaluated = [row["reward"] for row in Scorer(learned)(rollout.images.detach().float(), asked)]
    assert trained.dtype == torch.float32 and trained.requires_grad
    assert trained.tolist() == evaluated


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


def fake_run(policy, rank, world, batch_size, **flags):
    args = loss_args(num_samples_per_epoch=8, seed=7, train_batch_size=batch_size, invalid_rewards="error", reward_timeout=None, **flags)
    accelerator = SimpleNamespace(process_index=rank, num_processes=world, autocast=torch.enable_grad)
    meter = SimpleNamespace(count_images=lambda number: None)
    return SimpleNamespace(args=args, accelerator=accelerator, meter=meter, chunks=Run.chunks, parameters=policy.trainable_parameters())


@functools.cache
def tiny(family) -> Policy:
    policy = Policy(FAMILIES[family].build(), **FAMILIES[family].call)
    policy.add_lora(rank=2)
    torch.manual_seed(1)
    for module in policy.denoisers.values():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.3)
    return policy


REPORT = SimpleNamespace(prompts=[Prompt(f"a cat number {i}") for i in range(5)], reward=brightness)


def test_updates_do_not_depend_on_the_number_of_processes():
    def updates(world):
        found = []
        for rank in range(world):
            run = fake_run(tiny("sd3"), rank, world, batch_size=2, gradient_accumulation_steps=2)
            Run.batches(run, 8)
            for number, update in enumerate(updates_of_epoch(run, tiny("sd3"), REPORT, 3)):
                samples = [pair for batch in update.batches for pair in zip(batch.condition.seeds, batch.condition.prompts)]
                found.append((number, int(torch.randint(10**9, (), generator=update.generator)), update.weight, samples))
        return found

    one, two = updates(1), updates(2)
    assert [u[0] for u in one] == [0, 1] and one[0][1] != one[1][1]
    for number in (0, 1):
        mine = [u for u in two if u[0] == number]
        assert {u[1] for u in mine} == {one[number][1]} and {u[2] for u in mine} == {one[number][2]} == {1 / 4}
        assert sorted(pair for u in mine for pair in u[3]) == sorted(one[number][3])


@pytest.mark.parametrize("truncation", [2, 4])
def test_the_adjoint_gives_the_same_gradient(truncation):
    policy, run = tiny("sd3"), fake_run(tiny("sd3"), 0, 1, 2, gradient_accumulation_steps=1)
    Run.batches(run, 8)
    update = next(updates_of_epoch(run, policy, REPORT, 0))
    batch = update.batches[0]
    rollout = differentiable_rollout(policy, batch.condition, grad_steps=range(4 - truncation, 4))
    expected = torch.autograd.grad(-batch.reward(rollout.images).sum() * update.weight, run.parameters)
    rewards, mismatch = adjoint_backward(run, policy, batch, truncation, update.weight)
    assert mismatch < 1e-5
    torch.testing.assert_close(rewards, batch.reward(rollout.images).detach())
    for parameter, gradient in zip(run.parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()) + 1e-12)
        parameter.grad = None


def conditioned(policy):
    return policy.condition(["a cat", "a dog"], seeds=[1, 2])


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_the_distance_to_the_reference(family):
    """The policy's own KL where there is noise, the squared difference of outputs where there is none."""
    policy = tiny(family)
    stochastic = differentiable_rollout(policy, conditioned(policy), grad_steps=[1, 2], stochastic=True, decode=False)
    trajectory = policy.rollout(conditioned(policy))
    new = policy.transitions(trajectory, [1, 2])
    with policy.reference():
        old = policy.transitions(trajectory, [1, 2])
        own = differentiable_rollout(policy, conditioned(policy), grad_steps=[1], decode=False)
        assert distance_to_reference(policy, own).abs().max() == 0
    kl = distance_to_reference(policy, stochastic)
    expected = sum(new[k].kl(old[k]) for k in (1, 2)) / 2 / trajectory.final[0].numel()
    torch.testing.assert_close(kl.detach(), expected.to(kl), rtol=1e-3, atol=0)
    silent = differentiable_rollout(policy, conditioned(policy), grad_steps=[1], decode=False)
    assert (distance_to_reference(policy, silent) > 0).all()
    logged = {"kl": []}
    total = total_loss(policy, stochastic, torch.ones(2), loss_args(kl_weight=2.0), logged)
    torch.testing.assert_close(total, 1 + 2 * kl)
    assert logged["kl"] == [pytest.approx(kl.mean().item())]


@pytest.mark.parametrize("family, stochastic", [("sd15", False), ("sd15", True), ("sd3", False)])
def test_the_distance_has_its_whole_gradient(family, stochastic):
    """Over several steps, against a finite difference: each state depends on the weights, and both models on the state."""
    policy = tiny.__wrapped__(family)
    policy.pipeline.to(torch.float64)
    parameters = policy.trainable_parameters()

    def distance():
        rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=range(4), stochastic=stochastic, decode=False)
        return distance_to_reference(policy, rollout).sum()

    found = torch.autograd.grad(distance(), parameters, allow_unused=True)
    norm = sum(g.square().sum() for g in found if g is not None).sqrt()
    sides = []
    for epsilon in (1e-4, -2e-4):
        for parameter, g in zip(parameters, found):
            parameter.data += 0 if g is None else epsilon * g / norm
        sides.append(distance().item())
    assert (sides[0] - sides[1]) / 2e-4 == pytest.approx(float(norm), rel=1e-3)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_renoised_images_are_those_of_the_last_step(family, monkeypatch):
    """Noised by what the last step denoised, a sample is its own image."""
    policy = tiny(family)
    rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[3], stop_step=3)
    forward, t = ForwardProcess(policy.scheduler), torch.full((2,), rollout.timesteps[3])
    alpha, sigma = (level(t).reshape(-1, 1, 1, 1) for level in (forward.alpha, forward.sigma))
    other = next(renoised.renoised_images(policy, rollout, 1))
    monkeypatch.setattr(renoised, "drawn_noise", lambda rollout, name: (rollout.states[3] - alpha * rollout.latents.detach()) / sigma)
    images = next(renoised.renoised_images(policy, rollout, 1))
    torch.testing.assert_close(images, rollout.images, rtol=0, atol=1e-3)
    assert not torch.allclose(other, images, atol=1e-2) and other.requires_grad


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_perfect_model_is_aligned(family, monkeypatch):
    """It gives the sample back on both branches."""
    policy = tiny(family)
    rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[])
    steps = renoised.alignable_steps(policy, rollout)
    assert steps == ([1, 2, 3] if family == "sd15" else [2, 3])
    forward, noise = ForwardProcess(policy.scheduler), renoised.drawn_noise(rollout, "aligned")
    denoised, inverted = renoised.aligned_images(policy, rollout, 3)
    assert not torch.allclose(denoised, rollout.images, atol=1e-2) and not torch.equal(denoised, inverted)
    monkeypatch.setattr(policy, "predict", lambda x, t, condition, guidance: forward.target(rollout.latents, noise, t))
    for images in renoised.aligned_images(policy, rollout, 3):
        torch.testing.assert_close(images, rollout.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_solvers_between_the_rows_of_the_noise_table_are_renoised_at_rows(solver):
    pipeline = FAMILIES["sd15"].build()
    pipeline.scheduler = getattr(diffusers, solver).from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    policy = Policy(pipeline, **{**FAMILIES["sd15"].call, "num_inference_steps": 5})
    policy.add_lora(rank=2)
    rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[], decode=False)
    assert any(t != round(t) for t in rollout.timesteps)
    assert renoised.noising_times(policy, rollout).tolist() == [999, 749, 500, 250, 0]
    for k in renoised.alignable_steps(policy, rollout):
        assert all(images.requires_grad for images in renoised.aligned_images(policy, rollout, k))
    assert next(renoised.renoised_images(policy, rollout, 1)).requires_grad


@pytest.mark.parametrize("images_of", [renoised.renoised_images, renoised.aligned_images])
def test_renoised_samples_are_recomputed_on_the_way_back_or_not(images_of):
    """To the same gradient."""
    policy, calls, gradients = tiny("sd3"), [], []
    rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[], decode=False)
    modules = {policy.pipeline.transformer.pos_embed, policy.pipeline.vae.decoder}
    handles = [module.register_forward_pre_hook(lambda module, _: calls.append(module)) for module in modules]
    for again in (False, True):
        images = list(images_of(policy, rollout, 2, checkpoint=again, decode_checkpoint=again))
        calls.clear()
        found = torch.autograd.grad(sum(image.sum() for image in images), policy.trainable_parameters(), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
        assert set(calls) == (modules if again else set())
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(*gradients)


def test_relative_rewards_read_the_words():
    def lengths(images, prompts, **columns):
        return images.flatten(1).mean(1) * 0 + torch.tensor([float(len(prompt)) for prompt in prompts])

    asked = [Prompt("cat"), Prompt("mouse")]
    said = []
    run = SimpleNamespace(explain_once=said.append)
    found = renoised.relative_rewards(run, Batch(None, asked, BoundReward(lengths, asked)), torch.zeros(2, 3, 4, 4), ("red", "a"), 0.5)
    assert found.tolist() == [1.5 * 7 - 5, 1.5 * 9 - 7]
    assert not said
    renoised.relative_rewards(run, Batch(None, asked, BoundReward(brightness, asked)), torch.ones(2, 3, 4, 4), ("red", "a"), 0.5)
    assert len(said) == 1 and "the same under 'red' and 'a'" in said[0]


def test_the_clip_follows_the_norms(monkeypatch):
    norms, limits = iter([1.0, 3.0, float("inf"), 2.0, 10.0]), []
    run = SimpleNamespace(
        args=argparse.Namespace(max_grad_norm=5.0, grad_clip_quantile=0.5),
        register=lambda name, it: None,
        optimizer_step=lambda limit: limits.append(limit) or next(norms),
    )
    monkeypatch.setattr(epoch_log, "MIN_NORMS", 2)
    clip = epoch_log.GradientClip(run)
    for _ in range(5):
        clip.step()
    assert limits == [5.0, 5.0, 2.0, 2.0, 2.0]
    again = epoch_log.GradientClip(run)
    again.load_state_dict(clip.state_dict())
    assert again.limit == clip.limit == 2.5
    run.args.grad_clip_quantile = None
    assert clip.limit == 5.0


def test_frames_are_counted():
    assert count_frames(tiny("wan"), Prompt("a cat")) == 5
    assert count_frames(tiny("sd3"), Prompt("a cat")) is None
