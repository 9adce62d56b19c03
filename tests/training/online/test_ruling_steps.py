"""Steps that rule a policy gradient: found on real schedules, named as the flags count them, and said by each script that learns from log-probabilities."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from schedules import SD
from script_tools import load_script

from diffusers_align import sde_twin
from diffusers_align.training.online.ruling_steps import describe_ruling_steps, ruling_steps, sensitivities

TRAILING = DDIMScheduler(**{**SD, "timestep_spacing": "trailing", "steps_offset": 0})
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


def walked(stock, number=6, taken=None, **noise):
    """A twin on a schedule of so many steps, and what a call that takes the last `taken` of them leaves."""
    scheduler = sde_twin(stock, **noise)
    scheduler.set_timesteps(number)
    times, stochastic = (x[number - (taken or number) :] for x in (scheduler.timesteps, scheduler.stochastic_steps))
    noisy = stochastic.nonzero().flatten().tolist()
    return scheduler, SimpleNamespace(timesteps=times.float(), stochastic=stochastic, num_steps=len(times), final=torch.zeros(2, 4, 8, 8)), noisy


def said(*args, **options):
    return " ".join(describe_ruling_steps(*walked(*args, **options)))


def test_sensitivities_are_those_of_the_log_probability():
    """|d log p / d output| at an action one standard deviation away is J / s in each dimension."""
    for stock in (TRAILING, FLOW):
        scheduler, trajectory, noisy = walked(stock)
        for k, found in sensitivities(scheduler, trajectory, noisy).items():
            x, output = torch.randn(1, 1, 1, 1), torch.randn(1, 1, 1, 1, requires_grad=True)
            transition = scheduler.transition(output, trajectory.timesteps[k], x)
            action = transition.mean.detach() + transition.std
            (gradient,) = torch.autograd.grad(transition.log_prob(action).sum(), output)
            assert abs(float(gradient)) == pytest.approx(found, rel=1e-2)


@pytest.mark.parametrize(
    "found, ruling",
    [
        ({0: 2.2, 1: 1.8, 2: 1.5, 3: 16.0}, [3]),
        ({0: 1.0, 1: 9.0, 2: 60.0, 3: 1.5}, [1, 2]),
        ({0: 0.1, 1: 1.0, 2: 1.0}, []),  # one that is silent
        ({0: 1.0, 1: 20.0, 2: 1.0}, [1]),
        ({0: 1.0, 1: 2.0, 2: 4.9}, []),
        ({3: 5.0}, []),
        ({}, []),
    ],
)
def test_steps_with_a_gap_to_all_others_rule(found, ruling):
    assert ruling_steps(found) == ruling


def test_the_window_that_leaves_them_out_is_said():
    assert "Solver step 5 of 0 to 5:" in said(TRAILING) and "It rules the gradient. --sde_window 0 5 leaves it" in said(TRAILING)
    assert "--sde_window 2 5 leaves it" in said(TRAILING, sde_window=(2, 6)), "where the noise begins is kept"
    assert "Solver step 5 of 0 to 5:" in said(TRAILING, taken=3) and "--sde_window 3 5" in said(TRAILING, taken=3), "a call of strength 0.5"
    leading = DDIMScheduler(**SD)
    assert "Solver step 4 of 0 to 5:" in said(leading) and "--sde_window 0 4" in said(leading), "the last but one"
    assert "Solver step 8 of 0 to 9:" in said(FLOW, 10, sde_type="cps", noise_level=0.8)


@pytest.mark.parametrize(
    "stock, number, noise",
    [
        (TRAILING, 6, {"sde_window": (0, 5)}),
        (TRAILING, 6, {"eta": 0.0}),
        (TRAILING, 6, {"sde_window": (5, 6)}),
        (TRAILING, 50, {}),
        (FLOW, 6, {}),  # its last noise is as small, and its last move as well
        (FLOW, 28, {}),
        (EulerDiscreteScheduler(use_karras_sigmas=True), 6, {}),
        (LCMScheduler(), 4, {}),  # noise of its own: no window
    ],
)
def test_nothing_is_said_of_even_steps_or_where_there_is_nothing_to_do(stock, number, noise):
    assert not said(stock, number, **noise)


def test_another_schedule_than_the_trajectorys_says_nothing():
    scheduler, trajectory, noisy = walked(TRAILING)
    scheduler.set_timesteps(7)
    assert describe_ruling_steps(scheduler, trajectory, noisy) == []


TINY = {
    **{"pretrained_model_name_or_path": "mini-sd", "prompts": "simple_animals", "reward": "jpeg_compressibility", "num_inference_steps": 6},
    **{"guidance_scale": 1.0, "train_batch_size": 2, "num_epochs": 1, "num_eval_samples": 2, "num_validation_images": 2},
}
SCRIPTS = {
    "ddpo": ("ddpo", {"num_samples_per_epoch": 4}),
    "trpo": ("ddpo", {"num_samples_per_epoch": 4, "update": "trpo", "cg_iterations": 1}),
    "d3po": ("d3po", {"num_prompts_per_epoch": 1, "group_size": 2}),
    "spo": ("spo", {"num_samples_per_epoch": 2, "num_candidates": 2, "threshold": 0.0, "divert_start_step": 0}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_says_it_and_a_window_leaves_the_step_out(name, tmp_path, capsys):
    script, flags = SCRIPTS[name]
    for window, expected in ((None, 1), ("0 5", 0)):
        given = {**TINY, **flags, "output_dir": tmp_path / f"{window}", "eta": 1.0}
        words = [word for flag, value in given.items() for word in (f"--{flag}", str(value))]
        load_script(script).main([*words, *(["--sde_window", *window.split()] if window else [])])
        assert capsys.readouterr().out.count("Solver step 5 of 0 to 5:") == expected
