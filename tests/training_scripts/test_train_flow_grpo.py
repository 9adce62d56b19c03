"""`train_flow_grpo.py`: the variants' runs, their defaults, windows and clips."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moved_policy import gradient, step
from safetensors.torch import load_file

from diffusers_align import DDIMSDEScheduler, FlowMatchSDEScheduler
from diffusers_align.rl import ratio_diagnostics
from diffusers_align.training.online.policy_gradient import ReplayedStep, policy_gradient_epoch
from diffusers_align.training.online.trained_steps import trained_steps
from diffusers_align.trajectory import Condition, Trajectory

ROOT = Path(__file__).parents[2]


# --- what they share ---------------------------------------------------------------------------------------------------


def test_cps_comes_with_its_own_penalty(tmp_path):
    free = {name: value for name, value in TINY.items() if name != "kl_weight"}
    parse = lambda **flags: script().parse_args([w for n, v in {**free, "output_dir": tmp_path, **flags}.items() for w in (f"--{n}", str(v))])  # noqa: E731
    args = parse(sde_type="cps", loss="flow_cps")
    assert (args.kl_form, args.kl_weight) == ("mean_squared", 0.01)
    assert parse(sde_type="cps", kl_form="gaussian", kl_weight=0.1).kl_form == "gaussian"
    args = parse()
    assert (args.kl_form, args.kl_weight) == ("official", 0.04)
    recipe = str(ROOT / "training_scripts" / "recipes" / "flow_grpo_cps_sd35.yaml")
    args = script().parse_args(["--config", recipe])
    assert (args.noise_level, args.clip_range, args.kl_form, args.kl_weight, args.sde_window_size) == (0.7, 1e-4, "mean_squared", 0.01, None)


# --- runs --------------------------------------------------------------------------------------------------------------


TINY = {
    "pretrained_model_name_or_path": "mini-sd3", "prompts": "simple_animals", "reward": "jpeg_compressibility", "call_kwargs": '{"max_sequence_length": 1}',
    "num_inference_steps": 5, "guidance_scale": 1.0, "num_prompts_per_epoch": 2, "group_size": 4, "train_batch_size": 4, "rank": 4, "num_epochs": 2,
    "learning_rate": 3e-3, "num_eval_samples": 4, "num_validation_images": 4, "checkpointing_epochs": 2, "kl_weight": 0,
}  # fmt: skip
VARIANTS = {
    "dance": {
        "sde_type": "dance_grpo",
        "noise_level": 0.3,
        "same_latent": True,
        "std_ddof": 1,
        "best_of_n": 2,
        "random_timestep_fraction": 0.5,
    },
    "mix": {"sde_window_size": 2, "sde_window": "0 4", "sde_window_strategy": "progressive", "sde_window_interval": 1},
    "mix of diffusion": {
        **{"pretrained_model_name_or_path": "mini-sd", "call_kwargs": "{}", "eta": 1.0},
        **{"sde_window_size": 2, "sde_window": "0 4", "sde_window_strategy": "progressive", "sde_window_interval": 1},
    },
    "guard": {"loss": "grpo_guard", "kl_weight": 0.01},
    "shared": {"kl_weight": 0.01, "kl_share": 0.5},
    "cps": {"sde_type": "cps", "noise_level": 0.8, "loss": "flow_cps", "reward": "jpeg_compressibility*1+background_color*1", "multi_reward": "gdpo"},
}
TRAINED = {"dance": 2, "mix": 2, "mix of diffusion": 2, "guard": 4, "shared": 4, "cps": 4}


def script():
    spec = importlib.util.spec_from_file_location("train_flow_grpo", ROOT / "training_scripts" / "train_flow_grpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(out, **flags):
    words = []
    for name, value in {**TINY, "output_dir": out, **flags}.items():
        words += [f"--{name}"] if value is True else [f"--{name}", *(str(value).split() if name == "sde_window" else [str(value)])]
    return words


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_each_variant(variant, tmp_path, monkeypatch):
    from diffusers_align.policy import Policy

    replayed, replay = [], Policy.replay
    monkeypatch.setattr(
        Policy,
        "replay",
        lambda self, trajectory, on_step, steps=None, *others, **named: (replayed.append(steps), replay(self, trajectory, on_step, steps, *others, **named)),
    )
    flags = dict(VARIANTS[variant])
    if variant == "cps":  # background_color has a column of its own
        flags["prompts"] = "likes_blue_train"
    script().main(command(tmp_path, **flags))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["ratio_error"] for row in rows] == [0.0, 0.0], "the replay is the rollout, bit for bit"
    held = replayed[::2] if variant == "shared" else []
    trained = replayed[1::2] if variant == "shared" else replayed
    assert all(len(steps) == TRAINED[variant] and 4 not in steps for steps in trained), "the last step is not trained"
    assert all(len(steps) == 2 and 4 not in steps for steps in held), "half of the steps are held to the pretrained model"
    # Two epochs of two batches, with the pass of the pretrained model where there is a KL: the means that GRPO-Guard needs are the roll-out's own.
    assert len(replayed) == (8 if variant in ("guard", "shared") else 4)
    if variant.startswith("mix"):
        assert {tuple(steps) for steps in replayed} == {(0, 1), (1, 2)}
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name or "lora.up" in name)


def test_a_diffusion_model_is_trained_with_the_noise_of_its_own_kind(tmp_path, capfd):
    """The steps have no lengths: the exact KL is the penalty, and what is said of it holds no NaN."""
    flags = {"pretrained_model_name_or_path": "mini-sd", "call_kwargs": "{}", "eta": 1.0, "kl_weight": 0.01}
    script().main(command(tmp_path, **flags))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["ratio_error"] for row in rows] == [0.0] * len(rows) and all(row["grad_norm"] > 0 for row in rows)
    assert rows[0]["kl"] < rows[-1]["kl"], "the first epoch begins at the pretrained model"
    said = "".join(capfd.readouterr())
    assert "kl_weight 0.01 weighs the exact Gaussian KL of each step" in said and "nan" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"loss": "flow_cps"}, "scales the ratio of --sde_type cps"),
        ({"best_of_n": 3}, "must be even"),
        ({"best_of_n": 6}, "at most --group_size 4"),
        ({"sde_window_size": 3, "sde_window": "1 3"}, "has no room for a window"),
        ({"sde_window_size": 1, "sde_window": "-2 2"}, "2 values, each a whole number from 0 to 1000, got -2 2"),
        ({"sde_window_size": 0}, "--sde_window_size must be a whole number from 1 to 1000, got 0"),
        ({"sde_window_size": 1, "sde_window_interval": 0}, "--sde_window_interval must be a whole number from 1 to 1e9, got 0"),
        ({"sde_window_size": 1, "sde_window_interval": 2}, "no effect without --sde_window_strategy progressive or exp_decay"),
        ({"sde_window": "3 5"}, "the steps that are trained, 0 to 3: end it at 4"),
        ({"sde_window": "2 6"}, "--sde_window 2 6 must be a first step and a later end within the 5 solver steps"),
        ({"eta": 1.0, "noise_level": 0.5}, "--eta is the noise of diffusion, --noise_level that of flow matching"),
        ({"eta": 1.0, "loss": "grpo_guard"}, "go by the lengths of flow matching's steps"),
        ({"eta": 1.0, "kl_form": "official", "kl_weight": 0.1}, "go by the lengths of flow matching's steps"),
        ({"sde_type": "cps", "noise_level": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"sde_window_size": 1, "sde_window": "3 5"}, "the steps that are trained, 0 to 3: end it at 4"),
        ({"sde_window_size": 1, "sde_window": "3 5", "timestep_fraction": 1.0}, "0 to 3: end it at 4"),
        ({"sde_window_size": 1, "sde_window": "3 5", "random_timestep_fraction": 0.5}, "0 to 3: end it at 4"),
        ({"sde_window_size": 2, "sde_window": "0 3", "timestep_fraction": 0.4}, "0 to 1: end it at 2"),
        ({"timestep_fraction": 0.0}, "a number above 0 and at most 1, got 0.0"),
        ({"timestep_fraction": 1.5}, "a number above 0 and at most 1, got 1.5"),
    ],
)
def test_combinations_that_make_no_sense(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script().parse_args(command(tmp_path, **flags))
    assert message in capsys.readouterr().err


def rolled_out(scheduler):
    """A trajectory with the scheduler's steps, of one sample of one number."""
    steps, path = len(scheduler.timesteps), torch.zeros(1, len(scheduler.timesteps), 1)
    sigmas = getattr(scheduler, "sigmas", torch.full((steps + 1,), math.nan))  # diffusion has none
    return Trajectory(path, path, scheduler.timesteps, sigmas[:steps], scheduler.stochastic_steps, path[..., 0].double(), Condition(["a fox"]))


@pytest.mark.parametrize("strategy", ["random", "progressive", "exp_decay"])
@pytest.mark.parametrize("sde_type", ["flow_grpo", "dance_grpo", "cps", "memoryless", "memoryless_em", None])
def test_every_window_of_a_run_has_noise_at_each_of_its_steps(sde_type, strategy, tmp_path):
    """The widest range that the script takes, over the epochs of two rounds."""
    noise = {"eta": 1.0} if sde_type is None else {"sde_type": sde_type}
    flags = {**noise, "sde_window_size": 2, "sde_window": "0 4", "sde_window_strategy": strategy}
    flags |= {} if strategy == "random" else {"sde_window_interval": 2}
    args, module = script().parse_args(command(tmp_path, timestep_fraction=1.0, **flags)), script()
    scheduler = DDIMSDEScheduler(timestep_spacing="trailing") if sde_type is None else FlowMatchSDEScheduler(shift=3.0, sde_type=sde_type, noise_level=0.7)
    policy = SimpleNamespace(scheduler=scheduler)
    windows = set()
    for epoch in range(12):
        module.place_window(policy, args, epoch)
        policy.scheduler.set_timesteps(args.num_inference_steps)
        steps = trained_steps(rolled_out(policy.scheduler), args.timestep_fraction, args.random_timestep_fraction, f"{args.seed}/{epoch}/steps")
        assert steps == list(range(*policy.scheduler.config.sde_window))
        windows.add(tuple(steps))
    assert windows == {(0, 1), (1, 2), (2, 3)}


@pytest.mark.parametrize(("clip_range", "log_ratio", "said"), [(1e-4, None, "1.108"), ((1e-4, 2e-4), None, "1.227"), (1e-4, lambda step: None, "")])
def test_the_clip_is_explained_where_one_number_says_it(clip_range, log_ratio, said):
    """A scaled ratio's clip leaves each step another share of the true ratio: no one number."""
    lines, final = [], torch.zeros(1, 1024)
    args = SimpleNamespace(replay_steps_per_forward=1, unconditional_gradient=True)
    division = SimpleNamespace(batches_a_step=1)
    run = SimpleNamespace(args=args, explain_once=lambda *texts: lines.extend(texts), division=division, chunks=lambda *_: [], epoch_metrics=lambda *_: {})
    samples = SimpleNamespace(batches=[SimpleNamespace(final=final)], kernels=[])
    policy = SimpleNamespace(scheduler=SimpleNamespace(config={}))
    policy_gradient_epoch(run, policy, samples, [0], None, clip_range=clip_range, log_ratio=log_ratio)
    assert len(lines) == bool(said) and all(said in line for line in lines), "(1 + c)^1024"


def test_each_loss_comes_with_its_published_clip_range(tmp_path):
    for loss, clip_range in (("flow_grpo", 1e-4), ("grpo_guard", 2e-6)):
        assert script().parse_args(command(tmp_path, loss=loss)).clip_range == clip_range
    assert script().parse_args(command(tmp_path, loss="flow_cps", sde_type="cps")).clip_range == 1e-5
    assert script().parse_args(command(tmp_path, clip_range=0.5)).clip_range == 0.5


@pytest.mark.parametrize(("loss", "sde_type"), [("flow_grpo", "flow_grpo"), ("grpo_guard", "flow_grpo"), ("flow_cps", "cps")])
def test_a_wider_clip_above_one_leaves_gains_their_gradient(loss, sde_type, tmp_path):
    """A ratio above 1 + clip_range with a positive advantage: cut at equal ranges, alive at a wider one; below 1 nothing changes."""
    module, (new, old, action) = script(), step()
    ratios, gradients = {}, {}
    for name, flags in (("equal", {}), ("wide", {"clip_range_high": 10.0})):
        args = module.parse_args(command(tmp_path, loss=loss, sde_type=sde_type, clip_range=1e-6, **flags))
        replayed = ReplayedStep(0, new, action, new.log_prob(action), old.log_prob(action), torch.arange(6), 0, 0.1, old)
        value, log_ratio = module.loss(args, torch.ones(6, dtype=torch.float64), replayed), module.log_ratio(args, replayed)
        numbers = ratio_diagnostics(log_ratio, torch.zeros_like(log_ratio), (args.clip_range, args.clip_range_high))
        gradients[name] = gradient(value, new.mean).flatten(1).norm(dim=1)
        ratios[name] = (numbers["clip_low"], numbers["clip_high"])
    assert ratios["equal"][1] > 0 and ratios["wide"][1] == 0 and ratios["equal"][0] == ratios["wide"][0]
    assert (gradients["wide"] > 0).all()
    assert (gradients["equal"] == 0).double().mean() == ratios["equal"][1]
    with pytest.raises(SystemExit):
        module.parse_args(command(tmp_path, clip_range_high=0.0))


def test_kernels_and_windows_come_with_their_published_defaults(tmp_path):
    def parsed(**flags):
        tiny = {name: value for name, value in TINY.items() if name != "kl_weight"}
        words = [w for n, v in {**tiny, "output_dir": tmp_path, **flags}.items() for w in (f"--{n}", str(v))]
        return script().parse_args(words)

    assert (parsed().noise_level, parsed().kl_weight, parsed().loss) == (0.7, 0.04, "flow_grpo")
    assert parsed(sde_type="dance_grpo").noise_level == 0.3
    assert (parsed(sde_type="cps").noise_level, parsed(sde_type="cps").loss) == (0.8, "flow_cps")
    assert parsed(sde_window_size=2).kl_weight == 0.0 and parsed(loss="grpo_guard").kl_weight == 0.0
    assert parsed(sde_window_size=2, kl_weight=0.1).kl_weight == 0.1


# --- trained steps ------------------------------------------------------------------------------------------------------


def test_the_trained_steps_are_one_rule():
    scheduler = FlowMatchSDEScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    trajectory = rolled_out(scheduler)
    noisy = trajectory.noisy_steps
    assert trained_steps(trajectory) == noisy and trained_steps(trajectory, 0.99) == [k for k in noisy if k < 9]
    assert trained_steps(trajectory, 0.01) == [0], "at least one"
    drawn = [trained_steps(trajectory, 0.99, 0.6, f"7/{epoch}/steps") for epoch in range(40)]
    assert {len(steps) for steps in drawn} == {round(0.6 * 9)} and all(steps == sorted(set(steps)) for steps in drawn)
    assert {k for steps in drawn for k in steps} == set(range(9)) and drawn[0] == trained_steps(trajectory, 0.99, 0.6, "7/0/steps") != drawn[1]
    assert len(trained_steps(trajectory, 1.0, 0.01)) == 1


def test_the_lengths_of_steps_are_the_trajectorys_own():
    for inverted in (False, True):
        scheduler = FlowMatchSDEScheduler(shift=3.0, invert_sigmas=inverted)
        scheduler.set_timesteps(5)
        trajectory = rolled_out(scheduler)
        lengths = scheduler.sigmas.diff().abs().tolist()
        scheduler.set_timesteps(7)  # a later call, of an evaluation
        assert trajectory.step_sizes == lengths
    nowhere = torch.full((5,), torch.nan)
    assert all(
        math.isnan(length) for length in Trajectory(*[torch.zeros(1, 5, 1)] * 2, nowhere, nowhere, nowhere > 0, torch.zeros(1, 5), Condition(["a"])).step_sizes
    )


def test_old_flags_are_read_as_todays(tmp_path, capsys):
    old = ["--random_timesteps", "--timestep_fraction", "0.6", "--sde_window_range", "0", "3", "--sde_window_size", "2", "--kl_beta", "0.2"]
    words = command(tmp_path)
    words[words.index("--kl_weight") : words.index("--kl_weight") + 2] = []
    args = script().parse_args([*words, *old])
    assert (args.timestep_fraction, args.random_timestep_fraction, args.sde_window, args.kl_weight) == (0.99, 0.6, (0, 3), 0.2)
    assert "--random_timesteps" in (said := capsys.readouterr().err) and "--kl_weight" in said
