"""What tests of pipelines around stock pipelines share."""

import pytest
import torch
from tiny_pipelines import FAMILIES


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def stacked(output):
    images = output[0]
    return torch.stack(list(images)) if isinstance(images, list) else images


@pytest.fixture(scope="module")
def pipes():
    """A family's pipeline and the arguments of its calls, by name; built once."""
    built = {}

    def pipe(name):
        if name not in built:
            built[name] = FAMILIES[name].build()
            built[name].set_progress_bar_config(disable=True)
        return built[name], FAMILIES[name].call

    return pipe
