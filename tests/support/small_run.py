"""A run of a few numbers that is trained, killed and resumed in a moment."""

from unittest import mock

import torch
from script_tools import make_run

SIZES = {"checkpointing_epochs": 1, "num_epochs": 10, "num_validation_images": 1}


def train(folder, epochs=0, size=3, **flags):
    """A run without a pipeline: one parameter, whose gradient turns and grows with the epoch; `epochs` more of them, each with a checkpoint."""
    run = make_run(folder, **{**SIZES, **flags})
    parameter = torch.nn.Parameter(torch.linspace(0, 1, size))
    run.train_parameters([parameter], lambda folder: torch.save([], folder / "weights.of.users"))
    run.load_optimizer(10)
    run.resume()
    for _ in range(epochs):
        parameter.grad = torch.linspace(1, 2, size) * (run.epoch + 1) * (-1) ** run.epoch
        run.optimizer_step()
        run.epoch += 1
        with mock.patch("diffusers_align.training.run.metrics.reward_curve"):  # drawing takes longer than the rest
            run.log({"reward": run.epoch / 10})
        run.checkpoint()
    return run


def weights(run):
    return run.parameters[0].detach().clone()


def resumed(folder, **flags):
    return train(folder, resume_from_checkpoint="latest", **flags)
