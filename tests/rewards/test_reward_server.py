"""The reward server among clients that are slow, dead, greedy or lying, and the client of servers that drip, redirect and answer nonsense."""

import base64
import io
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from reward_servers import GOOD, PROMPTS, QUICK, faulty, free_port, judged, no_proxy, serving  # noqa: F401

from diffusers_align.rewards import RewardError, load_reward, score, server, web, wire
from diffusers_align.rewards.base import score_columns
from diffusers_align.rewards.remote import RemoteReward
from diffusers_align.rewards.server import RewardServer, Room
from diffusers_align.rewards.wire import decode_scores, encode_request, read_request
from diffusers_align.training.flags.common import TrainingArguments
from diffusers_align.training.flags.options import parse
from diffusers_align.training.report.evaluation import load_rewards

torch.set_num_threads(1)


def raw(running, *pieces, answer=True):
    """Send bytes as they are; what the server says."""
    with socket.create_connection(running.server_address, timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
        if not answer:
            return None
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionResetError:  # the server closes with something unread
            pass
        return received


def head(length):
    return b"POST /score HTTP/1.1\r\nContent-Length: %s\r\n\r\n" % str(length).encode()


def status(answer):
    return int(answer.split()[1])


# --- memory --------------------------------------------------------------------------------------------------------------


def test_room_is_shared_waited_for_and_given_back():
    room, order = Room(10), []
    soon = lambda: time.monotonic() + 10  # noqa: E731

    def second():
        with room.take(6, soon()):
            order.append("second")

    with room.take(6, soon()), room.take(4, soon()):
        thread = threading.Thread(target=second)
        thread.start()
        with pytest.raises(server.Busy), room.take(1, time.monotonic() + 0.05):
            pass
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and room.free == 10
    with pytest.raises(ZeroDivisionError), room.take(10, soon()):
        raise ZeroDivisionError
    assert room.free == 10


def test_turns_alternate_between_kinds_where_both_wait():
    turns, order, later = server.Turns(), [], lambda: time.monotonic() + 10

    def go(large):
        with turns.take(large, later()):
            order.append(large)

    with turns.take(True, later()):
        waiting = [threading.Thread(target=go, args=(large,)) for large in (True, True, True, False)]
        for thread in waiting:
            thread.start()
        while turns.waiting != {True: 3, False: 1}:
            time.sleep(0.01)
        with pytest.raises(server.Busy), turns.take(False, time.monotonic() + 0.05):
            pass
    for thread in waiting:
        thread.join(10)
    assert order == [False, True, True, True] and turns.waiting == {True: 0, False: 0} and not turns.busy


def test_large_requests_are_unpacked_one_at_a_time_and_small_ones_come_between(monkeypatch):
    monkeypatch.setattr(server, "SMALL_VALUES", 1000)
    unpack, unpacked, most, order = wire.ScoreRequest.images, [0], [0], []

    def counted(request):
        unpacked[0] += 1
        most[0] = max(most[0], unpacked[0])
        return unpack(request)

    def slow(images, prompts, **columns):
        if images[0].numel() > 1000:
            time.sleep(0.15)
        order.append(images.shape[-1])
        unpacked[0] -= 1
        return torch.zeros(len(prompts))

    monkeypatch.setattr(wire.ScoreRequest, "images", counted)
    with serving(RewardServer(slow)) as running:
        reward = RemoteReward(running.url, timeout=20.0, retries=0)
        large = [threading.Thread(target=reward, args=(torch.rand(1, 3, 32, 32), ["a"])) for _ in range(8)]
        for thread in large:
            thread.start()
        while not order:  # the first large one is through
            time.sleep(0.01)
        started = time.monotonic()
        reward(torch.rand(1, 3, 4, 4), ["a"])
        waited = time.monotonic() - started
        for thread in large:
            thread.join(20)
    assert most[0] == 1 and sorted(order) == [4] + [32] * 8
    assert order.index(4) <= 3 and waited < 0.15 * 5, "a small request waits for all large ones"


def bomb(side):
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_what_a_request_unpacks_to_is_known_before_it_is_unpacked(monkeypatch):
    ask = lambda files: json.dumps({"format": "png", "images": files, "frames": None, "prompts": ["a"] * len(files), "columns": {}}).encode()  # noqa: E731
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("unpacked"))
    assert read_request(ask([bomb(3000)] * 2)).values == 2 * 3 * 3000**2
    monkeypatch.setattr(wire, "MAX_VALUES", 1000)
    with pytest.raises(ValueError, match="2 images of 3000 x 3000 are too many"):
        read_request(ask([bomb(3000)] * 2))
    exact = read_request(encode_request(torch.rand(1, 3, 4, 5), ["a"], {}, "safetensors"))
    assert 60 <= exact.values < 200 and exact.images().shape == (1, 3, 4, 5)
    with pytest.raises(ValueError, match="are too many, 1000 are allowed"):
        read_request(encode_request(torch.rand(1, 3, 40, 50), ["a"], {}, "safetensors"))
    with pytest.raises(ValueError, match="brackets and commas"):
        monkeypatch.setattr(wire, "MAX_PARTS", 1000)
        read_request(b'{"prompts": [' + b"[]," * 1000 + b"[]]}")


def test_bodies_share_room_and_who_only_announces_takes_none(monkeypatch):
    monkeypatch.setattr(server, "SMALL_BODY", server.PIECE)
    with serving(RewardServer(judged, max_body=2**20, patience=1.0, deadline=3.0)) as running:
        room = running.bodies.free
        assert room == server.MAX_BODIES * 2**20
        announced = [socket.create_connection(running.server_address, timeout=10) for _ in range(8)]
        for connection in announced:
            connection.sendall(head(2**20) + b"x" * 100)
        half = socket.create_connection(running.server_address, timeout=10)
        half.sendall(head(2**20) + b"x" * 2 * server.PIECE)
        for _ in range(100):
            if running.bodies.free < room:
                break
            time.sleep(0.01)
        assert running.bodies.free == room - (2**20 - server.PIECE), "the announcements took none"
        images = torch.rand(4, 3, 100, 90)
        RemoteReward(running.url, **QUICK)(images, ["a"] * 4)
        for connection in (*announced, half):
            connection.close()
        for _ in range(300):
            if running.bodies.free == room:
                break
            time.sleep(0.01)
        assert running.bodies.free == room


# --- time ----------------------------------------------------------------------------------------------------------------


def test_slow_clients_are_cut_off_and_others_served_meanwhile():
    with serving(RewardServer(judged, patience=1.5)) as running:
        stop, slow = threading.Event(), []

        def drip(connection):  # a byte now and then, of the head or of the body
            try:
                while not stop.wait(0.1):
                    connection.sendall(b"x")
            except OSError:
                pass

        for i in range(16):
            connection = socket.create_connection(running.server_address, timeout=10)
            connection.sendall(head(10**7) if i % 2 else b"POST /score HTTP/1.1\r\nX: ")
            slow.append(connection)
            threading.Thread(target=drip, args=(connection,), daemon=True).start()
        started = time.monotonic()
        for _ in range(3):
            RemoteReward(running.url, timeout=5.0, retries=0)(torch.rand(2, 3, 4, 4), PROMPTS)
        assert time.monotonic() - started < 1.4, "served while the slow ones were there"
        answers = []
        for connection in slow:
            try:
                answers.append(connection.recv(1000))
            except ConnectionResetError:
                answers.append(b"")
        stop.set()
        assert time.monotonic() - started < 5
        assert sum(answer.startswith(b"HTTP/1.1 408") for answer in answers) >= 1 and all(b" 200 " not in answer for answer in answers)


def test_a_request_whose_turn_does_not_come_is_told_to_come_back():
    inside, go = threading.Event(), threading.Event()

    def hangs(images, prompts, **columns):
        inside.set()
        go.wait(20)
        return torch.zeros(len(prompts))

    with serving(RewardServer(hangs, deadline=0.4)) as running:
        first = threading.Thread(target=lambda: RemoteReward(running.url, timeout=20.0)(torch.rand(1, 3, 4, 4), ["a"]), daemon=True)
        first.start()
        assert inside.wait(10)
        started = time.monotonic()
        with pytest.raises(web.Unreachable, match="503 .*Too many requests"):
            RemoteReward(running.url, timeout=10.0, retries=0)(torch.rand(1, 3, 4, 4), ["a"])
        assert 0.3 < time.monotonic() - started < 5
        go.set()
        first.join(20)


def test_connections_have_a_limit_and_idle_ones_end(monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 4)
    with serving(RewardServer(judged, patience=0.5)) as running:
        idle = [socket.create_connection(running.server_address, timeout=10) for _ in range(6)]
        assert sorted(connection.recv(10) for connection in idle) == [b""] * 6
        RemoteReward(running.url, **QUICK)(torch.rand(2, 3, 4, 4), PROMPTS)


# --- lies, and clients that die --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, expected", [("9" * 5000, 413), ("9" * 19, 413), ("-1", 411), ("1e3", 411), ("", 411), ("²", 411), ("0x10", 411), ("+5", 411), (str(2**40), 413)]
)
def test_lengths_that_are_none(length, expected, capsys):
    with serving(RewardServer(judged)) as running:
        answer = raw(running, b"POST /score HTTP/1.1\r\nContent-Length: " + length.encode() + b"\r\n\r\n")
        assert status(answer) == expected and len(answer) < 1000
    assert capsys.readouterr().err == ""


def test_half_a_body_is_named():
    with serving(RewardServer(judged, patience=5.0)) as running, socket.create_connection(running.server_address, timeout=10) as connection:
        connection.sendall(head(100) + b"{")
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
        assert status(answer) == 400 and b"ended after 1 of 100 bytes" in answer


def test_clients_that_die_leave_no_trace(capsys):
    inside = threading.Semaphore(0)

    def slow(images, prompts, **columns):
        inside.release()
        time.sleep(0.1)
        return torch.zeros(len(prompts))

    body = encode_request(torch.rand(1, 3, 4, 4), ["a"], {}, "safetensors")
    with serving(RewardServer(slow)) as running:
        for _ in range(3):
            connection = socket.create_connection(running.server_address, timeout=10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(head(len(body)) + body)
            assert inside.acquire(timeout=10)
            connection.close()
        raw(running, head(100) + b"{", answer=False)
        raw(running, b"POST /sc", answer=False)
        RemoteReward(running.url, **QUICK)(torch.rand(1, 3, 4, 4), ["a"])
        time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_a_reward_that_fails_to_reach_something_is_the_rewards_failure():
    for error in (ConnectionError("database"), TimeoutError("database"), SystemExit(0)):

        def failing(images, prompts, **columns):
            raise error

        with serving(RewardServer(failing)) as running, pytest.raises(RewardError, match="422 .*(Error: database|called sys.exit)"):
            RemoteReward(running.url, **QUICK)(torch.rand(1, 3, 4, 4), ["a"])


def test_columns_of_any_name_cross_the_wire():
    def given(images, prompts, **columns):
        return torch.tensor([float(value) for value in columns["reward"]]) + len(columns["on_invalid"])

    with serving(RewardServer(given)) as running:
        reward = RemoteReward(running.url, **QUICK)
        assert score_columns(reward, torch.rand(2, 3, 4, 4), PROMPTS, {"reward": [1, 2], "on_invalid": ["a", "b"]})["reward"].tolist() == [3, 4]
        body = json.loads(encode_request(torch.rand(1, 3, 4, 4), ["a"], {}, "safetensors")) | {"columns": {"images": [1]}}
        with pytest.raises(web.RequestRefused, match="422 .*multiple values for argument 'images'.*rename a column"):
            web.request(f"{running.url}/score", json.dumps(body).encode())


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max_body_mb", "-1"], "--max_body_mb must be a whole number from 1 to 65536, got -1"),
        (["--max_body_mb", "0"], "--max_body_mb must be"),
        (["--port", "70000"], "--port must be a whole number from 0 to 65535, got 70000"),
        (["--port", "-1"], "--port must be"),
        (["--host", ""], "--host is empty"),
        (["--reward", " "], "--reward is empty"),
        (["--device", "gpu"], "--device 'gpu': "),
    ],
)
def test_flags_of_the_server_are_checked(flags, message, capsys):
    with pytest.raises(SystemExit) as left:
        server.main(["--reward", "jpeg_compressibility", *flags])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_port_in_use_and_an_open_door_are_said(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(server, "load_reward", lambda *a, **k: pytest.fail("loaded before the address was tried"))
        with pytest.raises(SystemExit, match=f"Cannot listen at --host 127.0.0.1 --port {port}: .*in use.* Choose another address or port"):
            server.main(["--reward", "jpeg_compressibility", "--port", port])
    monkeypatch.setattr(server, "load_reward", load_reward)
    monkeypatch.setattr(RewardServer, "serve_forever", lambda self: None)
    monkeypatch.setattr(RewardServer, "server_bind", lambda self: setattr(self, "server_address", ("0.0.0.0", 1)))
    monkeypatch.setattr(RewardServer, "server_activate", lambda self: None)
    for host, warned in (("0.0.0.0", True), ("192.0.2.1", True), ("some-machine", True), ("127.0.0.1", False), ("localhost", False), ("::1", False)):
        server.main(["--reward", "jpeg_compressibility", "--host", host, "--device", "cpu"])
        assert (f"Warning: --host {host} lets every machine" in capsys.readouterr().err) == warned


# --- the client ------------------------------------------------------------------------------------------------------------


def drips(start):
    """A server that sends `start` and then a byte every 50 ms for 3 s."""

    def handle(handler):
        handler.wfile.write(start)
        try:
            for _ in range(60):
                handler.wfile.write(b" ")
                time.sleep(0.05)
        except OSError:
            pass
        handler.close_connection = True

    return handle


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 500 No\r\n\r\n"])
def test_a_dripping_server_is_given_up_in_time(start):
    with faulty(drips(start)) as running:
        reward, started = RemoteReward(running.url, timeout=0.4, retries=1, backoff=0.01), time.monotonic()
        with pytest.raises(ConnectionError, match="in 2 attempts of at most 0.4 s: .*Is the server still running. --reward_retries"):
            reward(torch.rand(1, 3, 4, 4), ["a"])
        assert time.monotonic() - started < 3


def test_redirects_are_refused():
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", "file:///etc/hostname")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with faulty(redirect) as running:
        with pytest.raises(RewardError, match="302 .*Redirects are not followed: give the address that it names, 'file:///etc/hostname'"):
            RemoteReward(running.url, **QUICK)(torch.rand(1, 3, 4, 4), ["a"])
        assert len(running.requests) == 1


def test_numbers_beyond_floats_and_names_with_control_characters():
    with faulty(b'{"scores": {"reward": [1' + b"0" * 400 + b"]}}") as running:
        with pytest.raises(RewardError, match="a whole number beyond the range of floats"):
            score(RemoteReward(running.url, **QUICK), torch.rand(1, 3, 4, 4), ["a"])
    with pytest.raises(ValueError, match="no JSON"):
        decode_scores(b'{"scores": {"reward": [1' + b"0" * 5000 + b"]}}")
    with faulty(GOOD) as running:
        name = json.dumps({"reward": "\x1b[31mred" + "x" * 9000}).encode()
        running.RequestHandlerClass = type("Named", (running.RequestHandlerClass,), {"do_GET": lambda self: self._send(200, name)})
        served = RemoteReward(running.url, **QUICK).served
        assert len(served) == 200 and served.isprintable() and served.startswith(" [31mred")


def test_a_server_that_comes_back_is_waited_for(monkeypatch):
    pauses = []
    monkeypatch.setattr(web, "time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    with pytest.raises(web.Unreachable, match="9 attempts"):
        web.request(f"http://127.0.0.1:{free_port()}", retries=8, timeout=1.0)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_reward_retries_reach_the_client_and_mean_something(capsys, tmp_path):
    with serving(RewardServer(judged)) as running:
        assert load_reward(running.url, retries=7).patience["retries"] == 7
        total = load_reward(f"{running.url} + jpeg_compressibility", retries=7)
        assert total.rewards[0].patience["retries"] == 7
        (reward,) = load_rewards([running.url], None, torch.device("cpu"), 9).values()
        assert reward.patience["retries"] == 9
    argv = ["--pretrained_model_name_or_path", "mini-sd3", "--prompts", "mini_train", "--output_dir", str(tmp_path)]
    assert parse(TrainingArguments, [*argv, "--reward", "http://127.0.0.1:1", "--reward_retries", "0"]).reward_retries == 0
    for reward, retries, message in (("jpeg_compressibility", "3", "is for rewards that ask a server"), ("http://127.0.0.1:1", "-1", "-1")):
        with pytest.raises(SystemExit):
            parse(TrainingArguments, [*argv, "--reward", reward, "--reward_retries", retries])
        err = capsys.readouterr().err
        assert "--reward_retries" in err and message in err
