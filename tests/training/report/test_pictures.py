"""Sheets of images by their content: a cell an image, none blank, whole captions; and the curve."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffusers_align.data import LazyImage, Prompt
from diffusers_align.training.report.lettering import width_of
from diffusers_align.training.report.pictures import before_and_after, comparison, film_strip, given_pictures, grid, reward_curve, samples, to_pil


def shades(number, size=(8, 8), start=10):
    """Images of one colour each, no two alike and none white."""
    return [torch.full((3, *size), (start + i) / 255) for i in range(number)]


def cells_of(sheet):
    """The images in the sheet, by their boxes."""
    return [sheet.crop(box) for box in json.loads(sheet.info["cells"])]


def blanks_of(sheet):
    """Where nothing was pasted: the whole sheet with its cells painted over."""
    rest = sheet.copy()
    for box in json.loads(sheet.info["cells"]):
        ImageDraw.Draw(rest).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(1, 2, 3))
    return rest


def middle(cell):
    return cell.getpixel((cell.width // 2, cell.height // 2))[0]


# --- one image -----------------------------------------------------------------------------------------------------------


def test_to_pil_rounds_clamps_and_takes_the_middle_frame():
    image = torch.tensor([-1.0, 0.5, 2.0])[:, None, None].expand(3, 4, 6)
    assert to_pil(image).size == (6, 4) and to_pil(image).getpixel((0, 0)) == (0, 128, 255)
    video = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 1.0, 0.0)])
    assert to_pil(video).getpixel((0, 0)) == (255, 255, 255)


def test_what_is_not_finite_is_shown():
    image = torch.zeros(3, 2, 2)
    image[1, 0, 1] = float("nan")
    assert to_pil(image).getpixel((1, 0)) == (255, 0, 255) and to_pil(image).getpixel((0, 0)) == (0, 0, 0)
    assert image[1, 0, 1].isnan(), "the image itself is left alone"


# --- sheets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, columns", [(1, 1), (3, 3), (8, 8), (9, 5), (16, 8), (17, 6)])
def test_a_grid_has_a_cell_for_each_image_and_no_empty_row_or_column(number, columns):
    sheet = grid(shades(number), ["a caption"] * number, columns=8, cell=32)
    assert [middle(cell) for cell in cells_of(sheet)] == [10 + i for i in range(number)]
    rows = -(-number // columns)
    assert sheet.width == columns * 32 and rows * columns - number < columns
    rest = blanks_of(sheet)
    for left in range(0, sheet.width, 32):
        assert any(color == (1, 2, 3) for _, color in rest.crop((left, 0, left + 32, sheet.height)).getcolors(10**6)), "no column without an image"


@pytest.mark.parametrize("number, most", [(5, 4), (8, 8), (16, 8), (1, 8)])
def test_before_and_after_shows_each_image_once_before_and_once_after(number, most):
    sheet = before_and_after(shades(number), shades(number, start=100), [f"prompt {i}" for i in range(number)], columns=most, cell=32)
    found = [middle(cell) for cell in cells_of(sheet)]
    assert found == [shade for i in range(number) for shade in (10 + i, 100 + i)]
    boxes = json.loads(sheet.info["cells"])
    assert all(boxes[2 * i][0] == boxes[2 * i + 1][0] and boxes[2 * i][1] < boxes[2 * i + 1][1] for i in range(number)), "above each other"


@pytest.mark.parametrize("number, captions", [(2, 5), (5, 2), (0, 0), (0, 3)])
def test_images_without_captions_and_captions_without_images_are_refused(number, captions):
    said = f"got {number} images and {captions} captions"
    with pytest.raises(ValueError, match=said):
        grid(shades(number), ["x"] * captions)
    with pytest.raises(ValueError, match=said):
        before_and_after(shades(number), shades(number), ["x"] * captions)


def test_a_comparison_names_its_models_on_the_left_and_not_in_the_captions():
    models = {"base": shades(5), "a": shades(5, start=60), "b": shades(5, start=120)}
    sheet = comparison(models, list("vwxyz"), columns=4, cell=32)
    assert [middle(cell) for cell in cells_of(sheet)] == [start + i for i in range(5) for start in (10, 60, 120)]
    assert json.loads(sheet.info["captions"]) == list("vwxyz")
    left = json.loads(sheet.info["cells"])[0][0]
    margin = sheet.crop((0, 0, left, sheet.height)).convert("L").getextrema()
    assert left >= width_of("base") and margin[0] < 128, "the names are written there"


def lazy(shade, size=(8, 8)):
    return LazyImage(Image.new("RGB", size, (shade,) * 3))


def test_what_the_pipeline_was_given_stands_above_what_it_made():
    prompts = [Prompt("x", {}, {"image": lazy(30 + i), "strength": 0.5, "negative_prompt": "dull"}) for i in range(2)]
    given = given_pictures(prompts, 3)
    sheet = before_and_after(shades(3), shades(3, start=100), list("xyz"), cell=32, given=given)
    assert [middle(cell) for cell in cells_of(sheet)] == [30, 10, 100, 31, 11, 101, 30, 12, 102], "prompt after prompt in turn"
    assert [middle(cell) for cell in cells_of(samples(shades(3), list("xyz"), given))] == [30, 10, 31, 11, 30, 12]
    assert given_pictures([Prompt("x")], 3) == {} and [middle(cell) for cell in cells_of(samples(shades(1), ["x"], {}))] == [10]


def test_several_pictures_of_one_argument_stand_side_by_side():
    (picture,) = given_pictures([Prompt("x", {}, {"image": [lazy(30), lazy(60, (16, 16))]})], 1)["image, given"]
    assert (picture.shape, [round(float(picture[0, 4, x]) * 255) for x in (4, 12)]) == ((3, 8, 16), [30, 60]), "as high as the first"


@pytest.mark.parametrize("size, shown", [((8, 16), (32, 16)), ((16, 8), (32, 64)), ((8, 8), (32, 32)), ((8, 64), (32, 4)), ((64, 8), (8, 64))])
def test_images_keep_their_proportions(size, shown):
    cell = cells_of(grid(shades(1, size), ["x"], cell=32))[0]
    assert cell.size == shown and middle(cell) == 10


def video(shades):
    return torch.stack([torch.full((3, 8, 8), shade / 255) for shade in shades])


@pytest.mark.parametrize("number, shown", [(1, [10]), (2, [10, 11]), (4, [10, 11, 12, 13]), (10, [10, 13, 16, 19])])
def test_a_video_is_a_film_strip_from_its_first_to_its_last_frame(number, shown):
    strip = to_pil(film_strip(video(range(10, 10 + number))))
    assert strip.size == (len(shown) * 8 + len(shown) - 1, 8)
    assert [strip.getpixel((9 * i + 4, 4))[0] for i in range(len(shown))] == shown
    assert all(strip.getpixel((9 * i - 1, 4)) == (255, 255, 255) for i in range(1, len(shown)))


def test_sheets_show_videos_as_strips_in_wider_columns():
    videos = [video(range(start, start + 7)) for start in (10, 50, 90)]
    sheet = grid(videos, ["x", "y", "z"], columns=8, cell=32)
    assert sheet.width == 2 * 4 * 32, "two columns where eight pictures would be"
    for cell, start in zip(cells_of(sheet), (10, 50, 90)):
        assert 4 * 32 - 1 <= cell.width <= 4 * 32
        assert [cell.getpixel((16 + 32 * i, cell.height // 2))[0] for i in range(4)] == [start, start + 2, start + 4, start + 6]
    compared = comparison({"base": videos, "mine": videos[::-1]}, ["x", "y", "z"], columns=8, cell=32)
    assert [cell.getpixel((16, cell.height // 2))[0] for cell in cells_of(compared)] == [10, 90, 50, 50, 90, 10]


def test_a_sound_is_no_picture():
    with pytest.raises(ValueError, match=r"A sound \(C, T\) = \(2, 50\) is no picture"):
        to_pil(torch.rand(2, 50))


# --- curve -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [False, True])
def test_reward_curve(tmp_path, kl):
    history = [{"epoch": e, "reward": e / 10, "reward_se": 0.1, **({"kl": 0.01 * e} if kl else {})} for e in range(3)]
    reward_curve(history, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.height > (400 if kl else 300) and len(picture.convert("L").getcolors()) > 10


@pytest.mark.parametrize("rewards", [[0.3], [0.1, None, 0.3, None, 0.2]])
def test_each_epoch_is_seen_on_the_curve(rewards, tmp_path):
    history = [{"epoch": e, **({} if value is None else {"reward": value, "kl": value})} for e, value in enumerate(rewards)]
    reward_curve(history, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        seen = torch.from_numpy(np.asarray(picture.convert("RGB")).astype(int))
    for color in ((31, 119, 180), (214, 39, 40)):  # tab:blue, tab:red
        columns = ((seen - torch.tensor(color)).abs().sum(-1) < 30).any(0).int()
        assert int((columns.diff(prepend=torch.zeros(1, dtype=torch.int32)) == 1).sum()) == sum(value is not None for value in rewards)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"reward": 1.0, "reward_se": 0.1, "kl": 1.0}, ["mean reward of rollouts, s.e.", "distance to the\npretrained model"]),
        ({"reward": 1.0, "kl": 1.0, "accepted": 1.0}, ["mean reward of rollouts", "KL of the step"]),  # of a trust region
        ({"accuracy": 0.5, "loss": 0.7}, ["accuracy on the epoch's pairs"]),
        ({"loss": 0.7, "loss_se": 0.1}, ["training loss, s.e."]),
    ],
)
def test_the_axes_of_a_curve_say_what_is_drawn(row, said, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    found, set_label = [], Axes.set_ylabel
    monkeypatch.setattr(Axes, "set_ylabel", lambda axes, text: (found.append(text), set_label(axes, text)))
    reward_curve([{"epoch": 0, **row}], tmp_path / "curve.png")
    assert found == said
