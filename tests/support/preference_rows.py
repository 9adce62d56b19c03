"""Rows and pictures of small preference data sets, as they lie in files."""

import csv
import io
import json

import pytest
from PIL import Image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
COLORS = {"red.png": RED, "green.png": GREEN, "blue.png": BLUE}


@pytest.fixture
def folder(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    return tmp_path


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def color(image):
    return image.open().getpixel((0, 0))


def encoded(rgb):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), rgb).save(file, "PNG")
    return file.getvalue()


def pair(prompt="p", a="red.png", b="green.png", label=1, **more):
    return {"prompt": prompt, "image_0": a, "image_1": b, "label_0": label, **more}


# public layouts: name, kind asked for, suffix, rows, what comes out (prompt, then images as colors, then labels)


R, G, B = COLORS


def shown(row):
    return tuple([color(i) for i in value] if name == "images" else color(value) if name.startswith("image") else value for name, value in row.items())
