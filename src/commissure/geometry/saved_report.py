"""Reports as files: what `commissure geometry trace` writes, and tables of others that hold steps and ranks.

JSON: {"model": ..., "rows": [{"step": 0, "site": "norm", ..., "rankme": 12.3, ...}, ...], "failed": [...]}
CSV: a header with a column of steps and one of ranks, at least.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from commissure.core.errors import InputError
from commissure.core.files import replacing
from commissure.geometry.tracing import TraceRow
from commissure.geometry.trajectory import Series, Trajectory, TrajectoryRow

__all__ = ["plain_row", "read_series", "read_trajectory", "write_report"]

_FIELDS = {field.name: field for field in fields(TraceRow)}
_MOST_BYTES = 1 << 28  # a report of 100,000 rows takes 40 MB


def plain_row(row: TrajectoryRow) -> dict[str, Any]:
    """A row as JSON has it: numbers it has no word for are null."""
    told = {"step": row.step, **asdict(row.geometry)}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in told.items()
    }


def write_report(path: Path, about: dict[str, Any]) -> None:
    """Write a report, the old one staying until the new one is whole."""
    try:
        with replacing(path) as partial:
            partial.write_text(json.dumps(about, indent=1))
    except OSError as error:
        raise InputError("out", str(path), "a place that can be written", error.strerror or str(error)) from error


def read_trajectory(path: Path) -> Trajectory:
    """The rows of a report; what is none is an InputError that says where."""
    try:
        told = json.loads(_text(path))
    except ValueError as error:
        raise InputError("file", str(path), f"JSON ({error})") from None
    rows = told.get("rows") if isinstance(told, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError("file", str(path), "a report with rows, as `commissure geometry trace --out` writes it")
    return Trajectory(tuple(_row(i, row) for i, row in enumerate(rows)))


def _row(i: int, given: Any) -> TrajectoryRow:
    if not isinstance(given, dict) or given.keys() != {"step", *_FIELDS}:
        found = sorted(given) if isinstance(given, dict) else type(given).__name__
        raise InputError(f"rows[{i}]", found, f"an object with step, {', '.join(_FIELDS)}")
    values = dict(given)
    step = values.pop("step")
    for name, value in [("step", step), *values.items()]:
        kind = "int" if name == "step" else str(_FIELDS[name].type)
        if not _fits(value, kind):
            raise InputError(f"rows[{i}].{name}", value, kind)
    if values["alpha_window"] is not None:
        values["alpha_window"] = tuple(values["alpha_window"])
    for name in values:
        if _FIELDS[name].type == "float" and values[name] is None:
            values[name] = math.nan
    return TrajectoryRow(step, TraceRow(**values))


def _fits(value: Any, kind: str) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "int":
        return is_whole and value >= 0
    if kind.startswith("float"):
        return value is None or is_whole or isinstance(value, float)
    if kind.startswith("tuple"):
        return value is None or (isinstance(value, list) and len(value) == 2 and all(_fits(x, "int") for x in value))
    return isinstance(value, str)


def read_series(
    path: Path, *, step: str = "step", rank: str = "rankme", stderr: str | None = None, alpha: str | None = None
) -> Series:
    """Columns of a CSV file, by the names in its header; empty cells are nan."""
    try:
        rows = list(csv.reader(_text(path).splitlines()))
    except csv.Error as error:
        raise InputError("file", str(path), f"comma-separated values ({error})") from None
    if len(rows) < 2:
        raise InputError("file", str(path), "a header and one row at least")
    header = [name.strip() for name in rows[0]]
    columns = [_column(path, header, rows[1:], name) for name in (step, rank)]
    for option, standard in ((stderr, "rankme_stderr"), (alpha, "alpha")):
        name = option or (standard if standard in header else None)
        columns.append(np.full(len(rows) - 1, np.nan) if name is None else _column(path, header, rows[1:], name))
    return Series(*columns)


def _column(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> np.ndarray:
    if name not in header:
        raise InputError("column", name, f"one of {', '.join(header)}", f"the header of {path.name}")
    at, found = header.index(name), np.empty(len(rows))
    for i, row in enumerate(rows):
        cell = row[at].strip() if at < len(row) else ""
        try:
            found[i] = float(cell) if cell else np.nan
        except ValueError:
            raise InputError(f"{name}, line {i + 2}", cell, "a number") from None
    return found


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError("file", str(path), f"a file of at most {_MOST_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError("file", str(path), "a file that can be read", error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise InputError("file", str(path), f"UTF-8 text ({error.reason})") from None
