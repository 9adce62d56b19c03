"""Rewards of the states on the way, and the noise that each step bears.

`train_dense_grpo.py` alone has it: completions and calibration sample on their own, before and beside the loop that its page shows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...algorithms.dense_grpo import calibrate, step_gains
from ...data.prompts import Prompt
from ...driving.outcome import Outcome
from ...policy import Policy
from .sampling import Samples, sample_epoch, score_again


def completion_rewards(run, policy: Policy, reward, samples: Samples, steps: list[int]) -> Tensor:
    """Rewards of the ODE's completions from the states around `steps`, (N, K + 1) on all processes; NaN at other states.

    A state behind the last noisy step lies on the ODE to the final sample: its reward is the sample's, at no cost.
    """
    trajectory = samples.batches[0]
    behind = trajectory.noisy_steps[-1] + 1
    rewards = torch.full((len(samples.rewards), trajectory.num_steps + 1), torch.nan)
    states = sorted({i for k in steps for i in (k, k + 1)})
    for i in tqdm(states, desc="completions", unit="state", leave=False, disable=not run.is_main):
        rewards[:, i] = samples.rewards if i >= behind else score_again(run, reward, samples, partial(_completed, run, policy, samples, i))
    return rewards


@torch.no_grad()
def _completed(run, policy: Policy, samples: Samples, i: int, b: int) -> Outcome:
    """What the ODE leads to from state i of batch b."""
    trajectory = samples.batches[b]
    with run.accelerator.autocast():
        latents = policy.complete(trajectory, i)
    return policy.outcome(latents, trajectory.condition).to(torch.float32)


class NoiseLevels:
    """psi of each solver step and how many rounds of calibration it has seen; part of checkpoints."""

    def __init__(self, psi: float, num_steps: int):
        self.psi, self.rounds = torch.full((num_steps,), psi, dtype=torch.float64), 0

    def state_dict(self) -> dict[str, Any]:
        return {"psi": self.psi.tolist(), "rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.psi, self.rounds = torch.tensor(state["psi"], dtype=torch.float64), state["rounds"]


def calibrate_noise(run, policy: Policy, reward, prompts: list[Prompt], levels: NoiseLevels) -> None:
    """Set the scheduler's noise to `levels`, after the rounds of calibration that they lack. Rounds sample as epochs -1, -2, ... would.

    Raises:
        ValueError: the pipeline takes another number of steps than there are levels.
    """
    args = run.args
    with run.meter.running():
        for number in tqdm(range(levels.rounds, args.calibration_rounds), desc="calibration", unit="round", disable=not run.is_main):
            policy.scheduler.register_to_config(noise_level=levels.psi.tolist())
            samples = sample_epoch(run, policy, reward, prompts, -1 - number, args.num_prompts_per_epoch, args.group_size, args.same_latent, scout=False)
            noisy = samples.batches[0].noisy_steps
            gains = step_gains(completion_rewards(run, policy, reward, samples, noisy))
            if gains.shape[1] != len(levels.psi):
                raise ValueError(
                    f"Calibration needs one psi for each solver step: --num_inference_steps is {len(levels.psi)}, but this pipeline takes "
                    f"{gains.shape[1]} steps. Give its own number, or leave calibration out with --calibration_rounds 0."
                )
            levels.psi = calibrate(levels.psi, gains, tolerance=args.calibration_tolerance, increment=args.calibration_increment)
            levels.rounds += 1
    policy.scheduler.register_to_config(noise_level=levels.psi.tolist())
    run.print(f"psi after {levels.rounds} rounds of calibration: {', '.join(f'{value:.3f}' for value in levels.psi.tolist())}")
