"""Serve a reward over HTTP: `python -m diffusers_align.rewards.server --reward clip_score --port 8000`, then `--reward http://host:8000`.

A small reference server on Python's own `http.server`: requests in threads, one at a time in the reward. It trusts its clients to
be few, and no more: bodies have a limit, connections a time limit, and nothing is unpickled. It has no passwords and no encryption,
so it listens to this machine only, unless `--host` says otherwise; across machines, use a network or a tunnel that you trust.
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from .base import load_reward, score
from .loading import model_option, reward_name
from .wire import decode_request, encode_scores

MAX_BODY_MB, MAX_WAITING = 256, 8


class RewardServer(ThreadingHTTPServer):
    """Answers `GET /health` and `POST /score`; `serve_forever()` runs it, `shutdown()` from another thread ends it.

    Args:
        reward: any reward.
        device: where images are moved before scoring.
        max_body: bytes of a request.
        max_waiting: requests at a time; further ones are told to come back.
        patience: seconds of silence after which a connection is dropped.
    """

    daemon_threads = True

    def __init__(self, reward, host: str = "127.0.0.1", port: int = 0, *, device="cpu", max_body=MAX_BODY_MB * 2**20, max_waiting=MAX_WAITING, patience=60.0):
        self.reward, self.device, self.max_body, self.patience = reward, torch.device(device), max_body, patience
        self.scoring, self.places = threading.Lock(), threading.BoundedSemaphore(max_waiting)
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def score(self, body: bytes) -> bytes:
        """The answer to a request's body; rewards need not be thread-safe."""
        images, prompts, columns = decode_request(body)
        with self.scoring, torch.no_grad():
            return encode_scores(score(self.reward, images.to(self.device), prompts, on_invalid="mask", **columns))


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.timeout = self.server.patience
        super().setup()

    def do_GET(self) -> None:
        if self.path != "/health":
            return self._error(404, f"There is no {self.path}: ask GET /health or POST /score.")
        self._answer(200, json.dumps({"status": "ok", "reward": reward_name(self.server.reward)}).encode())

    def do_POST(self) -> None:
        if self.path != "/score":
            return self._error(404, f"There is no {self.path}: ask GET /health or POST /score.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self._error(411, "The request needs a Content-Length.")
        if int(length) > self.server.max_body:
            return self._error(413, f"The request has {length} bytes, {self.server.max_body} are allowed: send fewer images, or raise --max_body_mb.")
        if not self.server.places.acquire(blocking=False):
            return self._error(503, "Too many requests at a time: try again later.")
        try:
            self._score(int(length))
        finally:
            self.server.places.release()

    def _score(self, length: int) -> None:
        body = self.rfile.read(length)
        if len(body) < length:
            return self._error(400, f"The request ended after {len(body)} of {length} bytes.")
        try:
            answer = self.server.score(body)
        except Exception as error:  # the client is to learn what happened, the server is to live on
            return self._error(422, f"{type(error).__name__}: {error}")
        self._answer(200, answer)

    def _error(self, status: int, message: str) -> None:
        self.close_connection = True  # the body may not have been read
        self._answer(status, json.dumps({"error": message}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        pass


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The server's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--reward", required=True, help="as in the training scripts: built-in, module:function, file.py:function, or a sum")
    parser.add_argument("--reward_model", help="checkpoint of the reward's model, where it has one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all, in networks that you trust")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max_body_mb", type=int, default=MAX_BODY_MB, help="largest request")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Serve until interrupted."""
    args = parse_args(argv)
    reward = load_reward(args.reward, device=args.device, **model_option(args.reward_model))
    with RewardServer(reward, args.host, args.port, device=args.device, max_body=args.max_body_mb * 2**20) as server:
        print(f"Serving {args.reward} at {server.url}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("Stopped.")


if __name__ == "__main__":
    main()
