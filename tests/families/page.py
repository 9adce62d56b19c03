"""Writes docs/families.md from the results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .cell import NO, OUTSIDE, REFUSED, ROOT, UNREACHED, YES, Cell
from .column import Column
from .exported import CLASSIC, MODULAR, Row
from .results import Result

PATH = ROOT / "docs" / "families.md"
SYMBOLS = {YES: "●", REFUSED: "○", OUTSIDE: "–", NO: "✗", UNREACHED: "·"}
LEGEND = """● holds · ○ refused, with a sentence that says why and what to do · – does not apply · ✗ does not hold · `·` not reached, since a column that it \
builds on is not ●. A number leads to the [reasons](#reasons)."""
INTRO = """# Every pipeline of diffusers

Nothing in the library knows a model family. So each pipeline class that diffusers exports is built here with tiny random weights, called as stock, and
looked at: does a roll-out replay bit for bit, do gradients reach each denoiser, does a LoRA come back through the stock loader? The table is made by one
command, which fails if a class turns red:

<!-- not run: takes {minutes} minutes -->
```bash
make families
```

It was made with {versions}, on a CPU.
Tiny weights say nothing of the quality of samples or of memory; they say that the calls do what they promise.
`bf16` is the worst of {half} in bfloat16; all other columns are in float32.
"""


class Reasons:
    """Numbers for sentences, of which equal ones share one; the numbers in them and the name of the class make no difference."""

    def __init__(self):
        self._texts: dict[str, tuple[int, str]] = {}
        self.uses: dict[int, int] = {}

    def number(self, text: str, row: Row) -> int:
        text = text.replace(row.cls, "The pipeline") if text.startswith(row.cls) else text.replace(row.cls, "the pipeline")
        key = re.sub(r"\d[\d.e+-]*", "#", text)
        number, _ = self._texts.setdefault(key, (len(self._texts) + 1, text))
        self.uses[number] = self.uses.get(number, 0) + 1
        return number

    def mark(self, text: str, row: Row) -> str:
        return f"<sup>{self.number(text, row)}</sup>" if text else ""

    def lines(self) -> list[str]:
        return [f"{number}. {_escaped(text)}" + (f" *({self.uses[number]} times)*" if self.uses[number] > 1 else "") for number, text in self._texts.values()]


def _escaped(text: str) -> str:
    return re.sub(r"([<>*_|`\[\]{}$])", r"\\\1", text if len(text) <= 320 else f"{text[:200]} … {text[-110:]}")


def write(
    rows: Sequence[Row],
    results: Iterable[Result],
    columns: Sequence[Column],
    left_out: dict[str, str],
    versions: dict[str, str],
    path: Path = PATH,
) -> None:
    """Write the page; rows without a result are shown as not looked at."""
    found = {(result.row, result.dtype): result for result in results}
    path.write_text("\n".join(_page(rows, found, columns, left_out, versions)) + "\n")


def _page(rows, found, columns, left_out, versions) -> list[str]:
    reasons = Reasons()
    minutes = max(1, round(sum(result.seconds for result in found.values()) / 60))
    half = ", ".join(f"*{column.head}*" for column in columns if column.half)
    lines = [INTRO.format(versions=", ".join(f"{name} {number}" for name, number in versions.items()), minutes=minutes, half=half)]
    lines += ["## Counts", "", LEGEND, "", *_counts(rows, found, columns), ""]
    for kind, title in ((CLASSIC, "Classic pipelines"), (MODULAR, "Modular pipelines")):
        own = [row for row in rows if row.kind == kind]
        lines += [f"## {title}", "", *_table(own, found, columns, reasons), ""]
    lines += ["## Not built here", "", *_absent(rows), "", "## No pipelines", "", _sorted_out(left_out), ""]
    return [*lines, "## Reasons", "", *reasons.lines()]


def _counts(rows, found, columns) -> list[str]:
    """A row for each column: how many of the cases hold, and so on, of both kinds."""
    kinds, symbols = (CLASSIC, MODULAR), " | ".join(SYMBOLS.values())
    lines = [f"| | what holds | {' | '.join(f'{kind} {symbols}' for kind in kinds)} |", f"|---|---|{'---:|' * 10}"]
    for column, dtype in [*((column, "float32") for column in columns), *((column, "bfloat16") for column in columns if column.half)]:
        numbers = []
        for kind in kinds:
            cells = [found[row.name, dtype].cells.get(column.name) for row in rows if row.kind == kind and (row.name, dtype) in found]
            statuses = [cell.status if cell else UNREACHED for cell in cells]
            numbers += [str(statuses.count(status)) for status in SYMBOLS]
        head, title = (column.head, column.title) if dtype == "float32" else (f"{column.head} bf16", "the same in bfloat16")
        lines.append(f"| {head} | {title} | {' | '.join(numbers)} |")
    built = {kind: [row for row in rows if row.kind == kind and row.index is not None] for kind in kinds}
    whole = [f"{len({row.cls for row in built[kind]})} of {len({row.cls for row in rows if row.kind == kind})} {kind} classes" for kind in kinds]
    return [f"{' and '.join(whole)} are built, some of them in several variants.", "", *_wrapped(lines)]


def _table(rows: Sequence[Row], found, columns: Sequence[Column], reasons: Reasons) -> list[str]:
    heads = [*(column.head for column in columns), "bf16"]
    lines, family = [f"| class | {' | '.join(heads)} |", f"|---|{':-:|' * len(heads)}"], None
    for row in rows:
        if row.index is None:
            continue
        if row.family != family:
            family = row.family
            lines.append(f"| `{family}` |{' |' * len(heads)}")
        full, half = (found.get((row.name, dtype)) for dtype in ("float32", "bfloat16"))
        cells = [_symbol(full.cells.get(column.name) if full else None, row, reasons) for column in columns]
        lines.append(f"| {row.name.replace('Pipeline', '')}{reasons.mark(row.remark, row)} | {' | '.join([*cells, _worst(half, row, reasons)])} |")
    return _wrapped(lines)


def _symbol(cell: Cell | None, row: Row, reasons: Reasons) -> str:
    if cell is None:
        return " "
    return SYMBOLS[cell.status] + (reasons.mark(cell.reason, row) if cell.status in (REFUSED, OUTSIDE, NO) else "")


def _worst(result: Result | None, row: Row, reasons: Reasons) -> str:
    """Of a result's cells the worst one."""
    if result is None or not result.cells:
        return " "
    order = (NO, REFUSED, UNREACHED, OUTSIDE, YES)
    return _symbol(min(result.cells.values(), key=lambda cell: order.index(cell.status)), row, reasons)


def _wrapped(table: list[str]) -> list[str]:
    """A table in a block of its own class, which docs/families.css makes narrow."""
    return ['<div class="families" markdown>', "", *table, "", "</div>"]


def _absent(rows: Sequence[Row]) -> list[str]:
    own = [row for row in rows if row.index is None]
    if not own:
        return ["Every class is built."]
    lines = [f"{len(own)} classes.", "", "| class | family | reason |", "|---|---|---|"]
    return lines + [f"| {row.cls} | {_escaped(row.family)} | {_escaped(row.absent)} |" for row in own]


def _sorted_out(left_out: dict[str, str]) -> str:
    """What has the word in its name and is none, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return "\n".join(f"* {reason}: {', '.join(names)}" for reason, names in sorted(by_reason.items()))
