"""Composed scenes: the world that the embedded models know.

A scene is one to three copies of an object pasted on a coloured background. Objects are emoji (Noto Color Emoji, SIL Open
Font License), shipped as one sprite sheet so that scenes can be drawn on any machine. A caption names the object and,
sometimes, its count, the background colour and the position, so a prompt leaves room for many images and every attribute it
names can be checked.

>>> import random
>>> scene = sample_scene(random.Random(0))
>>> image, caption = render(scene, random.Random(0)), scene.caption()
>>> parse(caption)["object"] == scene.object
True
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

OBJECTS = {
    "cat": "🐱", "dog": "🐶", "fox": "🦊", "panda": "🐼", "frog": "🐸", "pig": "🐷", "lion": "🦁", "penguin": "🐧",
    "owl": "🦉", "fish": "🐟", "octopus": "🐙", "butterfly": "🦋", "apple": "🍎", "lemon": "🍋", "banana": "🍌", "strawberry": "🍓",
    "carrot": "🥕", "mushroom": "🍄", "pizza": "🍕", "donut": "🍩", "cake": "🎂", "car": "🚗", "bus": "🚌", "rocket": "🚀",
    "sailboat": "⛵", "tree": "🌳", "cactus": "🌵", "sunflower": "🌻", "house": "🏠", "balloon": "🎈", "umbrella": "☂", "star": "⭐",
}  # fmt: skip
COLORS = {
    "white": (250, 250, 250), "black": (20, 20, 20), "red": (220, 40, 40), "green": (50, 160, 70), "blue": (50, 90, 220),
    "yellow": (250, 220, 60), "purple": (140, 60, 180), "orange": (250, 150, 40), "pink": (250, 160, 200), "gray": (128, 128, 128),
}  # fmt: skip
COUNTS = {1: "a", 2: "two", 3: "three"}
POSITIONS = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
IRREGULAR_PLURALS = {
    "fox": "foxes", "fish": "fish", "octopus": "octopuses", "butterfly": "butterflies", "strawberry": "strawberries",
    "bus": "buses", "cactus": "cacti",
}  # fmt: skip

SPRITE_SIZE = 64
SPRITE_SHEET = Path(__file__).parent / "sprites.png"


def plural(name: str) -> str:
    """The plural of an object's name."""
    return IRREGULAR_PLURALS.get(name, name + "s")


SINGULAR = {plural(name): name for name in OBJECTS} | {name: name for name in OBJECTS}


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `named` lists the attributes that the caption mentions beside object and count."""

    object: str
    count: int
    color: str
    position: str | None
    named: frozenset[str] = frozenset()

    def caption(self) -> str:
        noun = self.object if self.count == 1 else plural(self.object)
        article = "an" if self.count == 1 and noun[0] in "aeiou" else COUNTS[self.count]
        words = [article, noun]
        if "position" in self.named and self.position:
            words.append(POSITIONS[self.position])
        if "color" in self.named:
            words.append(f"on a {self.color} background".replace("a orange", "an orange"))
        return " ".join(words)


def sample_scene(rng: random.Random, counts: tuple[float, float, float] = (0.7, 0.2, 0.1), sided: float = 1 / 3) -> Scene:
    """A random scene: one object, two or three with the given probabilities; the share `sided` of the single ones at a named side."""
    count = rng.choices((1, 2, 3), counts)[0]
    position = rng.choice(list(POSITIONS)) if count == 1 and rng.random() < sided else None
    named = {"color"} if rng.random() < 0.6 else set()
    return Scene(rng.choice(list(OBJECTS)), count, rng.choice(list(COLORS)), position, frozenset(named | {"position"}))


def parse(prompt: str) -> dict[str, str | int]:
    """The attributes a prompt asks for: some of `object`, `count`, `color`, `position`; empty if it names no known object."""
    words = re.findall(r"[a-z]+", prompt.lower())
    asked: dict[str, str | int] = {}
    for word in words:
        if word in SINGULAR:
            asked["object"] = SINGULAR[word]
            break
    if not asked:
        return {}
    asked["count"] = 3 if "three" in words else 2 if "two" in words else 1
    if color := re.search(r"on an? (\w+) background", prompt.lower()):
        if color.group(1) in COLORS:
            asked["color"] = color.group(1)
    for position, phrase in POSITIONS.items():
        if phrase in prompt.lower():
            asked["position"] = position
    return asked


def adjacent_captions(prompt: str, images=None) -> list[str]:
    """Captions next to a prompt's: the object at every side, or at none; several objects in other numbers. A rewriter for MV-GRPO,
    which is handed `images` and does without them. Empty if the prompt names no known object."""
    asked = parse(prompt)
    if not asked:
        return []
    places = [(1, position) for position in (None, *POSITIONS)] if asked["count"] == 1 else [(count, None) for count in COUNTS]
    named = frozenset({"position", "color"} if "color" in asked else {"position"})
    captions = [Scene(asked["object"], count, asked.get("color", ""), position, named).caption() for count, position in places]
    return [caption for caption in captions if caption != prompt]


@lru_cache(maxsize=1)
def sprites() -> dict[str, Image.Image]:
    """The objects as square RGBA images, cut from the sprite sheet."""
    sheet, columns = Image.open(SPRITE_SHEET).convert("RGBA"), 8
    boxes = [((i % columns) * SPRITE_SIZE, (i // columns) * SPRITE_SIZE) for i in range(len(OBJECTS))]
    return {name: sheet.crop((x, y, x + SPRITE_SIZE, y + SPRITE_SIZE)) for name, (x, y) in zip(OBJECTS, boxes)}


def place(scene: Scene, size: int, rng: random.Random) -> list[tuple[int, int, int]]:
    """Boxes (x, y, side) of the objects, in pixels: anywhere, at the named side, or apart from each other."""
    if scene.count == 1:
        side = rng.randint(int(size * 0.45), int(size * (0.6 if scene.position else 0.85)))
        room = size - side
        near, far, free = rng.randint(0, room // 6), room - rng.randint(0, room // 6), rng.randint(0, room)
        middle = rng.randint(room // 3, room - room // 3)
        x = {"left": near, "right": far, "top": middle, "bottom": middle}.get(scene.position, free)
        y = {"top": near, "bottom": far, "left": middle, "right": middle}.get(scene.position, rng.randint(0, room))
        return [(x, y, side)]
    low, high = {2: (0.38, 0.5), 3: (0.34, 0.44)}[scene.count]
    while True:
        boxes: list[tuple[int, int, int]] = []
        for _ in range(20):
            side = rng.randint(int(size * low), int(size * high))
            x, y = rng.randint(0, size - side), rng.randint(0, size - side)
            if all(abs(x + side / 2 - a - s / 2) > 0.45 * (side + s) or abs(y + side / 2 - b - s / 2) > 0.45 * (side + s) for a, b, s in boxes):
                boxes.append((x, y, side))
            if len(boxes) == scene.count:
                return boxes


def render(scene: Scene, rng: random.Random, size: int = 32, boxes: list[tuple[int, int, int]] | None = None) -> Image.Image:
    """Draw a scene as an RGB image of size x size pixels: jittered colour, random mirror, up to 15 degrees of tilt.

    `boxes` are the objects' places as `place` returns them; drawn at random if absent.
    """
    image = Image.new("RGB", (size, size), _background(scene, rng))
    for sprite, corner in _placed(scene, rng, size, boxes):
        image.paste(sprite, corner, sprite)
    return image


def silhouette(scene: Scene, rng: random.Random, size: int = 32, boxes: list[tuple[int, int, int]] | None = None) -> Image.Image:
    """Where `render` puts the objects with the same draws: a grey image, white (255) where they hide the background, black where it shows."""
    image, _ = Image.new("L", (size, size)), _background(scene, rng)
    for sprite, corner in _placed(scene, rng, size, boxes):
        image.paste(255, (*corner, corner[0] + sprite.width, corner[1] + sprite.height), sprite.getchannel("A"))
    return image


def _background(scene: Scene, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, v + rng.randint(-10, 10))) for v in COLORS[scene.color])


def _placed(scene: Scene, rng: random.Random, size: int, boxes: list[tuple[int, int, int]] | None) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """The objects' pictures, RGBA, each with its upper left corner."""
    for x, y, side in boxes or place(scene, size, rng):
        sprite = sprites()[scene.object]
        if rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        sprite = sprite.rotate(rng.uniform(-15, 15), resample=Image.Resampling.BICUBIC)
        yield sprite.resize((side, side), Image.Resampling.LANCZOS), (x, y)


def draw_sprite_sheet(font_path: str) -> Image.Image:
    """Make the sprite sheet from a Noto Color Emoji font file (only needed to change the list of objects)."""
    from PIL import ImageDraw, ImageFont

    font, columns = ImageFont.truetype(font_path, 109), 8
    sheet = Image.new("RGBA", (columns * SPRITE_SIZE, -(-len(OBJECTS) // columns) * SPRITE_SIZE))
    for i, emoji in enumerate(OBJECTS.values()):
        glyph = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
        ImageDraw.Draw(glyph).text((0, 0), emoji, font=font, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        square = Image.new("RGBA", (max(glyph.size),) * 2, (0, 0, 0, 0))
        square.paste(glyph, ((square.width - glyph.width) // 2, (square.height - glyph.height) // 2))
        square = square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
        sheet.paste(square, ((i % columns) * SPRITE_SIZE, (i // columns) * SPRITE_SIZE))
    return sheet
