"""The optimizer of a run, by its flags: AdamW, or with `--use_8bit_adam` that of bitsandbytes, whose moments take a byte each."""

from __future__ import annotations

import importlib.util

import torch

# Tensors with fewer numbers keep their moments in float32: the default of bitsandbytes.
SMALLEST = 4096


def check_library(args) -> None:
    """Raise an ImportError if `--use_8bit_adam` has no bitsandbytes."""
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("--use_8bit_adam takes bitsandbytes, which is not installed: run `pip install bitsandbytes`, or leave the flag out.")


def check_average(args, steps: int) -> None:
    """Raise a ValueError if the moving average of `--use_ema` would not begin within `steps` optimizer steps."""
    if args.use_ema and steps < args.ema_interval:
        raise ValueError(
            f"--use_ema takes a step every --ema_interval {args.ema_interval} optimizer steps, and the run makes {steps}: the average would never begin. "
            "Lower --ema_interval, train for longer, or leave out --use_ema."
        )


def adamw(args, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the parameters, as the flags have it."""
    kind = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    return kind(parameters, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.adam_weight_decay)


def bytes_of_moments(args, sizes: list[int]) -> int:
    """What Adam's two moments of tensors of `sizes` numbers take: 8 bytes a number, or 2 and two float32 for 256 numbers."""
    quantised = sum(size for size in sizes if size >= SMALLEST) if args.use_8bit_adam else 0
    return 8 * (sum(sizes) - quantised) + 2 * quantised + 8 * (quantised // 256)
