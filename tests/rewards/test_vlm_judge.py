"""The judge by a vision-language model: what it is shown, and answers that ramble."""

import base64
import io
import json
import math
import threading

import pytest
import torch
from PIL import Image
from reward_servers import PROMPTS, QUICK, faulty, no_proxy, sleeps  # noqa: F401

from diffusers_align.rewards import load_reward, score, web
from diffusers_align.rewards.vlm_judge import VLMJudge, parse_mark


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Score: 7", 7), ("7.5", 7.5), ("**Score:** 8/10", 8), ("I'd say 9 out of 10.", 9), ("2 dogs, 3 cats. Score: 4", 4), ("The score is 6", 6),
        ("Score: 0", 0), ("Score: 11", math.nan), ("Score: -1", math.nan), ("good", math.nan), ("2 or 3", math.nan), ("", math.nan),
        ("Score (0-10): 8", 8), ("Score [1 to 10]: 6.5", 6.5), ("Score: 7,5", 7.5), ("On a scale from 0 to 10 I give it 9", 9), ("Score: 8-10", math.nan),
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
