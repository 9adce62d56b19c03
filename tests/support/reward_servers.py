"""Servers of rewards: that answer, that misbehave in one way or another."""

import io
import json
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

QUICK = {"timeout": 5.0, "retries": 2, "backoff": 0.01}


PROMPTS = ["a cat", "two dogs"]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextmanager
def serving(http_server):
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield http_server
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()


def judged(images, prompts, weight=None, **columns):
    """Depends on every pixel, the prompt and a column; cannot score dogs."""
    values = (images.double() * torch.linspace(0.1, 1, images[0].numel()).view(images[0].shape)).flatten(1).mean(1).float()
    values = values * torch.tensor([float(w) for w in weight or [1] * len(prompts)]) + torch.tensor([0.1 * len(prompt) for prompt in prompts])
    return {"reward": torch.where(torch.tensor(["dog" in p for p in prompts]), torch.nan, values), "length": torch.tensor([len(p) for p in prompts])}


class FaultyHandler(BaseHTTPRequestHandler):
    """Answers by the server's list of faults, one a POST; the last one stays. A fault is bytes, (status, bytes), or a function of the handler."""

    def do_GET(self):
        self._send(200, b'{"status": "ok", "reward": "faulty"}')

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
        with self.server.lock:
            fault = self.server.faults.pop(0) if len(self.server.faults) > 1 else self.server.faults[0]
        if callable(fault):
            fault = fault(self)
        if fault is not None:
            self._send(*(fault if isinstance(fault, tuple) else (200, fault)))

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def faulty(*faults):
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), FaultyHandler)
    http_server.daemon_threads = True
    http_server.faults, http_server.requests, http_server.lock = list(faults), [], threading.Lock()
    http_server.url = f"http://127.0.0.1:{http_server.server_address[1]}"
    with serving(http_server):
        yield http_server


def dies(handler):
    """Half an answer, then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": {"rew')
    handler.close_connection = True


def resets(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.wfile = io.BytesIO()


def sleeps(handler):
    time.sleep(1.0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


GOOD = json.dumps({"scores": {"reward": [0.25, None]}}).encode()
