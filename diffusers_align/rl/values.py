r"""A learned baseline: the value network of DPOK (https://arxiv.org/abs/2305.16381, section 4.3) and what it is fitted to.

$V(x_t, c, t) \approx \mathbb E[r(x_0, c) \mid x_t, c]$ says how well a half-drawn sample will end; with rewards of each step, what is still to come. Of a
policy gradient it may be subtracted from the reward at each step without bias, because it does not depend on the step's action; what is left is how much
the steps from here on add, so the gradient's variance falls.

Its targets are what the samples earned (`value_targets` with lam = 1), or TD($\lambda$)'s: below 1 its own later values stand in for a part of that, as in
`returns.gae`. Which is better is seen on a chain that is known exactly (`python -m benchmarks.oracle`): an error of V in later states becomes a bias of the
gradient, of a share of 1 - lambda.

As in the official code (google-research/google-research, dpok/, 1d49f2c): three layers of width 256 whose units are gated by an embedding of the step,
mean squared error against the final reward, AdamW at 1e-4, five minibatches of 256 transitions to an optimizer step, a buffer
of the latest 1000. What is different: the output starts at the mean of the first rewards, which one small step per epoch would
take long to reach; minibatches may be as large as the buffer; all of it is part of checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .returns import gae, lambda_returns, terminal_rewards


class GatedLinear(nn.Module):
    """A linear layer whose outputs are multiplied by a learned gate for each step, drawn from U(0, 1) at first."""

    def __init__(self, inputs: int, outputs: int, num_steps: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.gates = nn.Parameter(torch.rand(num_steps, outputs))

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        return self.gates[steps] * self.linear(x)


class ValueNetwork(nn.Module):
    """V(x_t, c, t): three gated layers with ReLU on flattened latents and prompt features, and a linear head.

    Args:
        state_size, prompt_size: numbers of a sample's latents and prompt features.
        num_steps: of the solver; each has its gates.
    """

    def __init__(self, state_size: int, prompt_size: int, num_steps: int, width: int = 256):
        super().__init__()
        sizes = [state_size + prompt_size, width, width, width]
        self.layers = nn.ModuleList(GatedLinear(before, after, num_steps) for before, after in zip(sizes, sizes[1:]))
        self.head = nn.Linear(width, 1)

    def forward(self, states: Tensor, prompts: Tensor, steps: Tensor) -> Tensor:
        """Values (N,) of `states` (N, *D), `prompts` (N, E) and solver `steps` (N,)."""
        x = torch.cat([states.flatten(1), prompts], 1)
        for layer in self.layers:
            x = layer(x, steps).relu()
        return self.head(x).squeeze(1)


class ValueBaseline:
    """A value network that is made when the first transitions show its sizes, with its optimizer and its buffer.

    What happens depends on the seed and the calls alone, so processes that are told the same hold the same network.

    Args:
        num_steps: solver steps of a rollout.
        learning_rate, batch_size, accumulation_steps, buffer_size, width: the official code's.
        seed: of the weights and of the minibatches.
        device: of the network; the buffer stays in main memory.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        learning_rate: float = 1e-4,
        batch_size: int = 256,
        accumulation_steps: int = 5,
        buffer_size: int = 1000,
        width: int = 256,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        self.num_steps, self.learning_rate, self.width, self.seed, self.device = num_steps, learning_rate, width, seed, device
        self.batch_size, self.accumulation_steps, self.buffer_size = batch_size, accumulation_steps, buffer_size
        self.generator = torch.Generator().manual_seed(seed)
        self.network: ValueNetwork | None = None
        self.buffer: list[Tensor] = []

    def _build(self, state_size: int, prompt_size: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = ValueNetwork(state_size, prompt_size, self.num_steps, self.width).to(self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate)

    def remember(self, states: Tensor, prompts: Tensor, steps: Tensor, targets: Tensor) -> None:
        """Take in transitions: `states` (N, *D), `prompts` (N, E), solver `steps` (N,), and what their values are to be, `targets` (N,). The latest
        `buffer_size` are kept. Targets of NaN are left out."""
        scored = ~targets.isnan()
        if not scored.any():
            return
        new = [column[scored].detach().cpu() for column in (states.float(), prompts.float(), steps, targets.float())]
        if self.network is None:
            self._build(new[0][0].numel(), new[1].shape[1])
            nn.init.constant_(self.network.head.bias, float(new[3].mean()))
        joined = [torch.cat(pair) for pair in zip(self.buffer, new)] if self.buffer else new
        self.buffer = [column[-self.buffer_size :].clone() for column in joined]

    @torch.no_grad()
    def __call__(self, states: Tensor, prompts: Tensor, steps: Tensor) -> Tensor:
        """Values (N,) without gradient, float32, on the device of `states`; 0 before the first target."""
        if self.network is None:
            return torch.zeros(len(states), device=states.device)
        return self._predict(states, prompts, steps).to(states.device)

    def _predict(self, states: Tensor, prompts: Tensor, steps: Tensor) -> Tensor:
        return self.network(states.to(self.device, torch.float32), prompts.to(self.device, torch.float32), steps.to(self.device))

    @torch.enable_grad()
    def fit(self, updates: int = 1) -> float:
        """Make `updates` optimizer steps on random transitions of the buffer, and return the mean squared error of the last
        one's minibatches, before it; 0 while the buffer is empty."""
        error = 0.0
        for _ in range(updates if self.buffer else 0):
            self.optimizer.zero_grad()
            error = 0.0
            for _ in range(self.accumulation_steps):
                index = torch.randperm(len(self.buffer[0]), generator=self.generator)[: self.batch_size]
                states, prompts, steps, targets = (column[index] for column in self.buffer)
                loss = F.mse_loss(self._predict(states, prompts, steps), targets.to(self.device)) / self.accumulation_steps
                loss.backward()
                error += loss.item()
            self.optimizer.step()
        return error

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"generator": self.generator.get_state(), "buffer": self.buffer}
        if self.network is not None:
            state |= {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.buffer = list(state["buffer"])
        if "network" in state:
            self._build(self.buffer[0][0].numel(), self.buffer[1].shape[1])
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate  # this object's, not that of the state


def value_advantages(rewards: Tensor, values: Tensor, *, lam: float = 1.0) -> Tensor:
    """Advantages (N, K) of each step, not normalised; 0 where the reward, or one that follows, is NaN.

    Args:
        rewards: (N,) of the final samples, or (N, K) of the steps.
        values: (N, K), of the states that the steps start from.
        lam: of the generalised estimate (`returns.gae`): 1 is r - V(x_k, c, k), as in DPOK; below, later values stand in for part of the
            reward, with less variance and the values' bias.
    """
    return gae(of_steps(rewards, values), values.double(), lam=lam).to(values.dtype)


def value_targets(rewards: Tensor, values: Tensor, *, lam: float = 1.0) -> Tensor:
    """What the values are to be, (N, K): the rewards from here on, or TD(lambda)'s mixture of them with later values (`returns.lambda_returns`); NaN where
    the reward, or one that follows, is NaN. Arguments as for `value_advantages`."""
    return lambda_returns(of_steps(rewards, values), values.double(), lam=lam).to(values.dtype)


def of_steps(rewards: Tensor, values: Tensor) -> Tensor:
    """Rewards (N,) of final samples, or (N, K), as those of the steps, (N, K) float64."""
    return rewards.double() if rewards.ndim == 2 else terminal_rewards(rewards.double(), values.shape[1])


def explained_variance(returns: Tensor, values: Tensor) -> float:
    """1 - Var(G - V) / Var(G) over samples and steps: 1 for a perfect forecast, 0 for a constant, below 0 for a harmful one; 0 if the returns that could be
    scored are all equal.

    Args:
        returns: (N, K), what was earned from each state on, or (N,) where that is the final reward.
        values: (N, K).
    """
    returns = (returns if returns.ndim == 2 else returns[:, None].expand_as(values)).double()
    scored = ~returns.isnan()
    left, variance = (returns - values.double())[scored], returns[scored].var(correction=0)
    return float(1 - left.var(correction=0) / variance) if variance > 0 else 0.0
