"""What goes between a reward's server and its client: images and scores arrive as they were, nonsense is named."""

import base64
import io
import json
import math

import pytest
import torch
from PIL import Image
from reward_servers import PROMPTS, no_proxy  # noqa: F401
from safetensors.torch import save

from diffusers_align.rewards import wire
from diffusers_align.rewards.wire import decode_request, decode_scores, encode_request, encode_scores, read_request


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 3, 5, 7)])
def test_images_survive(shape):
    images = torch.rand(shape)
    exact, prompts, columns = decode_request(encode_request(images, PROMPTS, {"weight": [1, None]}, "safetensors"))
    assert torch.equal(exact, images) and prompts == PROMPTS and columns == {"weight": [1, None]}
    rounded, _, _ = decode_request(encode_request(images, PROMPTS, {}, "png"))
    assert torch.equal(rounded, (images * 255).round() / 255) and not torch.equal(rounded, images)


def test_pictures_in_columns_survive():
    source, mask = Image.new("RGB", (4, 3), (200, 10, 0)), Image.new("L", (4, 3), 7)
    columns = {"image": [source, None], "frames": [[source, mask], []], "mask": [mask, mask], "about": [{"png": 1, "kind": "x"}, "a"]}
    found = decode_request(encode_request(torch.rand(2, 3, 4, 4), PROMPTS, columns, "png"))[2]
    assert found["about"] == columns["about"] and found["image"][1] is None and found["frames"][1] == []
    alone = {"png": [{"png": "hello"}, None]}
    assert decode_request(encode_request(torch.rand(2, 3, 4, 4), PROMPTS, alone, "png"))[2] == alone, "webdataset's name of a column"
    inked = decode_request(encode_request(torch.rand(2, 3, 4, 4), PROMPTS, {"image": [source.convert("CMYK"), None]}, "png"))[2]["image"][0]
    assert inked.mode == "RGB" and inked.size == source.size
    for here, there in ((found["image"][0], source), (found["frames"][0][1], mask), (found["mask"][1], mask)):
        assert (here.mode, here.size, here.tobytes()) == (there.mode, there.size, there.tobytes())


def test_a_column_is_no_way_around_the_limits(monkeypatch):
    body = encode_request(torch.rand(2, 3, 4, 4), PROMPTS, {"image": [Image.new("RGB", (99, 99)), None]}, "safetensors")
    monkeypatch.setattr(wire, "MAX_VALUES", 1000)
    with pytest.raises(ValueError, match="1 images of 99 x 99 are too many"):
        decode_request(body)
    with pytest.raises(ValueError, match="'images' is no base64"):
        decode_request(request_body(columns={"image": [{wire.PICTURE: "%"}, None]}))


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


def test_pictures_of_other_clients_are_read_as_they_are_seen():
    def packed(picture):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    pictures = [Image.new("RGBA", (4, 4), (0, 0, 0, 0)), Image.new("I;16", (4, 4), 32768)]
    body = {"format": "png", "images": [packed(p) for p in pictures], "frames": None, "prompts": ["a", "b"], "columns": {}}
    images, *_ = decode_request(json.dumps(body).encode())
    torch.testing.assert_close(images.flatten(1).mean(1), torch.tensor([1.0, 0.5]), rtol=0, atol=3e-3)


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
    assert 60 <= exact.values < 200 and exact.unpacked()[0].shape == (1, 3, 4, 5)
    with pytest.raises(ValueError, match="are too many, 1000 are allowed"):
        read_request(encode_request(torch.rand(1, 3, 40, 50), ["a"], {}, "safetensors"))
    with pytest.raises(ValueError, match="brackets and commas"):
        monkeypatch.setattr(wire, "MAX_PARTS", 1000)
        read_request(b'{"prompts": [' + b"[]," * 1000 + b"[]]}")


def test_sounds_and_the_sound_of_videos_survive():
    sounds, videos = torch.rand(2, 2, 50) * 2 - 1, torch.rand(2, 3, 3, 4, 4)
    back, _, columns = decode_request(encode_request(sounds, PROMPTS, {"weight": [1, 2]}, "safetensors", 16000))
    assert torch.equal(back, sounds) and columns == {"weight": [1, 2], "sampling_rate": 16000}
    back, _, columns = decode_request(encode_request(videos, PROMPTS, {}, "safetensors", 8000, sounds))
    assert torch.equal(back, videos) and torch.equal(columns["audio"], sounds) and columns["sampling_rate"] == 8000
    for images, audio in ((sounds, None), (videos, sounds)):
        with pytest.raises(ValueError, match="PNG files hold no sound"):
            encode_request(images, PROMPTS, {}, "png", 8000, audio)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampling_rate": "fast"}, "'sampling_rate' must be a whole number"),
        ({"sampling_rate": 0}, "'sampling_rate' must be a whole number"),
        ({"images": base64.b64encode(save({"images": torch.zeros(2, 3, 4, 4), "audio": torch.zeros(1, 1, 5)})).decode()}, "'audio' must be float32"),
        ({"images": base64.b64encode(save({"images": torch.zeros(2, 5)})).decode()}, r"or \(B, C, T\) of sounds"),
    ],
)
def test_sounds_that_make_no_sense_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        decode_request(request_body(**changes))
