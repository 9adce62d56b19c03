"""Rewards that fail: servers that die, hang and answer nonsense, judges that ramble, and what a run makes of all that."""

import base64
import io
import json
import math
import socket
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from reward_servers import GOOD, PROMPTS, QUICK, FaultyHandler, dies, faulty, free_port, judged, no_proxy, resets, serving, sleeps  # noqa: F401
from safetensors.torch import save
from script_runs import rows, train

from diffusers_align.data.prompts import Prompt
from diffusers_align.rewards import InvalidReward, RewardError, RewardTimeout, load_reward, score, server, web
from diffusers_align.rewards.remote import RemoteReward
from diffusers_align.rewards.server import RewardServer
from diffusers_align.rewards.vlm_judge import VLMJudge, parse_mark
from diffusers_align.rewards.wire import decode_request, decode_scores, encode_request, encode_scores
from diffusers_align.training.online.scoring import MAX_PENDING, OverTime, Scorer, gather_scores, within

torch.set_num_threads(1)


# --- what is sent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 3, 5, 7)])
def test_images_survive(shape):
    images = torch.rand(shape)
    exact, prompts, columns = decode_request(encode_request(images, PROMPTS, {"weight": [1, None]}, "safetensors"))
    assert torch.equal(exact, images) and prompts == PROMPTS and columns == {"weight": [1, None]}
    rounded, _, _ = decode_request(encode_request(images, PROMPTS, {}, "png"))
    assert torch.equal(rounded, (images * 255).round() / 255) and not torch.equal(rounded, images)


def test_scores_survive_to_the_last_bit():
    values = torch.tensor([0.1, 1e-42, -3.4e38, math.nan, math.inf, 1 / 3])
    back = decode_scores(encode_scores({"reward": values}))["reward"]
    assert torch.equal(back[[0, 1, 2, 5]], values[[0, 1, 2, 5]]) and back[3:5].isnan().all()
    json.loads(encode_scores({"reward": values}), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def request_body(**changes):
    return json.dumps(json.loads(encode_request(torch.rand(2, 3, 4, 4), PROMPTS, {}, "safetensors")) | changes).encode()


def png_of(*size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    "body, message",
    [
        (b"\x80\x04N.", "no JSON"),
        (b"[1]", "no JSON object"),
        (b"[" * 100000, "no JSON"),
        (request_body(prompts="a cat"), "'prompts' must be a list of strings"),
        (request_body(prompts=["a cat"]), "2 images and 1 prompts"),
        (request_body(format="pickle"), "'format' must be one of safetensors, png, got 'pickle'"),
        (request_body(columns={"weight": [1]}), "'columns' must be an object of lists of 2"),
        (request_body(images=3), "must hold base64"),
        (request_body(images="%%%"), "no base64"),
        (request_body(images=base64.b64encode(b"x" * 50).decode()), "no safetensors file"),
        (request_body(images=base64.b64encode(save({"images": torch.zeros(2, 3, 4, 4).half()})).decode()), "float32 tensor 'images'"),
        (request_body(images=base64.b64encode(save({"other": torch.zeros(2, 3, 4, 4)})).decode()), "float32 tensor 'images'"),
        (request_body(images=[], format="png"), "a list of base64 PNG files"),
        (request_body(images=[base64.b64encode(b"GIF89a").decode()] * 2, format="png"), "no PNG file"),
        (request_body(images=[png_of(4, 4), png_of(4, 5)], format="png"), "one size"),
        (request_body(images=[png_of(4, 4)] * 2, format="png", frames=3), "'frames' must be"),
        (request_body(images=[png_of(8000, 8000)] * 2, format="png"), "8000 x 8000 are too many"),
    ],
)
def test_bad_requests_are_named(body, message):
    with pytest.raises(ValueError, match=message):
        decode_request(body)


def test_what_json_cannot_say_is_named():
    with pytest.raises(ValueError, match="columns as JSON: .*set"):
        encode_request(torch.rand(1, 3, 4, 4), ["a"], {"weight": [{1}]}, "safetensors")
    with pytest.raises(ValueError, match="PNG files have no NaN"):
        encode_request(torch.full((1, 3, 4, 4), torch.nan), ["a"], {}, "png")


# --- client and server -------------------------------------------------------------------------------------------------


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


def post(url, body, headers=None):
    return urllib.request.Request(url, body, headers or {}, method="POST")


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


# --- VLM judge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Score: 7", 7), ("7.5", 7.5), ("**Score:** 8/10", 8), ("I'd say 9 out of 10.", 9), ("2 dogs, 3 cats. Score: 4", 4), ("The score is 6", 6),
        ("Score: 0", 0), ("Score: 11", math.nan), ("Score: -1", math.nan), ("good", math.nan), ("2 or 3", math.nan), ("", math.nan),
    ],
)  # fmt: skip
def test_parse_mark(text, expected):
    assert parse_mark(text, 10) == pytest.approx(expected, nan_ok=True)


def completion(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def judge(url, **options):
    return VLMJudge("some-vlm", f"{url}/v1", **QUICK | {"concurrency": 1} | options)


def test_the_judge_is_shown_the_image_and_the_rubric(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    images = (torch.rand(2, 3, 6, 5) * 255).round() / 255
    with faulty(completion("Score: 5"), completion("Score: 10")) as running:
        reward = judge(running.url, rubric="Rate {prompt} to {scale}, {x}", api_key_variable="MY_KEY", options={"max_tokens": 5})
        assert score(reward, images, PROMPTS)["reward"].tolist() == [0.5, 1.0]
    path, headers, body = running.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["model"] == "some-vlm" and body["max_tokens"] == 5
    text, picture = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Rate a cat to 10, {x}"}
    kind, _, data = picture["image_url"]["url"].partition(",")
    shown = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(data))).tobytes())).view(6, 5, 3).permute(2, 0, 1) / 255
    assert kind == "data:image/png;base64" and torch.equal(shown, images[0])


def test_the_judge_of_a_video_sees_frames_from_first_to_last():
    video = (torch.arange(20) / 255).view(1, 20, 1, 1, 1).expand(1, 20, 3, 4, 4)
    with faulty(completion("3")) as running:
        assert judge(running.url, max_frames=3)(video, ["a"]).tolist() == pytest.approx([0.3])
    files = [part["image_url"]["url"].partition(",")[2] for part in running.requests[0][2]["messages"][0]["content"][1:]]
    assert [Image.open(io.BytesIO(base64.b64decode(f))).getpixel((0, 0))[0] for f in files] == [0, 10, 19]
    assert "Authorization" not in running.requests[0][1] or running.requests[0][1]["Authorization"]


def test_what_the_judge_cannot_say_is_nan(caplog):
    with faulty(completion("lovely"), (500, b"{}"), (500, b"{}"), (500, b"{}"), b"garbage", b"[]", (503, b""), completion("8")) as running:
        result = judge(running.url)(torch.rand(5, 3, 4, 4), ["a", "b", "c", "d", "e"])
    assert result.tolist() == pytest.approx([math.nan, math.nan, math.nan, math.nan, 0.8], nan_ok=True)
    assert (
        "No mark for 'a': lovely" in caplog.text and "No mark for 'b': No answer from" in caplog.text and "No mark for 'c': (no chat completion)" in caplog.text
    )


def test_a_judge_that_is_down_or_refuses_is_an_error():
    with faulty((500, b"down")) as running, pytest.raises(ConnectionError, match="500 .*: down"):
        judge(running.url)(torch.rand(2, 3, 4, 4), PROMPTS)
    with faulty((401, b'{"error": {"message": "Incorrect API key"}}')) as running, pytest.raises(web.RequestRefused, match="401 .*Incorrect API key"):
        judge(running.url)(torch.rand(2, 3, 4, 4), PROMPTS)
    with faulty(sleeps) as running, pytest.raises(ConnectionError, match="timed out"):
        judge(running.url, timeout=0.2)(torch.rand(1, 3, 4, 4), ["a"])


def test_the_judge_asks_for_several_images_at_a_time():
    barrier = threading.Barrier(3, timeout=10)

    def together(handler):
        barrier.wait()
        return completion("2")

    with faulty(together) as running:
        assert judge(running.url, concurrency=3)(torch.rand(3, 3, 4, 4), ["a", "b", "c"]).tolist() == pytest.approx([0.2] * 3)


def test_the_judge_needs_a_model_and_an_address(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="--reward_model NAME.*OPENAI_BASE_URL"):
        load_reward("vlm_judge")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1/")
    assert load_reward("vlm_judge", model="m").url == "http://localhost:8000/v1/chat/completions"


# --- scoring in a run --------------------------------------------------------------------------------------------------

ASKED = [Prompt(f"prompt {i}", {"weight": i}) for i in range(4)]


def raises_on(*bad):
    def picky(images, prompts, weight, **columns):
        if set(weight) & set(bad):
            raise ZeroDivisionError("too bad")
        return torch.tensor([float(w) for w in weight])

    return picky


def values(result):
    return [row["reward"] for row in result]


def test_an_exception_names_the_prompts_or_costs_only_its_samples():
    images = torch.rand(4, 3, 4, 4)
    message = "'picky' raised ZeroDivisionError: too bad, for 4 images of the prompts 'prompt 0', 'prompt 1', 'prompt 2', .... .*--invalid_rewards mask"
    with pytest.raises(RewardError, match=message) as caught:
        Scorer(raises_on(2))(images, ASKED)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    scorer = Scorer(raises_on(2), on_failure="mask")
    assert values(scorer(images, ASKED)) == pytest.approx([0, 1, math.nan, 3], nan_ok=True)
    assert len(scorer.failures) == 1 and "for 1 images of the prompts 'prompt 2'" in scorer.failures[0]


def test_a_server_that_is_down_is_not_asked_for_each_sample():
    calls = []

    def down(images, prompts, **columns):
        calls.append(len(prompts))
        raise web.Unreachable("gone")

    assert all(value != value for value in values(Scorer(down, on_failure="mask")(torch.rand(4, 3, 4, 4), ASKED))) and calls == [4]


def test_a_wrong_shape_is_an_error_even_when_masking():
    with pytest.raises(InvalidReward, match="shape"):
        Scorer(lambda images, prompts, **columns: torch.zeros(1, 1), on_nan="mask", on_failure="mask")(torch.rand(2, 3, 4, 4), ASKED[:2])


def test_a_hanging_reward_is_given_up():
    release, calls = threading.Event(), []

    def hangs(images, prompts, **columns):
        calls.append(len(prompts))
        release.wait(20)
        return torch.zeros(len(prompts))

    try:
        with pytest.raises(RewardTimeout, match="'hangs' gave no answer in 0.1 s, for 4 images of the prompts 'prompt 0'.*--reward_timeout"):
            Scorer(hangs, timeout=0.1)(torch.rand(4, 3, 4, 4), ASKED)
        scorer = Scorer(hangs, on_failure="mask", timeout=0.1)
        assert all(value != value for value in values(scorer(torch.rand(4, 3, 4, 4), ASKED))) and calls == [4, 4]
    finally:
        release.set()


def test_within():
    assert within(None, lambda: 3) == within(5, lambda: 3) == 3
    with pytest.raises(TimeoutError, match="mine"):
        within(5, lambda: (_ for _ in ()).throw(TimeoutError("mine")))
    with pytest.raises(OverTime):
        within(0.05, lambda: time.sleep(1))
    with pytest.raises(RewardError, match="raised TimeoutError: mine"):
        Scorer(lambda images, prompts, **columns: (_ for _ in ()).throw(TimeoutError("mine")), timeout=5)(torch.rand(1, 3, 4, 4), ASKED[:1])


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_the_background_changes_no_bit_and_no_order(timeout):
    batches = [torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    layer = torch.nn.Conv2d(3, 8, 3)

    def convolved(images, prompts, **columns):
        assert not torch.is_grad_enabled()
        time.sleep(0.01 * float(images[0, 0, 0, 0]))
        return layer(images).relu().flatten(1).mean(1)

    results = []
    for background in (False, True):
        with Scorer(convolved, timeout=timeout, background=background) as scorer:
            for i, images in enumerate(batches):
                scorer.submit([10 * i, 10 * i + 1], images, ASKED[:2])
            results.append(scorer.finish())
    assert results[0] == results[1] and [key for key, _ in results[0]] == [10 * i + j for i in range(6) for j in range(2)]


def test_the_background_overlaps_is_bounded_and_scores_one_batch_at_a_time():
    gate, running, most, submitted = threading.Semaphore(0), [0], [0], []

    def gated(images, prompts, **columns):
        running[0] += 1
        most[0] = max(most[0], running[0])
        assert gate.acquire(timeout=20)
        running[0] -= 1
        return torch.zeros(len(prompts))

    def submit_all(scorer):
        for i in range(6):
            scorer.submit([i], torch.rand(1, 3, 4, 4), ASKED[:1])
            submitted.append(i)

    with Scorer(gated, background=True) as scorer:
        main = threading.Thread(target=submit_all, args=(scorer,))
        main.start()
        time.sleep(0.3)
        assert len(submitted) == MAX_PENDING, "sampling went on without any score, but not without bound"
        for _ in range(6):
            gate.release()
        main.join(20)
        assert len(scorer.finish()) == 6 and most[0] == 1


def test_exceptions_in_the_background_surface():
    with Scorer(raises_on(0), background=True) as scorer, pytest.raises(RewardError, match="too bad"):
        scorer.submit([0], torch.rand(1, 3, 4, 4), ASKED[:1])
        scorer.finish()


def finished_run(scorer, capsys):
    run = SimpleNamespace(print=print)
    return gather_scores(run, scorer, ASKED), capsys.readouterr().out


def test_samples_without_a_reward_are_named_and_none_with_one_is_an_error(capsys):
    scorer = Scorer(lambda i, p, weight: {"reward": raises_on(1)(i, p, weight), "extra": torch.ones(len(p))}, on_failure="mask")
    scorer.submit([2, 3, 0, 1], torch.rand(4, 3, 4, 4), [ASKED[i] for i in (2, 3, 0, 1)])
    scores, out = finished_run(scorer, capsys)
    assert scores["reward"].tolist() == pytest.approx([0, math.nan, 2, 3], nan_ok=True)
    assert scores["extra"].tolist() == pytest.approx([1, math.nan, 1, 1], nan_ok=True)
    assert "no score for 1 of 4 samples. Prompts: 'prompt 1'." in out and "ZeroDivisionError: too bad" in out

    scorer = Scorer(raises_on(*range(4)), on_failure="mask")
    scorer.submit(range(4), torch.rand(4, 3, 4, 4), ASKED)
    with pytest.raises(InvalidReward, match="no score for 4 of 4 samples.*too bad.*Nothing is left to train on"):
        finished_run(scorer, capsys)


# --- a whole run -------------------------------------------------------------------------------------------------------

TASK = """
import torch


def brightness(images, prompts, weight=None, **columns):
    return images.flatten(1).mean(1) * torch.tensor([float(w) for w in weight])


def afraid_of_dogs(images, prompts, **columns):
    if any("dog" in prompt for prompt in prompts):
        raise RuntimeError("a dog!")
    return images.flatten(1).mean(1)


def always_nan(images, prompts, **columns):
    return torch.full((len(prompts),), torch.nan)
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    prompts = [("a cat on a red background", 0.5), ("two dogs on a blue background", 1.0)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "weight": weight}) + "\n" for text, weight in prompts))
    (folder / "rewards.py").write_text(TASK)
    return folder


def test_a_run_masks_or_stops(task, tmp_path, capsys):
    reward = f"{task / 'rewards.py'}:afraid_of_dogs"
    with pytest.raises(RewardError, match="(?s)'afraid_of_dogs' raised RuntimeError: a dog!.*two dogs on a blue background.*--invalid_rewards mask"):
        train("flow_grpo", tmp_path / "error", task, reward=reward)
    train("flow_grpo", tmp_path / "mask", task, reward=reward, invalid_rewards="mask")
    metrics = rows(tmp_path / "mask")[0]
    assert metrics["invalid_rewards"] == 2 and metrics["reward"] > 0 and metrics["grad_norm"] > 0
    out = capsys.readouterr().out
    assert "no score for 2 of 4 samples. Prompts: 'two dogs on a blue background'" in out and "Left out of the evaluation" in out
    with pytest.raises(InvalidReward, match="(?s)no score for 4 of 4 samples.*Nothing is left to train on"):
        train("flow_grpo", tmp_path / "nothing", task, reward=f"{task / 'rewards.py'}:always_nan", invalid_rewards="mask")
    assert not (tmp_path / "nothing" / "metrics.jsonl").exists()


def test_a_remote_reward_in_the_background_trains_bit_for_bit_the_same(task, tmp_path):
    local = f"{task / 'rewards.py'}:brightness"
    train("flow_grpo", tmp_path / "local", task, reward=local)
    with serving(RewardServer(load_reward(local))) as running:
        train("flow_grpo", tmp_path / "remote", task, reward=running.url, reward_in_background=True, reward_timeout=60)
    assert (tmp_path / "remote" / "metrics.jsonl").read_text() == (tmp_path / "local" / "metrics.jsonl").read_text()
    assert rows(tmp_path / "local")[0]["grad_norm"] > 0
