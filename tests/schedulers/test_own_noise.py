"""Twins of schedulers that draw from a Gaussian themselves: the stock samples bit for bit, and the density of the draw."""

import copy

import pytest
import torch
from own_noise import ROWS, generator, walked
from schedules import randn
from torch.distributions import Normal

from diffusers_align import sde_twin


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.mark.parametrize("deterministic", [False, True])
def test_samples_are_the_stock_schedulers_bit_for_bit(row, deterministic):
    stock, twin = row.pair()
    if deterministic and row.name == "TCDScheduler":
        row = type(row)(row.name, row.config, row.steps, stock={"eta": 0.0})
    twin.deterministic = deterministic
    theirs, mine = walked(row, stock, generator()), walked(row, twin, generator())
    assert len(theirs) == len(mine) == row.steps
    for k, (a, b) in enumerate(zip(theirs, mine)):
        assert torch.equal(a.prev_sample, b.prev_sample), f"step {k}"


def test_a_log_probability_is_the_density_of_the_draw(row):
    _, twin = row.pair()
    for output in walked(row, twin, generator()):
        if output.log_prob is not None:
            normal = Normal(output.prev_sample_mean.double(), output.std.double().expand_as(output.prev_sample_mean))
            torch.testing.assert_close(output.log_prob, normal.log_prob(output.prev_sample.double()).flatten(1).sum(1), rtol=1e-5, atol=1e-3)


def test_the_draw_has_the_mean_and_the_std_that_it_says(row):
    """From other noise: what remains of it after taking away the mean is std times that noise, whatever the mean."""
    _, twin = row.pair()
    steps, draws = walked(row, twin, generator(1)), []
    for seed in range(300):
        _, again = row.pair()
        draws.append(walked(row, again, generator(seed))[0].prev_sample)
    if steps[0].log_prob is None:
        assert all(torch.equal(draws[0], other) for other in draws)
        return
    deviation = (torch.stack(draws) - steps[0].prev_sample_mean) / steps[0].std
    assert abs(float(deviation.mean())) < 0.02 and abs(float(deviation.std()) - 1) < 0.02


def test_clean_samples_are_of_each_samples_own_time(row):
    _, twin = row.pair()
    times, states = twin.timesteps[: max(2, row.steps)][[0, -1]], randn(1)[:2]
    outputs = row.output(0, states)
    own = [twin.clean_sample(outputs[i : i + 1], t, states[i : i + 1]) for i, t in enumerate(times)]
    torch.testing.assert_close(twin.clean_sample(outputs, times, states), torch.cat(own), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(twin.clean_sample(outputs[:1], times[0].item(), states[:1]), own[0], rtol=1e-6, atol=1e-6)


def test_only_steps_with_noise_have_a_log_probability_and_the_last_has_none(row):
    _, twin = row.pair()
    expected = twin.stochastic_steps.tolist()
    assert [o.log_prob is not None for o in walked(row, twin, generator())] == expected
    assert expected == [True] * (row.steps - 1) + [False]
    twin.deterministic = True
    assert not twin.stochastic_steps.any()


def test_deterministic_steps_have_no_log_probability_and_their_noise_is_fixed_by_the_generator(row):
    walks = []
    for seed in (7, 7, 8):
        twin = row.pair()[1]
        twin.deterministic = True
        walks.append(walked(row, twin, generator(seed)))
    assert all(o.log_prob is None and float(o.std.max()) == 0 for walk in walks for o in walk)
    assert torch.equal(walks[0][-1].prev_sample, walks[1][-1].prev_sample)
    draws = row.steps > 1 and row.name != "TCDScheduler"
    assert torch.equal(walks[0][-1].prev_sample, walks[2][-1].prev_sample) != draws


def test_given_states_are_scored_as_they_were_drawn(row):
    first = walked(row, row.pair()[1], generator())
    again = walked(row, row.pair()[1], None, given=[o.prev_sample for o in first])
    for a, b in zip(first, again):
        assert torch.equal(a.prev_sample, b.prev_sample)
        assert a.log_prob is None and b.log_prob is None or torch.equal(a.log_prob, b.log_prob)


def test_transition_and_step_agree(row):
    _, twin = row.pair()
    steps, state = walked(row, twin, generator()), randn(0)
    for k, output in enumerate(steps):
        for t in (twin.timesteps[k], float(twin.timesteps[k])):  # as a schedule has it, as a trajectory has it
            kernel = twin.transition(row.output(k, state), t, state)
            if output.log_prob is not None:
                assert torch.equal(kernel.mean, output.prev_sample_mean) and torch.equal(kernel.std, output.std)
            else:
                assert not kernel.std.any()
                torch.testing.assert_close(kernel.mean, output.prev_sample)
        state = output.prev_sample


def test_other_times_are_refused(row):
    if row.name == "DDPMWuerstchenScheduler":
        pytest.skip("the nearest is taken, as in the stock scheduler: pipelines round its times")
    _, twin = row.pair()
    with pytest.raises(ValueError, match="is not one of the scheduler's"):
        twin.transition(row.output(0, randn(0)), -12345.0, randn(0))


def test_skipped_steps_count(row):
    _, twin = row.pair()
    times, last = row.times(twin), row.steps - 1
    for t in times[:-1]:
        twin.skip_step(t)
    full = walked(row, row.pair()[1], generator())
    state = full[-2].prev_sample if row.steps > 1 else randn(0)
    output = twin.step(row.output(last, state), times[-1], state, generator=generator(), **row.call(twin, last))
    torch.testing.assert_close(output.prev_sample, full[-1].prev_sample, rtol=0, atol=1e-4)


def test_twins_survive_saving_and_copying(row, tmp_path):
    _, twin = row.pair()
    twin.save_pretrained(tmp_path)
    for other in (type(twin).from_pretrained(tmp_path), sde_twin(twin), copy.deepcopy(twin)):
        assert type(other) is type(twin)
        assert {n: v for n, v in other.config.items() if n[0] != "_"} == {n: v for n, v in twin.config.items() if n[0] != "_"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32_at_the_rounded_state(row, dtype):
    _, twin = row.pair()
    state = randn(0).to(dtype)
    answer = row.output(0, state).to(dtype)
    output = twin.step(answer, row.times(twin)[0], state, generator=generator(), **row.call(twin, 0))
    assert output.prev_sample.dtype == dtype
    if output.log_prob is not None:
        assert output.prev_sample_mean.dtype == output.std.dtype == torch.float32
        kernel = twin.transition(answer, twin.timesteps[0], state)
        assert torch.equal(kernel.log_prob(output.prev_sample), output.log_prob)


def test_the_clean_sample_is_what_the_step_returns_beside_the_state(row):
    _, twin = row.pair()
    state, t = randn(0), row.times(twin)[0]
    clean = twin.clean_sample(row.output(0, state), t, state)
    output = twin.step(row.output(0, state), t, state, generator=generator(), **row.call(twin, 0))
    torch.testing.assert_close(output.pred_original_sample, clean)


@pytest.mark.parametrize("name", ["lcm", "flow lcm", "scm", "cm"])
def test_the_last_state_of_a_consistency_sampler_is_its_clean_sample(name):
    """Pipelines decode what is returned beside the state: a state that is put in its place must be decoded too."""
    last = walked(ROWS[name], ROWS[name].pair()[1], generator())[-1]
    assert last.pred_original_sample is last.prev_sample
