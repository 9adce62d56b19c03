"""What calls of a stock pipeline draw with, and how a second pass over the same draws has them again."""

from __future__ import annotations

import torch

Generators = torch.Generator | list[torch.Generator] | None


def copied(generator: Generators) -> Generators:
    """Generators in the same state, for a second pass over the same draws."""
    if isinstance(generator, list):
        return [copied(g) for g in generator]
    return generator if generator is None else torch.Generator(generator.device).set_state(generator.get_state())


def noted(generator: Generators, device: torch.device) -> torch.Generator | list[torch.Generator]:
    """The generators of a call that is about to be made, in the state that they are in; of none, torch's global one of the pipeline's device, which draws
    for such a call. Some pipelines encode a picture with a draw, and show it behind their last step: passes that only decode must draw it again."""
    if generator is not None:
        return copied(generator)
    state = torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.Generator(device).set_state(state)
