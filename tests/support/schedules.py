"""Both schedulers with noise, on a short schedule, and noise for them."""

import torch

from diffusers_align import DDIMSDEScheduler, FlowMatchSDEScheduler

SHAPE = (2, 4, 4, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
NOISE = {"flow_grpo": 0.7, "dance_grpo": 0.3, "memoryless": 1.0, "memoryless_em": 1.0, "cps": 0.8}


STD = {
    "flow_grpo": [0.70000, 0.74296, 0.53615, 0.44590, 0.39179, 0.35280, 0.31907, 0.28201, 0.22536, 0.00628],
    "dance_grpo": [0.05990, 0.06489, 0.07077, 0.07784, 0.08648, 0.09727, 0.11115, 0.12967, 0.15563, 0.02835],
    "cps": [0.91314, 0.86865, 0.81571, 0.75168, 0.67266, 0.57268, 0.44212, 0.26444, 0.00849, 0],
}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=dtype)


def flow(sde_type="flow_grpo", steps=10, noise_level=None, mu=None, **config) -> FlowMatchSDEScheduler:
    scheduler = FlowMatchSDEScheduler(**{"shift": 3.0} | config, sde_type=sde_type, noise_level=NOISE[sde_type] if noise_level is None else noise_level)
    scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def ddim(steps=10, cls=DDIMSDEScheduler, **config):
    scheduler = cls(**SD | config)
    scheduler.set_timesteps(steps)
    return scheduler


def assert_same_loop(scheduler, stock, **stock_kwargs):
    """Walks both from one state, with model outputs that depend on the state, and compares every state bit by bit."""
    x = y = randn(0)
    for k, t in enumerate(stock.timesteps):
        out, stock_out = (torch.tanh(z) + 0.1 * randn(k + 1) for z in (x, y))
        x = scheduler.step(out, t, x, return_dict=False)
        y = stock.step(stock_out, t, y, return_dict=False, **stock_kwargs)
        assert len(x) == len(y), f"step {k}: {len(x)} outputs, stock {len(y)}"
        assert all(torch.equal(a, b) for a, b in zip(x, y)), f"step {k}"
        x, y = x[0], y[0]
