import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from diffusers_align import Policy, embedded
from diffusers_align.data.prompts import Prompt
from diffusers_align.policy import noise_seed
from diffusers_align.training.flags import common, options
from diffusers_align.training.online.sampling import paired_gain, sample_epoch
from diffusers_align.training.run.run import Run

torch.set_num_threads(1)
REQUIRED = ["--pretrained_model_name_or_path", "mini-sd3", "--prompts", "mini_train", "--reward", "jpeg_compressibility"]
SMALL = ["--num_inference_steps", "3", "--guidance_scale", "1", "--call_kwargs", '{"max_sequence_length": 1}', "--rank", "4", "--use_ema"]
PROMPTS = [Prompt("a cat on a red background"), Prompt("two dogs on a blue background"), Prompt("a green apple")]


def parse(*argv, required=REQUIRED):
    return options.parse(common.SamplingArguments, [*required, "--output_dir", "out", *map(str, argv)])


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(parse("--output_dir", tmp_path_factory.mktemp("training") / "run", *SMALL), "Test")
    policy = run.load_policy(noise_level=0.7)
    run.load_optimizer(10)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return run


# --- arguments ---------------------------------------------------------------------------------------------------------


def test_a_recipe_sets_defaults_and_flags_override_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-5\nrank: 7\ncall_kwargs: {num_frames: 9}\n")
    args = parse("--config", recipe, "--rank", 3)
    assert (args.learning_rate, args.rank, args.call_kwargs) == (1e-5, 3, {"num_frames": 9})


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("rnak: 3\n", "unknown keys: rnak in line 1 (did you mean rank?)"),
        ("mixed_precision: fp17\n", "--mixed_precision must be one of no, fp16, bf16, got fp17"),
        (None, "no recipe"),
    ],
)
def test_bad_recipes_are_named(tmp_path, capsys, recipe, message):
    file = tmp_path / "recipe.yaml"
    if recipe:
        file.write_text(recipe)
    with pytest.raises(SystemExit):
        parse("--config", file)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num_epochs", 0], "--num_epochs must be a whole number from 1 to 1e9, got 0"),
        (["--learning_rate", -1], "--learning_rate must be a number above 0 and at most 10, got -1"),
        (["--report_to", "mlflow"], "unknown tracker 'mlflow'"),
        (["--push_to_hub", "--hub_token", "secret", "--report_to", "wandb"], "would be logged"),
        (["--call_kwargs", "[1]"], "must be a JSON object"),
        (["--compile", "--shard_denoiser"], "--compile with --shard_denoiser"),
    ],
)
def test_bad_flags_are_named(capsys, argv, message):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "prompts", "reward"])
def test_missing_flags_are_named(capsys, name):
    position = REQUIRED.index(f"--{name}")
    with pytest.raises(SystemExit):
        parse(required=REQUIRED[:position] + REQUIRED[position + 2 :])
    assert f"--{name} is required" in capsys.readouterr().err


@pytest.mark.parametrize("token", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_the_recorded_command_is_quoted_and_has_no_token(token):
    command = parse("--push_to_hub", *token, "--call_kwargs", '{"a": 1}').command
    assert "secret" not in command and "hub_token" not in command and "'{\"a\": 1}'" in command


@pytest.mark.parametrize("limit, moved", [(0.0, 100.0), (1.0, 1.0)])
def test_a_gradient_is_clipped_at_a_norm_and_not_at_zero(limit, moved):
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.full((1,), 100.0)
    optimizer = torch.optim.SGD([weight], 1.0)
    optimizer.step_was_skipped = False  # accelerate's
    fake = SimpleNamespace(rates=[], args=SimpleNamespace(max_grad_norm=limit), parameters=[weight], accelerator=Accelerator(cpu=True), optimizer=optimizer)
    fake.lr_scheduler, fake.count_update = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), lambda: None
    assert Run.optimizer_step(fake) == 100.0
    assert weight.item() == pytest.approx(-moved, rel=1e-4)


def test_an_output_folder_that_cannot_be_written_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Cannot write to --output_dir .*Choose another folder"):
        common.check_output_dir(str(tmp_path / "file" / "out"))
    assert common.check_output_dir(str(tmp_path / "a" / "b")).is_dir() and not any((tmp_path / "a" / "b").iterdir())


# --- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, step, expected", [(4, 2, [[0, 1], [2, 3]]), (5, 2, [[0, 1], [2, 3], [4]]), (1, 1, [[0]]), (3, 3, [[0, 1, 2]])])
def test_chunks(number, step, expected):
    assert [list(chunk) for chunk in Run.chunks(number, step)] == expected


@pytest.mark.parametrize("accumulation, expected", [(None, (4, 2)), (1, (6, 1)), (3, (4, 2)), (6, (3, 3)), (8, (3, 3))])
def test_batches(accumulation, expected):
    fake = SimpleNamespace(args=parse("--train_batch_size", 2), accelerator=SimpleNamespace(num_processes=2, process_index=1))
    fake.args.gradient_accumulation_steps = accumulation
    assert Run.batches(fake, 12) == expected
    with pytest.raises(ValueError, match="13 samples per epoch .* do not divide into batches of 2. Change --train_batch_size"):
        Run.batches(fake, 13)


def test_loss_weight():
    fake = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2))
    samples = SimpleNamespace(batches=[[0] * 4, [0] * 4, [0] * 2])
    assert Run.loss_weight(fake, samples, range(1, 3), 5) == pytest.approx(1 / (5 * 6 * 2))
    with pytest.raises(ValueError, match="No step with noise is left"):
        Run.loss_weight(fake, samples, range(1), 0)


def test_paired_gain():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=20), rng.normal(size=20)
    gain, error = paired_gain(torch.tensor(before), torch.tensor(after))
    assert gain == pytest.approx((after - before).mean()) and error == pytest.approx((after - before).std(ddof=1) / math.sqrt(20))
    before[3], after[7] = np.nan, np.nan
    kept = np.delete(after - before, [3, 7])
    gain, error = paired_gain(torch.tensor(before), torch.tensor(after))
    assert gain == pytest.approx(kept.mean()) and error == pytest.approx(kept.std(ddof=1) / math.sqrt(18))


# --- sampling and gradients --------------------------------------------------------------------------------------------


def epoch_of(run, batch_size, reward=brightness):
    run.args.train_batch_size = batch_size
    return sample_epoch(run, run.policy, reward, PROMPTS, 1, 2, 2)


def test_the_batch_size_changes_no_sample(run):
    one, two, four = (epoch_of(run, size) for size in (1, 2, 4))
    assert [len(samples.batches) for samples in (one, two, four)] == [4, 2, 1]
    for other in (one, two):
        assert other.prompts == four.prompts and torch.equal(other.groups, four.groups) and torch.equal(torch.cat(other.index), torch.arange(4))
        torch.testing.assert_close(other.rewards, four.rewards, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.cat([b.final for b in other.batches]), four.batches[0].final, rtol=0, atol=1e-3)
    assert four.rewards.unique().numel() == 4


def test_samples_are_keyed_and_shuffled(run):
    samples = epoch_of(run, 4)
    order = [(group, sample) for group in range(2) for sample in range(2)]
    random.Random(f"{run.args.seed}/1/order").shuffle(order)
    assert samples.groups.tolist() == [group for group, _ in order]
    texts = [prompt.text for prompt in PROMPTS]
    seeds = [noise_seed(run.args.seed, 1, group, texts.index(prompt), sample) for (group, sample), prompt in zip(order, samples.prompts)]
    assert samples.batches[0].condition.seeds == seeds


def gradient(policy, parts, weight):
    for parameter in policy.trainable_parameters():
        parameter.grad = None
    for part in parts:
        policy.replay(part, lambda k, transition: (transition.log_prob(part.actions[:, k]).sum() * weight).backward())
    return torch.cat([parameter.grad.flatten() for parameter in policy.trainable_parameters()]).double()


def test_micro_batches_do_not_change_the_gradient():
    """In float64: kernels of different batch sizes differ in the last bits, which float32 would blow up here."""
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"), dtype=torch.float64)
    policy = Policy(pipeline, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=1)
    policy.add_lora(4, init_lora_weights=False)
    pipeline.transformer.double()
    trajectory = policy.rollout([prompt.text for prompt in PROMPTS], seeds=[1, 2, 3])
    whole = gradient(policy, [trajectory], 1e-3)
    parts = gradient(policy, [trajectory.select([0]), trajectory.select(slice(1, 3))], 1e-3)
    assert whole.norm() > 0 and (whole - parts).norm() <= 1e-6 * whole.norm()


def test_metrics_leave_out_masked_samples(run):
    run.args.invalid_rewards = "mask"
    try:
        reward = lambda images, prompts, **columns: brightness(images, prompts).where(torch.arange(len(prompts)) > 0, torch.nan)  # noqa: E731
        samples = epoch_of(run, 4, reward)
    finally:
        run.args.invalid_rewards = "error"
    metrics = samples.metrics()
    assert metrics["invalid_rewards"] == 1 and metrics["reward"] == pytest.approx(float(samples.rewards[1:].mean()))
    assert not any(math.isnan(value) for value in metrics.values())


def test_metrics_take_in_what_any_process_has_logged(monkeypatch):
    """This process saw no undesirable image, the other one no desirable one."""
    theirs = {"ratio_error": [0.5], "clip_fraction": [0.0], "approx_kl": [0.0], "gain_undesirable": [4.0], "loss": [3.0]}
    monkeypatch.setattr("diffusers_align.training.run.metrics.gather_object", lambda own: own + [theirs])
    one = SimpleNamespace(rates=[0.2, 0.0], epoch=0)
    diagnostics = [[{"ratio_error": 0.25, "clip_fraction": 0.5, "approx_kl": 1.0}]]
    metrics = Run.epoch_metrics(one, None, diagnostics, [2.0, math.inf], {"gain_desirable": [1.0, 3.0], "loss": [1.0, 2.0], "none": []})
    expected = {"ratio_error": 0.5, "clip_fraction": 0.25, "approx_kl": 0.5, "gain_desirable": 2.0, "gain_undesirable": 4.0, "loss": 2.0}
    assert metrics == {**expected, "grad_norm": 2.0, "lr": 0.1}


# --- moving average and checkpoints ------------------------------------------------------------------------------------


def test_the_average_is_swapped_in_and_the_live_weights_come_back(run, monkeypatch):
    parameters = run.policy.trainable_parameters()
    live = [parameter.detach().clone() for parameter in parameters]
    monkeypatch.setattr(run.ema, "optimization_step", 0)
    with run.averaged():  # there is no average yet but the untrained weights
        assert all(torch.equal(p, w) for p, w in zip(parameters, live))
    monkeypatch.setattr(run.ema, "optimization_step", 1)
    with pytest.raises(RuntimeError, match="evaluation failed"), run.averaged():
        assert all(torch.equal(p, s) for p, s in zip(parameters, run.ema.shadow_params)) and not torch.equal(parameters[0], live[0])
        raise RuntimeError("evaluation failed")
    assert all(torch.equal(p, before) for p, before in zip(parameters, live))


def test_a_checkpoint_is_complete_or_absent(run, monkeypatch):
    run.args.resume_from_checkpoint = "latest"
    run.epoch = 1
    with monkeypatch.context() as patch:
        patch.setattr(run.policy, "save_lora", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run.checkpoint()
    assert run.checkpoints() == [] and not (run.output_dir / ".checkpoint-1.partial").exists()
    run.resume()
    assert run.epoch == 1, "there was nothing to resume from"

    run.checkpoint()
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1"] and not (run.output_dir / ".checkpoint-1.partial").exists()
    saved = [parameter.detach().clone() for parameter in run.policy.trainable_parameters()]
    averages = [average.clone() for average in run.ema.shadow_params]
    with torch.no_grad():
        for tensor in [*run.policy.trainable_parameters(), *run.ema.shadow_params]:
            tensor.zero_()
    run.epoch, run.optimizer_steps = 9, 9
    run.resume()
    assert run.epoch == 1 and run.optimizer_steps == 0
    assert all(torch.equal(p, s) for p, s in zip(run.policy.trainable_parameters(), saved))
    assert all(torch.equal(p, s) for p, s in zip(run.ema.shadow_params, averages))


def test_the_newest_checkpoints_are_kept_and_a_missing_one_is_named(run):
    run.args.checkpoints_total_limit, run.args.resume_from_checkpoint = 2, "checkpoint-7"
    for run.epoch in (2, 9, 10):
        run.checkpoint()
    assert [path.name for path in run.checkpoints()] == ["checkpoint-9", "checkpoint-10"], "in the order of their numbers"
    with pytest.raises(FileNotFoundError, match="No checkpoint 'checkpoint-7'; .* has checkpoint-9, checkpoint-10"):
        run.resume()


def test_log_writes_the_whole_history(run):
    run.history, run.epoch = [], 0
    run.log({"reward": 1.0})
    run.epoch = 1
    run.log({"reward": torch.tensor(2.0)})
    rows = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"epoch": 0, "reward": 1.0}, {"epoch": 1, "reward": 2.0}]
    assert not list(run.output_dir.glob(".*.partial")) and (run.output_dir / "reward_curve.png").stat().st_size > 1000


def test_the_curve_is_drawn_every_half_minute_and_at_checkpoints(run, monkeypatch):
    drawn, now = [], [100.0]
    monkeypatch.setattr("diffusers_align.training.run.metrics.reward_curve", lambda history, path: drawn.append(len(history)))
    monkeypatch.setattr("diffusers_align.training.run.metrics.time.monotonic", lambda: now[0])
    monkeypatch.setattr(run, "checkpoint", lambda: None)
    run.args.num_epochs, run.args.checkpointing_epochs, run.history, run.curve_drawn = 7, 3, [], None
    run.epoch, run.rows_drawn = 0, 0
    for epoch in run.epochs():
        run.log({"reward": float(epoch)})
        now[0] += 20.0
    # epochs of 20 seconds: at once, 40 seconds later, for the first checkpoint too, 40 seconds after it, for the second too, and at the end
    assert drawn == [1, 3, 6, 7], "of no history twice"


def test_checkpoints_of_an_earlier_run_are_set_aside(run):
    for epoch in (3, 7):
        (run.output_dir / f"checkpoint-{epoch}").mkdir(exist_ok=True)
    (run.output_dir / "checkpoint-best").mkdir(exist_ok=True)
    (run.output_dir / "metrics.jsonl").touch()
    run.args.resume_from_checkpoint = None
    run.resume()
    assert run.checkpoints() == [] and (run.output_dir / ".previous-checkpoint-7").is_dir() and (run.output_dir / "checkpoint-best").is_dir()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_touches_the_weights(run):
    before = [parameter.detach().clone() for parameter in run.parameters]
    for parameter in run.parameters:
        parameter.grad = torch.zeros_like(parameter)
    run.parameters[0].grad.flatten()[0] = torch.nan
    try:
        with pytest.raises(FloatingPointError, match="weights were not touched.*lower the learning rate"):
            run.optimizer_step()
        assert all(torch.equal(parameter, value) for parameter, value in zip(run.parameters, before))
    finally:
        run.optimizer.zero_grad()
