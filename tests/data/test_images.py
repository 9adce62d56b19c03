"""Images as people have them: colour profiles, animations, sizes; what is done about them is said."""

import gc
import io
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from preference_rows import BLUE, GREEN, RED, color, pair, write

from diffusers_align.data import LazyImage, load_preferences
from diffusers_align.data import images as images_module
from diffusers_align.data.files import BadRow

torch.set_num_threads(1)


def exchanged():
    """An RGB profile with red and green exchanged: whoever ignores it sees the wrong colour."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.find(b"rXYZ"), profile.find(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def own_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def grey_profile(gamma=1.0):
    """A grey profile of one tone curve, built by hand: header, white point, curve."""
    white = b"XYZ " + bytes(4) + b"".join(int(v * 65536).to_bytes(4, "big") for v in (0.9642, 1.0, 0.8249))
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + int(gamma * 256).to_bytes(2, "big") + bytes(2)
    text = b"desc" + bytes(4) + (5).to_bytes(4, "big") + b"grey\0" + bytes(4 + 4 + 2 + 1 + 67) + bytes(2)
    tags, blob, start = [], b"", 128 + 4 + 3 * 12
    for name, data in ((b"wtpt", white), (b"kTRC", curve), (b"desc", text)):
        data += bytes(-len(data) % 4)
        tags.append(name + (start + len(blob)).to_bytes(4, "big") + len(data).to_bytes(4, "big"))
        blob += data
    body = (3).to_bytes(4, "big") + b"".join(tags) + blob
    head = (128 + len(body)).to_bytes(4, "big") + b"lcms" + bytes.fromhex("02100000") + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(int(v * 65536).to_bytes(4, "big") for v in (0.9642, 1.0, 0.8249))
    return head + bytes(128 - len(head)) + body


def save(folder, name, image, **options):
    image.save(folder / name, **options)
    return LazyImage(folder / name)


def test_profiles_are_converted_to_srgb(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for name in ("a.png", "a.jpg", "a.webp", "a.tiff"):
        options = {"quality": 100} if name.endswith("jpg") else {"lossless": True} if name.endswith("webp") else {}
        found = save(tmp_path, name, red, icc_profile=exchanged(), **options).open().getpixel((0, 0))
        assert np.abs(np.array(found) - (0, 255, 0)).max() <= 3, (name, found)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    image = save(tmp_path, "alpha.png", clear, icc_profile=exchanged()).open()
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 0)) == (0, 255, 0)
    palette = save(tmp_path, "palette.png", red.quantize(4), icc_profile=exchanged())
    assert palette.open().getpixel((0, 0)) == (0, 255, 0) and palette.check("full") == ["are converted from their ICC profile to sRGB"]
    # PIL images and bytes come the same way
    held = Image.open(tmp_path / "a.png")
    assert LazyImage(held).open().getpixel((0, 0)) == LazyImage((tmp_path / "a.png").read_bytes()).open().getpixel((0, 0)) == (0, 255, 0)


def test_a_grey_profile_is_one_of_tones(tmp_path):
    linear = save(tmp_path, "grey.png", Image.new("L", (4, 4), 55), icc_profile=grey_profile(1.0))
    # 55 / 255 of the light is sRGB's 128: 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)
    expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(np.array(linear.open().getpixel((0, 0))) - expected).max() <= 2


def test_srgbs_own_profile_changes_no_bit_and_says_nothing(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    image = save(tmp_path, "own.png", noise, icc_profile=own_profile())
    assert image.open().tobytes() == noise.tobytes() and image.check("full") == []


@pytest.mark.parametrize("profile", [b"no profile", exchanged()[:200], grey_profile()], ids=["text", "cut", "of another mode"])
def test_broken_profiles_are_said_and_read_as_srgb(tmp_path, profile):
    image = save(tmp_path, "broken.png", Image.new("RGB", (4, 4), (200, 10, 30)), icc_profile=profile)
    assert image.open().getpixel((0, 0)) == (200, 10, 30)
    (said,) = image.check("full")
    assert said.startswith("have an ICC profile that cannot be used (") and said.endswith("and are read as sRGB")


def test_press_colours_without_a_profile_are_said(tmp_path):
    image = save(tmp_path, "press.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    assert image.open().getpixel((0, 0)) == (255, 0, 0) and image.check("full") == [
        "are CMYK without an ICC profile and are converted without colour management"
    ]


def test_the_first_frame_is_taken_and_files_are_closed(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for name, options in (("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {}), ("a.tiff", {})):
            image = save(tmp_path, name, frames[0], save_all=True, append_images=frames[1:], **options)
            assert image.open().getpixel((0, 0)) == (255, 0, 0) and image.check("full") == ["have several frames, of which the first is taken"], name
        gc.collect()


def test_the_report_says_once_what_was_done_to_how_many(tmp_path):
    save(tmp_path, "icc.png", Image.new("RGB", (8, 8), (255, 0, 0)), icc_profile=exchanged())
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for i in range(3):
        save(tmp_path, f"{i}.gif", frames[0], save_all=True, append_images=frames[1:])
    rows = [{"prompt": "x", "chosen": f"{i}.gif", "rejected": "icc.png"} for i in range(3)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = load_preferences(str(tmp_path / "d.jsonl"), "pair")[1]
    assert "3 images have several frames, of which the first is taken." in str(report)
    assert "1 images are converted from their ICC profile to sRGB." in str(report)


def test_large_images_take_bounded_memory_or_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_PIXELS", 64 * 64)
    photograph = Image.effect_noise((100, 120), 30).convert("RGB")
    half = save(tmp_path, "large.jpg", photograph)
    assert half.open().size == (50, 60) and "decoded at half their size" in half.check("full")[0]
    with pytest.raises(BadRow, match="100 x 120 are more than 0 million pixels: make it smaller"):
        save(tmp_path, "large.png", photograph).check("header")


def test_sizes_are_those_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path, "turned.jpg", Image.new("RGB", (32, 16)), exif=exif)
    assert turned.size == turned.open().size == (16, 32) and turned.fitted((8, 24)).size == turned.fitted((8, 24)).open().size == (24, 8)
    assert turned.check("header") == ["are turned upright as their EXIF tag says"]


def test_what_no_image_is_says_how_it_begins(tmp_path):
    for name, content, message in (("empty.png", b"", "the file is empty"), ("page.jpg", b"<html>404", "the file begins with b'<html>404'")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadRow, match=message):
            LazyImage(tmp_path / name).check("full")


# sources


def test_images_are_read_when_asked_for_and_survive_pickling(folder):
    rows, _ = load_preferences(write(folder / "data.jsonl", [pair()]), "pair")
    image = pickle.loads(pickle.dumps(rows))[0]["image_0"]
    Image.new("RGB", (8, 8), BLUE).save(folder / "red.png")
    assert color(image) == BLUE


def test_images_come_upright_in_rgb_on_white(folder):
    file = io.BytesIO()
    tall = Image.new("RGB", (4, 8), RED)
    exif = tall.getexif()
    exif[0x0112] = 6  # rotate by a quarter
    tall.save(file, "JPEG", exif=exif)
    assert LazyImage(file.getvalue()).open().size == (8, 4)
    assert LazyImage(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).open().getpixel((0, 0)) == (255, 255, 255)
    assert LazyImage(Image.new("L", (2, 2), 7)).open().getpixel((0, 0)) == (7, 7, 7)


def test_the_content_hash_depends_on_the_content_alone(folder):
    (folder / "copy.png").write_bytes((folder / "red.png").read_bytes())
    hashes = {name: LazyImage(folder / name).content_hash() for name in ("red.png", "copy.png", "green.png")}
    assert hashes["red.png"] == hashes["copy.png"] == LazyImage((folder / "red.png").read_bytes()).content_hash() != hashes["green.png"]
    assert LazyImage(Image.new("RGB", (2, 8))).content_hash() != LazyImage(Image.new("RGB", (8, 2))).content_hash()


# bad rows


def test_sixteen_bits_are_scaled_and_float_pixels_refused(folder):
    grey = torch.tensor([[0, 128, 255]], dtype=torch.int32)
    deep = Image.fromarray((257 * grey).numpy().astype("uint16"))
    deep.save(folder / "deep.png")
    for source in (folder / "deep.png", deep):
        assert [LazyImage(source).open().getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in grey[0].tolist()]
    Image.fromarray((grey / 255).numpy()).save(folder / "float.tif")
    for verify in ("full", "header"):
        _, report = load_preferences(write(folder / "data.jsonl", [pair(), pair(a="deep.png"), pair(b="float.tif")]), "pair", verify=verify)
        assert report.bad == [(3, "image_1 cannot be read: its pixels (mode F) have no known range: save it with 8 or 16 bits a channel")]
    with pytest.raises(ValueError, match="no known range"):
        LazyImage(folder / "float.tif").open()


def test_the_content_of_a_palette_image_is_its_colors():
    one, two = (Image.new("RGB", (8, 8), rgb).convert("P", palette=Image.Palette.ADAPTIVE) for rgb in (RED, GREEN))
    assert one.tobytes() == two.tobytes()
    assert len({LazyImage(image).content_hash() for image in (one, one.copy(), two)}) == 2
