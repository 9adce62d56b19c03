"""Serve a reward over HTTP: `python -m diffusers_align.rewards.server --reward clip_score --port 8000`, then `--reward http://host:8000`.

A small reference server on Python's own `http.server`: requests in threads, one at a time in the reward. It trusts its clients to
be few, and no more: nothing is unpickled, time and memory have bounds whatever they send. It has no passwords and no encryption,
so it listens to this machine only, unless `--host` says otherwise; across machines, use a network or a tunnel that you trust.

A connection is for one request. Its head, and each piece of its body, must arrive within `patience`: who sends slowly is cut off and holds
nothing but a thread meanwhile. Bodies above `SMALL_BODY` share room for `MAX_BODIES` of the largest kind. Images stay packed until it is
their turn, so one request's pixels are in memory at a time. Large requests have places of their own and take turns with small ones.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import ipaddress
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from ..checks.ranges import Count, CountOrNone, Positive, checked
from .base import load_reward, score_columns
from .contents import content
from .registry import model_option, reward_name
from .wire import ScoreRequest, encode_scores, read_request

MAX_BODY_MB, MAX_WAITING, MAX_CONNECTIONS, MAX_BODIES = 256, 8, 512, 4
PIECE, SMALL_BODY = 2**16, 2**20  # bytes
SMALL_VALUES = 2**24  # 64 MiB of float32
BUSY = "Too many requests at a time: try again later."


class Busy(RuntimeError):
    """There is no room for a request now."""


class Room:
    """Bytes that requests share: `with room.take(n, until):` waits for n of them to be free.

    Raises:
        Busy: they were not in time.
    """

    def __init__(self, size: int):
        self.free, self._changed = size, threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int, until: float):
        with self._changed:
            if not self._changed.wait_for(lambda: self.free >= size, until - time.monotonic()):
                raise Busy
            self.free -= size
        try:
            yield
        finally:
            with self._changed:
                self.free += size
                self._changed.notify_all()


class Turns:
    """One at a time; where small and large ones wait, they take turns: `with turns.take(large, until):`.

    Raises:
        Busy: the turn did not come in time.
    """

    def __init__(self):
        self.busy, self.last, self.waiting, self._changed = False, False, {False: 0, True: 0}, threading.Condition()

    @contextlib.contextmanager
    def take(self, large: bool, until: float):
        with self._changed:
            self.waiting[large] += 1
            try:
                if not self._changed.wait_for(lambda: not self.busy and (self.last != large or not self.waiting[not large]), until - time.monotonic()):
                    raise Busy
                self.busy, self.last = True, large
            finally:
                self.waiting[large] -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.busy = False
                self._changed.notify_all()


class RewardServer(ThreadingHTTPServer):
    """Answers `GET /health` and `POST /score`; `serve_forever()` runs it, `shutdown()` from another thread ends it.

    Args:
        reward: any reward.
        content: a hash of what it was made of, by which clients know it again; None where nothing is known.
        device: where images are moved before scoring.
        max_body: bytes of a request.
        max_waiting: requests at a time, of the small and of the large kind each; further ones are told to come back.
        patience: seconds in which a request's head, and each `PIECE` of its body, must arrive.
        deadline: seconds after which a request that could not be scored yet is told to come back.
    """

    daemon_threads = True
    request_queue_size = 128

    @checked
    def __init__(
        self, reward, host: str = "127.0.0.1", port: CountOrNone = 0, *, content: str | None = None, device="cpu", max_body: Count = MAX_BODY_MB * 2**20,
        max_waiting: Count = MAX_WAITING, patience: Positive = 10.0, deadline: Positive = 240.0,
    ):  # fmt: skip
        self.reward, self.content = reward, content
        self.device, self.max_body, self.patience, self.deadline = torch.device(device), max_body, patience, deadline
        self.connections, self.bodies = threading.BoundedSemaphore(MAX_CONNECTIONS), Room(MAX_BODIES * max_body)
        self.turns, self.parsing = Turns(), {large: threading.Lock() for large in (False, True)}
        self.places = {large: threading.BoundedSemaphore(max_waiting) for large in (False, True)}
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def process_request(self, request, client_address) -> None:
        if not self.connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.connections.release()
            raise

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request, client_address) -> None:
        """A client that has gone is none of ours; anything else is for whoever runs the server."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def score(self, request: ScoreRequest, until: float) -> bytes:
        """The answer to a request, one after the other: rewards need not be thread-safe.

        Raises:
            Busy: there was no place, or its turn did not come in time.
        """
        large = request.values > SMALL_VALUES
        if not self.places[large].acquire(blocking=False):
            raise Busy
        try:
            with self.turns.take(large, until), torch.no_grad():
                images, columns = request.unpacked()
                columns = {name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in columns.items()}
                return encode_scores(score_columns(self.reward, images.to(self.device), request.prompts, columns, "mask"))
        finally:
            self.places[large].release()


def _message(text: str) -> bytes:
    return json.dumps({"error": text}).encode()


class _TimedReader(io.RawIOBase):
    """A connection whose reads end at a time that its owner moves on."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.until = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.until = time.monotonic() + self.server.deadline
        self.timed = _TimedReader(self.connection, self.server.patience)
        self.rfile.close()
        self.rfile = io.BufferedReader(self.timed, PIECE)

    def do_GET(self) -> None:
        if self.path != "/health":
            return self._error(404, f"There is no {self.path}: ask GET /health or POST /score.")
        self._answer(200, json.dumps({"status": "ok", "reward": reward_name(self.server.reward), "content": self.server.content}).encode())

    def do_POST(self) -> None:
        if self.path != "/score":
            return self._error(404, f"There is no {self.path}: ask GET /health or POST /score.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            return self._error(411, "The request needs a Content-Length.")
        if len(length) > 18 or int(length) > self.server.max_body:
            return self._error(413, f"The request has {length[:18]} bytes, {self.server.max_body} are allowed: send fewer images, or raise --max_body_mb.")
        with contextlib.ExitStack() as held:
            try:
                body = self._body(int(length), held)
            except TimeoutError:
                return self._error(408, f"The request did not arrive: each {PIECE} bytes have {self.server.patience:g} s.")
            except EOFError as error:
                return self._error(400, str(error))
            except Busy:
                return self._error(503, BUSY)
            status, answer = self._score(body)
        self._answer(status, answer)

    def _body(self, length: int, held: contextlib.ExitStack) -> bytearray:
        """The request's body. Its room is taken when its first `SMALL_BODY` has come: who only announces holds nothing."""
        body = bytearray()
        while len(body) < length:
            if len(body) == SMALL_BODY:
                held.enter_context(self.server.bodies.take(length - len(body), self.until))
            self.timed.until = min(time.monotonic() + self.server.patience, self.until)
            piece = self.rfile.read(min(PIECE, length - len(body)))
            body += piece
            if not piece:
                raise EOFError(f"The request ended after {len(body)} of {length} bytes.")
        return body

    def _score(self, body: bytearray) -> tuple[int, bytes]:
        """Status and answer. Whatever is wrong with the request or the reward, the client is to learn it and the server to live on."""
        try:
            with self.server.parsing[len(body) > SMALL_BODY]:  # takes some times the body's size
                request = read_request(body)
                body.clear()
            return 200, self.server.score(request, self.until)
        except (Busy, MemoryError):
            return 503, _message(BUSY)
        except Exception as error:
            return 422, _message(f"{type(error).__name__}: {error}")

    def _error(self, status: int, message: str) -> None:
        self._answer(status, _message(message))

    def _answer(self, status: int, body: bytes) -> None:
        self.close_connection = True  # one request a connection; its body may not have been read
        self.connection.settimeout(self.server.patience)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
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
    args = parser.parse_args(argv)
    for flag, value, least, most in (("--port", args.port, 0, 65535), ("--max_body_mb", args.max_body_mb, 1, 2**16)):
        if not least <= value <= most:
            parser.error(f"{flag} must be a whole number from {least} to {most}, got {value}")
    for flag, value in (("--reward", args.reward), ("--host", args.host)):
        if not value.strip():
            parser.error(f"{flag} is empty")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # of a name, and of a device that this machine or this torch lacks
        parser.error(f"--device {args.device!r}: {str(error).splitlines()[0]}")
    return args


def reachable_from_outside(host: str) -> bool:
    """Can other machines connect to a server at this address?"""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def main(argv: list[str] | None = None) -> None:
    """Serve until interrupted."""
    args = parse_args(argv)
    try:  # before the reward is loaded, which may take minutes
        server = RewardServer(None, args.host, args.port, device=args.device, max_body=args.max_body_mb * 2**20)
    except OSError as error:
        raise SystemExit(f"Cannot listen at --host {args.host} --port {args.port}: {error}. Choose another address or port (0 for any that is free).") from None
    with server:
        server.reward = load_reward(args.reward, device=args.device, **model_option(args.reward_model))
        made_of = [content(name) or name for name in (args.reward, args.reward_model or "")]
        server.content = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()  # no path of this machine goes out
        print(f"Serving {args.reward} at {server.url}", flush=True)
        if reachable_from_outside(args.host):
            print(f"Warning: --host {args.host} lets every machine in reach use this server; it asks for no password and encrypts nothing.", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("Stopped.")


if __name__ == "__main__":
    main()
