"""What a reproduction found, as plain data: rows of numbers, bounds they are held to, entries, the report.

The JSON form of `Report` (`reports/<budget>.json`) is what the terminal table, the HTML page and the README are made
from.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from commissure.core.errors import BackendMissing, InputError
from commissure.core.files import replacing

__all__ = ["VERDICTS", "Bound", "Budget", "Entry", "Report", "Row", "Verdict", "number"]

Budget = Literal["smoke", "quick", "full"]
Verdict = Literal["PASS", "MISS", "NOT CLAIMED", "NOT RUN", "ERROR"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

_STRICT = {"extra": "forbid", "ser_json_inf_nan": "strings"}


@dataclass(frozen=True)
class Row:
    """One measured number; `low` and `high` are the ends of its 95 % confidence interval over seeds."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    key: str
    label: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    paper: str = ""
    note: str = ""

    @property
    def text(self) -> str:
        """Value and interval with common decimals.

        >>> Row("gain", "gain over Wiener", 0.0912, 0.0811, 0.1014).text
        '0.091 [0.081, 0.101]'
        """
        ends = [x for x in (self.low, self.high) if x is not None]
        scale = max((abs(x) for x in (self.value, *ends) if math.isfinite(x)), default=0.0)
        shown = number(self.value, scale)
        if ends:
            shown += " [" + ", ".join("?" if x is None else number(x, scale) for x in (self.low, self.high)) + "]"
        return f"{shown} {self.unit}".strip()


def number(value: float, scale: float | None = None) -> str:
    """Three significant digits at the magnitude `scale` (default: the value's own).

    >>> number(13.06), number(0.00041, 0.004), number(3.2e-13), number(1234.5)
    ('13.1', '0.00041', '3.2e-13', '1234')
    """
    if not math.isfinite(value):
        return str(value)
    scale = abs(value) if scale is None else scale
    if scale == 0:
        return "0"
    if not 1e-3 <= scale < 1e6:
        return f"{value:.2g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(scale)))}f}"


@dataclass(frozen=True)
class Bound:
    """One inequality on the row with this key: on its value, or on the low or high end of its interval.

    >>> Bound("ratio", at_least=12).is_met(Row("ratio", "eager / C++", 13.0))
    True
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    key: str
    at_least: float | None = None
    at_most: float | None = None
    side: Literal["value", "low", "high"] = "value"

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise InputError("at_least, at_most", (None, None), "at least one number")

    def of(self, row: Row) -> float | None:
        """The number of the row that is held to the inequality."""
        return {"value": row.value, "low": row.low, "high": row.high}[self.side]

    def is_met(self, row: Row) -> bool:
        """Whether the row satisfies the inequality; NaN and a missing interval end never do."""
        value = self.of(row)
        if value is None:
            return False
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    @property
    def text(self) -> str:
        """The inequality in words and signs, as in '≥ 12'."""
        parts = [f"{sign} {x:g}" for sign, x in (("≥", self.at_least), ("≤", self.at_most)) if x is not None]
        return " and ".join(parts) + ("" if self.side == "value" else f" ({self.side} end)")


@dataclass(frozen=True)
class Entry:
    """One claim's result; `note` says what a reader must know, `trace` where an ERROR came from."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    id: str
    paper: str
    statement: str
    quoted: str
    gate: tuple[Bound, ...]
    verdict: Verdict
    rows: tuple[Row, ...] = ()
    n_seeds: int = 0
    note: str = ""
    data: str = ""
    figure: str | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    trace: str = ""

    def bounds_on(self, row: Row) -> tuple[Bound, ...]:
        """The inequalities of the gate that concern this row."""
        return tuple(bound for bound in self.gate if bound.key == row.key)


@dataclass(frozen=True)
class Report:
    """One reproduction: where, when, with what, and what it found."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    budget: Budget
    created: str
    commit: str
    machine: dict[str, str]
    versions: dict[str, str]
    entries: tuple[Entry, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many entries have each verdict, those that occur, in the order of `VERDICTS`."""
        found = Counter(entry.verdict for entry in self.entries)
        return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}

    def to_json(self, *, figures: bool = True) -> str:
        """Indented JSON; without `figures` each figure is null."""
        report = self if figures else replace(self, entries=tuple(replace(e, figure=None) for e in self.entries))
        return _adapter(Report).dump_json(report, indent=1).decode()

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote; anything else raises `InputError`."""
        return _validated(cls, text, "text")

    def to_frame(self) -> Any:
        """A pandas DataFrame with one line a row of every entry; without pandas `BackendMissing`."""
        try:
            import pandas
        except ImportError:
            raise BackendMissing("pandas", "frames", "Report.to_frame") from None
        lines = [
            {"claim": entry.id, "verdict": entry.verdict, **{f.name: getattr(row, f.name) for f in fields(row)}}
            for entry in self.entries
            for row in entry.rows
        ]
        return pandas.DataFrame(lines)

    def write(self, path: str | Path) -> Path:
        """Write the JSON to `path`, whole or not at all."""
        return write_whole(Path(path), self.to_json() + "\n")


def write_whole(path: Path, text: str) -> Path:
    """Write a text file so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def entry_to_json(entry: Entry) -> str:
    """One entry as JSON, for the run store."""
    return _adapter(Entry).dump_json(entry).decode()


def entry_from_json(text: str) -> Entry:
    """Read what `entry_to_json` wrote."""
    return _validated(Entry, text, "text")


@cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _validated(kind: type, text: str, argument: str) -> Any:
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(argument, text[:80], f"the JSON of a {kind.__name__} ({where}: {first['msg']})") from None
