"""Text in pictures: wrapped to a width, each character in a font that has it, or spelled out where no font on the machine has."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

SIZE, LINE = 9, 12
ELLIPSIS = "…"
# Marks that only say how the character before them is to be drawn.
UNSEEN = {"Cf", "Mn", "Me"}


@lru_cache
def _own_font() -> ImageFont.FreeTypeFont:
    """matplotlib's, which travels with the package's dependencies: Latin, Greek, Cyrillic and many more."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), SIZE)


@lru_cache
def _system_fonts() -> tuple[str, ...]:
    from matplotlib import font_manager

    return tuple(sorted(font_manager.findSystemFonts()))


@lru_cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # what FreeType cannot read has no characters for us
        return frozenset()


@lru_cache(maxsize=4096)
def font_of(character: str) -> ImageFont.FreeTypeFont | None:
    """A font that has the character; None if no font of the machine has, at this size."""
    if ord(character) in _characters(_own_font().path):
        return _own_font()
    for path in _system_fonts():
        if ord(character) in _characters(path):
            try:
                return ImageFont.truetype(path, SIZE)
            except OSError:  # fonts of coloured bitmaps come in one size
                continue
    return None


def readable(text: str) -> str:
    """The text in characters that can be drawn: a character without a font by its name (`:cat face:`) or number (`U+732B`)."""
    shown = ""
    for character in " ".join(text.split()):
        category = unicodedata.category(character)
        if category in UNSEEN:
            continue
        if category[0] == "C":
            shown += " " if category == "Cc" else f" U+{ord(character):04X} "
        elif font_of(character) is not None:
            shown += character
        else:
            name = unicodedata.name(character, "").lower()
            shown += f" :{name}: " if name and category[0] == "S" else f" U+{ord(character):04X} "
    return " ".join(shown.split())


def _runs(text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    return [(font, "".join(part)) for font, part in groupby(text, lambda character: font_of(character) or _own_font())]


def width_of(text: str) -> float:
    """Pixels of one line of `readable` text."""
    return sum(font.getlength(part) for font, part in _runs(text))


def wrapped(text: str, width: int, most: int) -> list[str]:
    """The text in at most `most` lines of `width` pixels, broken between words where it can be; an ellipsis says that there is more."""
    lines, words = [""], readable(text).split(" ")
    while words:
        word = words.pop(0)
        joined = f"{lines[-1]} {word}".strip()
        if width_of(joined) <= width:
            lines[-1] = joined
        elif lines[-1]:
            lines.append("")
            words.insert(0, word)
        else:
            fits = max(1, _fitting(word, width))
            lines[-1] = word[:fits]
            lines.append("")
            words.insert(0, word[fits:])
    lines = [line for line in lines if line] or [""]
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1]]
        cut = lines[-1]
        while cut and width_of(cut + ELLIPSIS) > width:
            cut = cut[:-1]
        lines[-1] = cut.rstrip() + ELLIPSIS
    return lines


def _fitting(word: str, width: int) -> int:
    """How many of its characters fit."""
    number = len(word)
    while number and width_of(word[:number]) > width:
        number -= 1
    return number


def write(draw: ImageDraw.ImageDraw, x: float, y: float, lines: list[str]) -> None:
    """The lines, one below the other, from (x, y) on."""
    for row, line in enumerate(lines):
        left = x
        for font, part in _runs(line):
            draw.text((left, y + row * LINE), part, font=font, fill="black")
            left += font.getlength(part)
