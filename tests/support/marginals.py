"""The moments of a whole chain whose model output is linear in the state."""

import math

import numpy as np

MEAN, VARIANCE = 1.5, 0.25


def run_chain(mean: float, variance: float, steps) -> tuple[float, float, float]:
    """Mean and variance of x_0 and corr(x_0, x_T), for steps x' = A x + B + std * noise."""
    covariance = initial = variance
    for a, b, std in steps:
        mean, variance, covariance = a * mean + b, a * a * variance + std**2, a * covariance
    return mean, variance, covariance / math.sqrt(initial * variance)


def order(steps, errors) -> float:
    """Minus the slope of log |error| over log K."""
    return -np.polyfit(np.log(steps), np.log(np.abs(errors)), 1)[0]
