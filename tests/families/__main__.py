"""`python -m tests.families`: what a policy can do with every pipeline that diffusers exports."""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote

from diffusers_align.checks.given_names import did_you_mean

from . import expected, pool, worker
from .cell import ROOT, STATUSES, Cell
from .exported import Row
from .results import Result, Results

RESULTS = ROOT / "runs" / "families.jsonl"
DTYPES = ("float32", "bfloat16")
EPILOG = """
A run can be stopped at any time and goes on where it was. What was looked at with the same versions of diffusers, transformers, peft and torch is not looked
at again, also if the source has changed since: --changed and --fresh do that. The exit status is 1 where a column says no, where something was green in
tests/families/expected.json and is not now, and where a class has no case. A run over everything ends with writing docs/families.md.

  python -m tests.families FluxPipeline                              one class
  python -m tests.families '*Inpaint*' --jobs 4                      those of a pattern
  python -m tests.families FluxPipeline --column replay --traceback  where a fault is
  python -m tests.families --list                                    the classes, their cases, and what was left out
"""


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser("python -m tests.families", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("names", nargs="*", metavar="CLASS", help="classes, or patterns of their names; a variant stands behind a slash. All if absent.")
    own.add_argument("--column", action="append", metavar="NAME", help="this column, and those that it needs, printed but not kept; may be repeated")
    own.add_argument("--dtype", choices=DTYPES, help="one precision alone; bfloat16 has a shorter set of columns")
    own.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2), one thread each")
    own.add_argument("--time-limit", type=float, default=240, metavar="SECONDS", help="of a class in one precision (default: 240)")
    own.add_argument("--fresh", action="store_true", help="look again at what was looked at")
    own.add_argument("--changed", action="store_true", help="look again at what was looked at with another state of the source")
    own.add_argument("--traceback", action="store_true", help="print the traceback of each exception; implies --fresh")
    own.add_argument("--list", action="store_true", help="list the classes and what was left out, and look at nothing")
    own.add_argument("--report", action="store_true", help="look at nothing: write docs/families.md from the results that are there")
    own.add_argument("--accept", action="store_true", help="write tests/families/expected.json too, against which later runs are compared")
    own.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="JSON lines to keep results in (default: %(default)s)")
    return own


def checked(arguments: list[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        SystemExit: one that would have no effect beside the others, or a number that makes no sense.
    """
    own = parser()
    options = own.parse_args(arguments)
    part = bool(options.names or options.column or options.dtype)
    for name in ("report", "accept"):
        if part and getattr(options, name):
            own.error(f"--{name} writes what holds for all classes and columns: leave out the names, --column and --dtype.")
    looks = [f"--{name}" for name in ("fresh", "changed", "traceback", "accept") if getattr(options, name)]
    for name in ("report", "list"):
        if getattr(options, name) and (idle := [flag for flag in looks if not (name == "report" and flag == "--accept")]):
            own.error(f"--{name} looks at nothing, so that {' and '.join(idle)} would have no effect.")
    if options.jobs < 1 or not options.time_limit > 0:
        own.error(f"--jobs is at least 1 and --time-limit above 0, got {options.jobs} and {options.time_limit:g}.")
    return options


def asked(options: argparse.Namespace) -> dict[str, set[str] | None]:
    """The columns that are asked for, by precision; None for all of them.

    Raises:
        SystemExit: a name that is no column's, or none that is looked at in this precision.
    """
    dtypes = [options.dtype] if options.dtype else DTYPES
    if not options.column:
        return dict.fromkeys(dtypes)
    from .columns import COLUMNS

    half = {column.name: column.half for column in COLUMNS}
    for name in options.column:
        if name not in half:
            raise SystemExit(f"--column {name}: there is no such column.{did_you_mean(name, half)} There are {', '.join(half)}.")
    wanted = {dtype: {name for name in options.column if half[name] or dtype == "float32"} for dtype in dtypes}
    if not any(wanted.values()):
        raise SystemExit(f"--column {' '.join(options.column)}: not looked at in {options.dtype}; leave out --dtype.")
    return {dtype: names for dtype, names in wanted.items() if names}


def chosen(rows: list[Row], names: list[str]) -> list[Row]:
    """The rows that one of the names or patterns matches, with or without the variant.

    Raises:
        SystemExit: a name that matches none.
    """
    if not names:
        return rows
    found = [row for row in rows if any(fnmatchcase(row.name, name) or fnmatchcase(row.cls, name) for name in names)]
    for name in names:
        if not any(fnmatchcase(row.name, name) or fnmatchcase(row.cls, name) for row in found):
            raise SystemExit(f"{name}: no pipeline class of this diffusers has that name; --list shows them.")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = checked(arguments)
    columns = asked(options)
    source = pool.context(["tests.families.preload"])
    rows, left_out, strange, versions, state = _survey(source)
    picked = chosen(rows, options.names)
    if options.list:
        return _listed(picked, left_out, strange)
    results = Results(options.results, versions)
    found = _look(picked, options, results, source, state, columns)
    if not (options.names or options.column or options.dtype):
        _written(rows, found, left_out, versions, options.accept)
    return told(picked, found, expected.read()[0])


def _survey(source):
    ours, theirs = source.Pipe(duplex=False)
    process = source.Process(target=worker.guarded, args=(worker.survey, theirs), daemon=True)
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    if isinstance(found[1], Cell):
        raise SystemExit(f"The cases cannot be read: {found[1].reason}")
    return found


def _listed(rows: list[Row], left_out: dict[str, str], strange: list[str]) -> int:
    for row in rows:
        print(f"{row.kind:8} {row.family:26} {row.name:56} {row.absent or row.remark}".rstrip())
    print(f"\nLeft out ({len(left_out)}):")
    for name, reason in left_out.items():
        print(f"  {name:48} {reason}")
    if strange:
        print(f"\nCases of classes that this diffusers does not export: {', '.join(strange)}")
    return int(any(row.lacks_case for row in rows))


def _look(rows: list[Row], options, results: Results, source, state: str, columns: dict[str, set[str] | None]) -> list[Result]:
    """The results of the rows in the `columns` of each precision: those that are there, and new ones."""
    again = options.fresh or options.traceback or bool(options.column)
    known, tasks = [], []
    for row in rows:
        for dtype, wanted in columns.items() if row.index is not None else ():
            result = None if again else results.get(row.name, dtype)
            if result is not None and (options.report or not (options.changed and result.source != state)):
                known.append(result)
            elif not options.report:
                tasks.append(pool.Task((row, dtype), worker.look_at, (row.cls, row.index, dtype, wanted, options.traceback)))
    number, spent = len(tasks), 0.0
    try:
        for done, task in enumerate(pool.run(tasks, jobs=options.jobs, limit=options.time_limit, source=source), 1):
            row, dtype = task.key
            result = Result(row.name, dtype, results.versions, state, task.cells, round(task.seconds, 1))
            known.append(result)
            if not options.column:
                results.add(result)
            spent += task.seconds
            left = spent / done * (number - done) / options.jobs
            print(f"{done}/{number}  {_minutes(left)} left  {_line(result)}", flush=True)
            if options.column:
                _print_cells(result)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.")
        raise SystemExit(130) from None
    return known


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02}"


def _line(result: Result) -> str:
    count = {status: sum(cell.status == status for cell in result.cells.values()) for status in STATUSES}
    said = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    return f"{result.row} {result.dtype}: {said} ({result.seconds:g} s)"


def _print_cells(result: Result) -> None:
    for name, cell in result.cells.items():
        print(f"    {name:14} {cell.status:9} {cell.reason}")


def _written(rows: list[Row], found: list[Result], left_out: dict[str, str], versions: dict[str, str], accept: bool) -> None:
    from . import page
    from .columns import COLUMNS

    page.write(rows, found, COLUMNS, left_out, versions)
    print(f"Wrote {page.PATH.relative_to(ROOT)}.")
    if accept:
        expected.write(found, versions)
        print(f"Wrote {expected.PATH.relative_to(ROOT)}.")


def told(rows: list[Row], found: list[Result], before: dict[tuple[str, str], dict[str, str]]) -> int:
    """Print what turned red, the classes without a case and the faults; the exit status."""
    lost = expected.regressions(found, before)
    if lost:
        print("\nGreen before, and not now:")
    for result, name, was in lost:
        _print_fault(result, name, result.cells[name], f"was {was}, is {result.cells[name].status}: ")
    missing = [row for row in rows if row.lacks_case]
    for row in missing:
        print(f"\n{row.name}: {row.absent}")
    known = {(result.row, result.dtype, name) for result, name, _ in lost}
    faults = [(result, name, cell) for result in found for name, cell in result.faults.items()]
    for result, name, cell in faults:
        if (result.row, result.dtype, name) not in known:
            _print_fault(result, name, cell)
    red = {(result.row, result.dtype) for result, _, _ in faults}
    print(f"\n{len(found)} looked at, {len(red)} red, {len(lost)} cells worse than before, {len(missing)} classes without a case.")
    return int(bool(faults or missing or lost))


def _print_fault(result: Result, name: str, cell: Cell, before: str = "") -> None:
    precision = "" if result.dtype == "float32" else f" --dtype {result.dtype}"
    command = f"python -m tests.families {quote(result.row)} --column {name} --traceback{precision}"
    print(f"\n{result.row} {result.dtype} {name}: {before}{cell.reason}\n    {command}")


if __name__ == "__main__":
    sys.exit(main())
