"""A reward on a server: `--reward http://host:port`, for judges that need another machine, another GPU or other packages.

`python -m diffusers_align.rewards.server` is such a server; `wire.py` says what is sent, so that others can be written.
"""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

from torch import Tensor

from ..checks.ranges import CountOrNone, NonNegative, Positive, checked
from . import web
from .base import RewardError
from .wire import FORMATS, decode_scores, encode_request

SERVED: dict[str, str] = {}  # what the servers said that were asked by this process, by address: the reward's name, and a hash of its source


class RemoteReward:
    """Asks a server for scores. Not differentiable.

    Args:
        url: `http://host:port`; with `?format=png` images are sent as PNG files, rounded to 8 bits, about a tenth of the size.
            By default they are sent as they are, float32, and the scores equal those of the same reward in this process.
        timeout: seconds for each attempt, from the first to the last byte.
        retries: further attempts after a passing failure.
        backoff: seconds before the first further attempt, doubled each time up to 30.

    Raises:
        RewardError: no reward server answers at the address.
    """

    @checked
    def __init__(self, url: str, timeout: Positive = 300.0, retries: CountOrNone = 3, backoff: NonNegative = 0.5):
        address, _, query = url.partition("?")
        self.address, self.name = address.rstrip("/"), url
        self.format = dict(urllib.parse.parse_qsl(query)).get("format", FORMATS[0])
        if self.format not in FORMATS:
            raise ValueError(f"Reward {url!r}: the format must be one of {', '.join(FORMATS)}.")
        self.patience = {"timeout": timeout, "retries": retries, "backoff": backoff}
        self.served = self._check()

    def _check(self) -> str:
        """The name of the reward that is served."""
        advice = "Start one with `python -m diffusers_align.rewards.server --reward NAME --port PORT`, or correct the address."
        try:
            health = json.loads(web.request(f"{self.address}/health", **self.patience | {"timeout": min(10.0, self.patience["timeout"])}))
            SERVED[self.name] = web.printable(f"{health['reward']} {health.get('content')}", 400)
            return web.printable(health["reward"], 200)
        except (web.Unreachable, web.RequestRefused) as error:
            raise RewardError(f"There is no reward server at {self.address}: {error}. {advice}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(f"What answers at {self.address}/health is no reward server. {advice}") from error

    def __call__(self, images: Tensor, prompts: list[str], sampling_rate: int | None = None, audio: Tensor | None = None, **columns: Any) -> dict[str, Tensor]:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], or sounds (B, C, T) in [-1, 1]. Returns what the server's reward returns, (B,) each. That
        one is given the sound if it declares it.

        Raises:
            RewardError: the server's reward failed, or its answer makes no sense.
            ConnectionError: no answer after the last attempt; the message says how to be more patient.
        """
        body = encode_request(images, prompts, columns, self.format, sampling_rate, audio)
        try:
            scores = decode_scores(web.request(f"{self.address}/score", body, **self.patience))
        except web.RequestRefused as error:
            raise RewardError(str(error)) from error
        except web.Unreachable as error:
            raise web.Unreachable(f"{error}. Is the server still running? --reward_retries waits longer for one that comes back") from error
        except ValueError as error:
            raise RewardError(f"{self.address}: {error}") from error
        return {name: values.to(images.device) for name, values in scores.items()}
