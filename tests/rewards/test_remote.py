"""The client of a reward's server: servers that die, hang and answer nonsense."""

import json
import time

import pytest
import torch
from reward_servers import GOOD, PROMPTS, QUICK, FaultyHandler, dies, faulty, free_port, judged, no_proxy, resets, serving, sleeps  # noqa: F401

from diffusers_align.rewards import InvalidReward, RewardError, load_reward, score, web
from diffusers_align.rewards.base import score_columns
from diffusers_align.rewards.remote import RemoteReward
from diffusers_align.rewards.server import RewardServer
from diffusers_align.rewards.wire import decode_scores, encode_request
from diffusers_align.training.flags.common import TrainingArguments
from diffusers_align.training.flags.options import parse
from diffusers_align.training.report.evaluation import load_rewards


def test_remote_equals_local_bit_for_bit():
    images = torch.rand(3, 3, 9, 8)
    prompts, weight = [*PROMPTS, "an apple"], [1.5, 2, 3]
    expected = score(judged, images, prompts, on_invalid="mask", weight=weight)
    with serving(RewardServer(judged)) as running:
        assert running.server_address[0] == "127.0.0.1"
        reward = load_reward(running.url)
        assert reward.served == "judged" and reward.name == running.url
        got = score(reward, images, prompts, on_invalid="mask", weight=weight)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name].nan_to_num(-7), expected[name].nan_to_num(-7)) for name in expected)
        assert got["reward"].isnan().tolist() == [False, True, False]
        with pytest.raises(InvalidReward, match="is NaN or infinite for 1 of 3 images. Prompts: 'two dogs'"):
            score(reward, images, prompts, weight=weight)

        rounded = score(load_reward(f"{running.url}?format=png"), images, prompts, on_invalid="mask", weight=weight)["reward"]
        eighth = score(judged, (images * 255).round() / 255, prompts, on_invalid="mask", weight=weight)["reward"]
        assert torch.equal(rounded.nan_to_num(-7), eighth.nan_to_num(-7)) and not torch.equal(rounded[0], expected["reward"][0])

        total = load_reward(f"{running.url}*0.5 + jpeg_compressibility")(images, prompts)
        assert list(total) == ["reward", running.url.removeprefix("http://"), f"{running.url.removeprefix('http://')}/length", "jpeg_compressibility"]


def test_the_servers_error_reaches_the_user():
    def broken(images, prompts, **columns):
        raise KeyError("no such colour")

    with serving(RewardServer(broken)) as running:
        with pytest.raises(RewardError, match="/score answered 422 .*: KeyError: 'no such colour'"):
            RemoteReward(running.url, **QUICK)(torch.rand(1, 3, 4, 4), ["a"])
        running.reward = judged
        RemoteReward(running.url, **QUICK)(torch.rand(1, 3, 4, 4), ["a"])  # the server lives on


@pytest.mark.parametrize("fault", [dies, resets, sleeps, (500, b"oops"), (503, b"{}")])
def test_passing_faults_are_survived_and_lasting_ones_named(fault):
    patience = QUICK | {"timeout": 0.4}
    with faulty(fault, fault, GOOD) as running:
        scores = RemoteReward(running.url, **patience)(torch.rand(2, 3, 4, 4), PROMPTS)["reward"]
        assert scores[0] == 0.25 and scores[1].isnan() and len(running.requests) == 3
    with faulty(fault) as running, pytest.raises(ConnectionError, match=f"No answer from {running.url}/score in 3 attempts of at most 0.4 s: .+"):
        RemoteReward(running.url, **patience)(torch.rand(2, 3, 4, 4), PROMPTS)


@pytest.mark.parametrize(
    "answer, error, message",
    [
        (b"<html>", RewardError, "no JSON"),
        (b'{"result": [1, 2]}', RewardError, "no object 'scores'"),
        (b'{"scores": {"reward": ["a", 1]}}', RewardError, "something else than numbers"),
        (b'{"scores": {"reward": [1]}}', InvalidReward, r"the shape \(1,\) for 'reward', for 2 images"),
        (b'{"scores": {"other": [1, 2], "third": [1, 2]}}', InvalidReward, "none of which is called 'reward'"),
        ((401, b'{"error": {"message": "wrong key"}}'), RewardError, "401 .*: wrong key"),
    ],
)
def test_nonsense_is_no_score(answer, error, message):
    with faulty(answer) as running:
        with pytest.raises(error, match=message):
            score(RemoteReward(running.url, **QUICK), torch.rand(2, 3, 4, 4), PROMPTS)
        assert len(running.requests) == 1, "asking again would not help"


def test_a_wrong_address_fails_before_training():
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RewardError, match=f"no reward server at {address}: .*Start one with `python -m diffusers_align.rewards.server"):
        RemoteReward(address, **QUICK)
    with faulty(GOOD) as running:
        running.RequestHandlerClass = type("Other", (FaultyHandler,), {"do_GET": lambda self: self._send(200, b"hello")})
        with pytest.raises(RewardError, match="/health is no reward server"):
            load_reward(running.url)
    with pytest.raises(ValueError, match="format must be one of"):
        RemoteReward("http://127.0.0.1:1?format=jpeg")


# --- lies, and clients that die --------------------------------------------------------------------------------------------


def test_columns_of_any_name_cross_the_wire():
    def given(images, prompts, **columns):
        return torch.tensor([float(value) for value in columns["reward"]]) + len(columns["on_invalid"])

    with serving(RewardServer(given)) as running:
        reward = RemoteReward(running.url, **QUICK)
        assert score_columns(reward, torch.rand(2, 3, 4, 4), PROMPTS, {"reward": [1, 2], "on_invalid": ["a", "b"]})["reward"].tolist() == [3, 4]
        body = json.loads(encode_request(torch.rand(1, 3, 4, 4), ["a"], {}, "safetensors")) | {"columns": {"images": [1]}}
        with pytest.raises(web.RequestRefused, match="422 .*multiple values for argument 'images'.*rename a column"):
            web.request(f"{running.url}/score", json.dumps(body).encode())


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


def test_a_server_hears():
    sounds = torch.rand(2, 1, 400) * 2 - 1
    with serving(RewardServer(load_reward("spectral_centroid"))) as running:
        remote = load_reward(running.url)
        assert torch.equal(
            score(remote, sounds, PROMPTS, sampling_rate=8000)["reward"], score(load_reward("spectral_centroid"), sounds, PROMPTS, sampling_rate=8000)["reward"]
        )
        with pytest.raises(RewardError, match="judges sounds .* and these are pictures"):
            score(remote, torch.rand(2, 3, 8, 8), PROMPTS)

    def volume(videos, prompts, audio, sampling_rate):
        return audio.abs().mean((1, 2)) * sampling_rate

    with serving(RewardServer(volume)) as running:
        got = score_columns(load_reward(running.url), torch.rand(2, 3, 3, 4, 4), PROMPTS, {"audio": sounds, "sampling_rate": 8000})["reward"]
        torch.testing.assert_close(got, sounds.abs().mean((1, 2)) * 8000)
