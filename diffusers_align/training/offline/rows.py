"""A data set's rows, read as the flags say."""

from __future__ import annotations

from typing import Any

from ...data import load_preferences, parse_column_map
from ...data.conversions import indifferent
from ...data.read import Report
from ..run.inputs import check_moved_together, check_one_size, inputs_of, prompts_of_rows


def load_rows(run, kind: str) -> list[dict]:
    """The data set's rows of that kind, after saying what was read and left out."""
    args, pairs = run.args, {}
    if kind == "pair":
        pairs = {"ties": args.ties, "weighting": args.pair_weighting}
    rows, report = _loaded(run, args.dataset_name, kind, split=args.dataset_split, **reading_options(args), **pairs)
    # each tie that is kept has become two pairs of opposite labels
    reason = "all pairs are ties" if pairs.get("ties") == "keep" and 2 * report.ties == len(rows) else indifferent(rows, kind)
    # likes alone are something to learn from, where the script takes them
    if kind != "binary" and reason and not getattr(args, "allow_no_signal", False):
        raise ValueError(f"{args.dataset_name}: {reason}, so there is nothing to learn. Give other data, or pass --allow_no_signal.")
    check_one_size(prompts_of_rows(rows), args.dataset_name)
    return rows


def reading_options(args) -> dict[str, Any]:
    """How the flags have a data set's rows read: arguments of `load_preferences`, for the held-out pairs as for the others."""
    columns = parse_column_map(args.column_map) if args.column_map else None
    return {"column_map": columns, "image_root": args.image_root, "bad_rows": args.bad_rows, "verify": args.verify, "inputs": inputs_of(args)}


def load_captioned(run, source: str) -> list[dict]:
    """The rows of a second data set, of images with captions in columns of a known layout."""
    return _loaded(run, source, "captioned", mappable=False, bad_rows=run.args.bad_rows, verify=run.args.verify, inputs=inputs_of(run.args))[0]


def _loaded(run, source: str, kind: str, **options) -> tuple[list[dict], Report]:
    rows, report = load_preferences(source, kind, max_rows=run.args.max_rows, progress=run.is_main, **options)
    run.print(report)
    check_moved_together(run.args, rows, source)
    return rows, report
