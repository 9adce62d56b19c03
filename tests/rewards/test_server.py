"""The reward server among clients that are slow, dead, greedy or lying."""

import socket
import threading
import time

import pytest
import torch
from reward_servers import (  # noqa: F401
    PROMPTS,  # noqa: F401
    QUICK,
    judged,
    no_proxy,
    serving,
)

from diffusers_align.rewards import RewardError, load_reward, server, web, wire
from diffusers_align.rewards.remote import RemoteReward
from diffusers_align.rewards.server import RewardServer, Room
from diffusers_align.rewards.wire import encode_request


def test_the_server_has_limits():
    with serving(RewardServer(judged, max_body=1000, patience=0.3)) as running:
        with pytest.raises(RewardError, match="413 .*bytes, 1000 are allowed: send fewer images, or raise --max_body_mb"):
            RemoteReward(running.url, **QUICK)(torch.rand(4, 3, 64, 64), ["a"] * 4)
        with pytest.raises(web.RequestRefused, match="404 .*There is no /other: ask GET /health or POST /score"):
            web.request(f"{running.url}/other", b"{}")
        with pytest.raises(web.RequestRefused, match="422 .*'prompts' must be a list"):
            web.request(f"{running.url}/score", b"{}")

        def raw(head, sent):
            with socket.create_connection(running.server_address, timeout=10) as connection:
                connection.sendall(head + sent)
                return connection.makefile("rb").read()

        assert b"411" in raw(b"POST /score HTTP/1.1\r\n\r\n", b"").split(b"\r\n")[0]
        started = time.monotonic()
        raw(b"POST /score HTTP/1.1\r\nContent-Length: 900\r\n\r\n", b"{")  # never sends the rest
        assert time.monotonic() - started < 5


def test_the_server_scores_one_request_at_a_time():
    running_now, most = [0], [0]

    def counted(images, prompts, **columns):
        running_now[0] += 1
        most[0] = max(most[0], running_now[0])
        time.sleep(0.02)
        running_now[0] -= 1
        return images[:, 0, 0, 0]

    with serving(RewardServer(counted)) as running:
        reward, answers = RemoteReward(running.url, **QUICK), {}
        ask = lambda i: answers.update({i: reward(torch.full((1, 3, 4, 4), float(i)), ["a"])["reward"].item()})  # noqa: E731
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert answers == {i: float(i) for i in range(5)} and most[0] == 1


def test_a_busy_server_is_asked_again():
    inside, go = threading.Event(), threading.Event()

    def slow(images, prompts, **columns):
        inside.set()
        go.wait(10)
        return torch.ones(len(prompts))

    with serving(RewardServer(slow, max_waiting=1)) as running:
        reward = RemoteReward(running.url, **QUICK)
        first = threading.Thread(target=reward, args=(torch.rand(1, 3, 4, 4), ["a"]))
        first.start()
        inside.wait(10)
        with pytest.raises(web.Unreachable, match="3 attempts .*503 .*Too many requests"):
            reward(torch.rand(1, 3, 4, 4), ["a"])
        go.set()
        first.join()
        assert reward(torch.rand(1, 3, 4, 4), ["a"])["reward"].tolist() == [1.0]


def test_the_command_serves_until_interrupted(monkeypatch, capsys):
    serve, seen = RewardServer.serve_forever, []

    def interrupted(self):
        def ask():
            try:
                seen.append(RemoteReward(self.url, **QUICK).served)
            finally:
                self.shutdown()

        threading.Thread(target=ask, daemon=True).start()
        serve(self, poll_interval=0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardServer, "serve_forever", interrupted)
    server.main(["--reward", "jpeg_compressibility", "--port", "0", "--device", "cpu"])
    out = capsys.readouterr().out
    assert seen == ["jpeg_compressibility"] and "Serving jpeg_compressibility at http://127.0.0.1:" in out and out.endswith("Stopped.\n")


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
    unpack, unpacked, most, order = wire.ScoreRequest.unpacked, [0], [0], []

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

    monkeypatch.setattr(wire.ScoreRequest, "unpacked", counted)
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
        (["--device", "xpu:99"], "--device 'xpu:99': "),  # a name of a device that is not there
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
