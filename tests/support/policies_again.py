"""Policies that are called again, and the errors of their replay."""

import torch
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, Trajectory


def policy_of(name: str = "sd15", **call) -> Policy:
    family = FAMILIES[name]
    return Policy(family.build(), **{**family.call, **call})


def errors_of_replay(policy: Policy, trajectory: Trajectory, steps=None) -> list[float]:
    found = []

    def compare(k, kernel):
        found.append(float((kernel.log_prob(trajectory.actions[:, k]) - trajectory.log_probs[:, k]).abs().max()))

    with torch.no_grad():
        policy.replay(trajectory, compare, steps)
    return found


def changed(pipeline, method: str, change):
    """Replace a method of this pipeline by `change(stock, *args, **kwargs)`."""
    stock = getattr(pipeline, method)
    pipeline.__dict__[method] = lambda *args, **kwargs: change(stock, *args, **kwargs)


def with_momentum(policy: Policy, cut: bool = False, read_from: int = 1) -> None:
    """What the loop makes of the denoiser's output adds up over the steps of a call, with its graph unless that is `cut`; the steps from `read_from` on
    go by it."""
    memory = {}

    def add_up(module, arguments, output):
        number = memory["number"] = memory.get("number", -1) + 1
        gathered = memory.get("sum", torch.zeros(())) if number >= read_from else torch.zeros(())
        total = output[0] * (1 + 0.5 * gathered.sin())  # the sine keeps its input for the gradient
        memory["sum"] = total.detach() if cut else total
        return (total,)

    policy.pipeline.unet.register_forward_hook(add_up)
    changed(policy.pipeline, "prepare_latents", lambda stock, *args, **kwargs: memory.clear() or stock(*args, **kwargs))
