"""What a run costs."""

import copy
import pickle

import pytest
import torch
from torch import nn

from diffusers_align.training.run.costs import Cost, Meter


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_watched_denoiser_is_a_copy(copied):
    module, meter = nn.Linear(2, 2), Meter()
    meter.watch([module])
    other = copied(module)
    with torch.no_grad():
        other.weight.zero_()
        other.bias.zero_()
    with meter.running():
        assert other(torch.ones(3, 2)).abs().max() == 0 and module(torch.ones(3, 2)).abs().max() > 0
    assert meter.total().denoiser_evaluations == 3, "the copy is not watched"


@pytest.mark.parametrize("text", ['{"images": 3, "den', '{"pictures": 3}', "[1]"])
def test_costs_that_cannot_be_read_end_no_comparison(text, tmp_path, caplog):
    (tmp_path / "costs.json").write_text(text)
    assert Cost.read(tmp_path) is None and "does not say what a run has cost" in caplog.text


def test_the_meter_counts_rows_only_while_it_runs():
    module, meter = torch.nn.Linear(2, 2), Meter()
    meter.watch([module])
    module(torch.zeros(5, 2))
    with meter.running():
        module(input=torch.zeros(3, 2))
        with torch.no_grad():
            module(torch.zeros(4, 2))
        with meter.paused():
            module(torch.zeros(7, 2))
            meter.count_images(7)
        meter.count_images(2)
        module(torch.zeros(1, 2))
    meter.count_images(9)
    total = meter.total()
    assert (total.images, total.denoiser_evaluations, total.denoiser_evaluations_with_gradients) == (2, 8, 4)


def test_the_meter_excludes_pauses_from_its_seconds(monkeypatch):
    now = iter([10.0, 13.0, 20.0, 25.0])
    monkeypatch.setattr("diffusers_align.training.run.costs.time.perf_counter", lambda: next(now))
    meter = Meter()
    with meter.running():
        with meter.paused():
            pass
    assert meter.total().seconds == 3.0 + 5.0


def test_the_meter_counts_the_processors_time_beside_the_walls(monkeypatch):
    now = iter([10.0, 11.0, 20.0, 20.5])
    monkeypatch.setattr("diffusers_align.training.run.costs.time.process_time", lambda: next(now))
    meter = Meter()
    meter.resume(Cost(processor_seconds=100.0))
    with meter.running():
        with meter.paused():
            pass
    assert meter.total().processor_seconds == 100.0 + 1.0 + 0.5


def test_a_folder_without_costs_has_none(tmp_path):
    assert Cost.read(tmp_path) is None
