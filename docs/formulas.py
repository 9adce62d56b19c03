"""A mkdocs hook: formulas become MathML when the site is built, which browsers draw by themselves, without a script and without the network."""

from __future__ import annotations

import html
import logging
import re

from latex2mathml.converter import convert

logger = logging.getLogger("mkdocs.formulas")
# As arithmatex marks them: \( ... \) in a line, \[ ... \] by itself.
MARKED = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
# What the converter knows in a longer form only: sizes of brackets, and fonts of a single letter without braces.
SPELLED = ((r"\\[Bb]igg?[lr]?\s*\\\|", r"\\Vert "), (r"\\[Bb]igg?[lr]?(?![a-zA-Z])", ""), (r"\\(mathbb|mathcal|mathrm)\s+([A-Za-z])", r"\\\1{\2}"))


def on_page_content(content, page, config, files):
    """Replace the TeX of a page by MathML; what cannot be converted is a warning, which the strict build does not let pass."""

    def drawn(match: re.Match) -> str:
        tex = html.unescape(match.group(2)).strip()
        for short, spelled in SPELLED:
            tex = re.sub(short, spelled, tex)
        try:
            return convert(tex, display="block" if match.group(1) == "div" else "inline")
        except Exception as error:
            logger.warning("%s: the formula %r cannot be drawn: %s", page.file.src_uri, tex, error)
            return match.group()

    return MARKED.sub(drawn, content)
