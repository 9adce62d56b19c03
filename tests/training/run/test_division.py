"""An epoch makes the same optimizer steps on any number of processes, or says what it changed."""

from types import SimpleNamespace

import pytest
import torch
from script_tools import load_script, make_run

from diffusers_align.training.offline.pairs_and_batches import Examples
from diffusers_align.training.run.division import Division, divide, division_of
from diffusers_align.training.run.run import Run
from diffusers_align.training.run.sharding import sum_over_processes


def flags(batch_size, accumulation=None, **others):
    return SimpleNamespace(train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **others)


def on_all(args, number, world, steps=2):
    """The divisions of all processes, and what they say."""
    found = [divide(args, number, steps, rank, world) for rank in range(world)]
    assert len({said for _, said in found}) == 1
    return [division for division, _ in found], found[0][1]


def samples_of_steps(divisions):
    """The positions of each optimizer step's samples, from all processes' batches."""
    steps = [[] for _ in range(divisions[0].num_steps)]
    for division in divisions:
        for chunk_number, chunk in enumerate(Run.chunks(len(division.batches), division.batches_a_step)):
            for b in chunk:
                assert division.step_of(b) == chunk_number and 1 <= len(division.batches[b]) <= division.batch_size
                steps[chunk_number] += division.batches[b]
    return [sorted(step) for step in steps]


SIZES = [(24, 12, None), (24, 4, None), (24, 4, 2), (24, 2, 2), (48, 8, 4), (40, 8, 2), (16, 1, 8), (24, 24, None)]


@pytest.mark.parametrize("number, batch_size, accumulation", SIZES)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_steps_are_those_of_one_process(number, batch_size, accumulation, world):
    one, _ = on_all(flags(batch_size, accumulation), number, 1)
    if one[0].step_size % world:
        return
    many, said = on_all(flags(batch_size, accumulation), number, world)
    assert said == "" and samples_of_steps(many) == samples_of_steps(one)
    assert sum(samples_of_steps(one), []) == list(range(number))
    assert len({len(division.batches) for division in many}) == 1, "every process makes the same number of calls"


@pytest.mark.parametrize("batch_size, world", [(3, 4), (6, 4), (12, 4), (4, 2), (8, 3)])
def test_what_is_drawn_for_a_batch_is_that_of_one_process_where_batches_are_parts_of_its_batches(batch_size, world):
    many, _ = on_all(flags(batch_size, 24 // batch_size), 48, world)
    for division in many:
        for b, batch in enumerate(division.batches):
            assert {position // batch_size for position in batch} == {division.block(b)}


def test_a_step_that_does_not_divide_is_changed_and_the_sizes_that_do_are_listed():
    (division, *_), said = on_all(flags(3, 1), 12, 2)
    assert division.step_size == 4 and division.num_steps == 3
    assert "an optimizer step of 3 samples" in said and "Here it has 4, and an epoch 3 steps where one process makes 4" in said
    assert "take --train_batch_size 2 or 4 or 6" in said
    for size in (2, 4, 6):
        assert on_all(flags(size, 1), 12, 2)[1] == ""


@pytest.mark.parametrize(
    "number, batch_size, world, message",
    [
        (15, 4, 1, r"15 samples per epoch \(--num_prompts_per_epoch 3 times --group_size 5\) do not divide into batches of 4.*\(1, 3, 5, 15\)"),
        (15, 7, 1, r"do not divide into batches of 7.*\(1, 3, 5, 15\), or the number of samples to a multiple of 7"),
        (15, 5, 2, r"15 samples per epoch .* do not divide among 2 processes. Take 14 or 16 samples, or another number of processes \(1, 3, 5, 15\)"),
        (3, 1, 8, r"do not divide among 8 processes. Take 8 samples, or another number of processes \(1, 3\)"),
    ],
)
def test_numbers_that_cannot_be_divided_are_refused_with_those_that_can(number, batch_size, world, message):
    with pytest.raises(ValueError, match=message):
        divide(flags(batch_size, num_prompts_per_epoch=3, group_size=5), number, 2, 0, world)


def test_another_number_of_samples_has_a_division_of_its_own():
    run = SimpleNamespace(args=flags(2), division=Division(8, 4, 2), accelerator=SimpleNamespace(num_processes=1, process_index=0))
    assert division_of(run, 8) is run.division
    assert division_of(run, 4) == Division(4, 4, 2)


def test_rows_of_a_data_set_go_to_steps_by_their_position(tmp_path):
    """The rows and noise seeds of an optimizer step are the same on one, two and four processes."""

    def step(world, number):
        found = []
        for rank in range(world):
            run = SimpleNamespace(args=SimpleNamespace(seed=3), division=divide(flags(4, 2), 16, 2, rank, world)[0])
            examples = Examples.__new__(Examples)
            examples.run, examples.rows, examples.stream, examples.draw = run, [None] * 5, "data", None
            for b in range(len(run.division.batches)):
                if run.division.step_of(b) == number:
                    found += [(place.row, place.seed) for place in examples.positions(1, b)]
        return sorted(found)

    for number in (0, 1):
        assert len(step(1, number)) == 8 and step(1, number) == step(2, number) == step(4, number)


def test_points_of_a_preference_flow_do_not_depend_on_the_processes():
    script, pairs = load_script("pfm"), SimpleNamespace(y0=torch.zeros(7, 2), __len__=None)

    class Rows(list):
        y0 = pairs.y0

    def step(world):
        found = []
        for rank in range(world):
            args = SimpleNamespace(seed=3, sigma=0.5)
            run = SimpleNamespace(args=args, division=divide(flags(4, 1), 4, 1, rank, world)[0])
            for b in range(len(run.division.batches)):
                rows, t, noise = script.draw(run, Rows(range(7)), 2, b)
                found += zip(rows, t.tolist(), noise.sum(1).tolist())
        return sorted(found)

    assert len(set(step(1))) == 4 and step(1) == step(2) == step(4)


def test_all_gradients_are_summed_in_one_message(monkeypatch):
    messages = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: messages.append(tensor.mul_(2)))
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1,))]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn(parameter.shape)
    expected = [parameter.grad * 2 for parameter in parameters[:2]] + [torch.zeros(1)]
    sum_over_processes(parameters)
    assert len(messages) == 1 and all(torch.equal(parameter.grad, value) for parameter, value in zip(parameters, expected))


def test_a_run_says_what_it_changed(tmp_path, capsys):
    run = make_run(tmp_path, train_batch_size=3, gradient_accumulation_steps=1)
    monkey = SimpleNamespace(num_processes=2, process_index=1)
    run.accelerator, printed = monkey, []
    run.print = lambda *values: printed.extend(values)
    assert run.batches(12) == (3, 1)
    assert [list(batch) for batch in run.division.batches] == [[2, 3], [6, 7], [10, 11]]
    assert len(printed) == 1 and "Changed for 2 processes" in printed[0]
