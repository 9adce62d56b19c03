"""Requests to servers: which are asked again, and when."""

import time
from types import SimpleNamespace

import pytest
from reward_servers import free_port, no_proxy  # noqa: F401

from diffusers_align.rewards import web


def test_a_server_that_comes_back_is_waited_for(monkeypatch):
    pauses = []
    monkeypatch.setattr(web, "time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    with pytest.raises(web.Unreachable, match="9 attempts"):
        web.request(f"http://127.0.0.1:{free_port()}", retries=8, timeout=1.0)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
