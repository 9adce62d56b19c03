"""A promise that is looked at for every pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .cell import UNREACHED, YES, Cell, looked_at

if TYPE_CHECKING:
    from .subject import Subject


@dataclass(frozen=True)
class Column:
    """One promise.

    Attributes:
        name: for the command line.
        head: of the table, as short as can be.
        title: what holds if it is green, for the legend.
        check: looks at a subject; returns nothing or a remark, raises `Fault`, `DoesNotApply`, or what the library raises.
        needs: columns that must be green before.
        half: whether it is looked at in bfloat16 too.
    """

    name: str
    head: str
    title: str
    check: Callable[[Subject], str | None]
    needs: tuple[str, ...] = ()
    half: bool = False


def look(
    subject: Subject, columns: tuple[Column, ...], wanted: set[str] | None = None, begin: Callable[[str], None] = lambda name: None, show: bool = False
) -> Iterator[tuple[str, Cell]]:
    """The cells of a subject, each as soon as it is known.

    Args:
        wanted: names of columns; those that they need are looked at too. All if absent.
        begin: gets the name of each column before it is looked at.
        show: print the tracebacks of what is raised.
    """
    by_name, found = {column.name: column for column in columns}, {}
    names = set(by_name) if wanted is None else _with_needs(wanted, by_name)
    for column in columns:
        if column.name not in names:
            continue
        missing = [name for name in column.needs if name in found and found[name].status != YES]
        if missing:
            found[column.name] = Cell(UNREACHED, f"needs {missing[0]}")
        else:
            begin(column.name)
            found[column.name] = looked_at(lambda column=column: column.check(subject), show)
        yield column.name, found[column.name]


def _with_needs(names: set[str], columns: dict[str, Column]) -> set[str]:
    below = {need for name in names for need in columns[name].needs if need in columns}
    return names if below <= names else _with_needs(names | below, columns)
