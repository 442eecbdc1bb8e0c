"""A table before it has a format: typed cells, where each row comes from, notes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MEASURED, PAPER, LITERATURE = "measured", "paper", "literature"


@dataclass(frozen=True)
class Figure:
    """A number in a table.

    Args:
        value: An accuracy or share in [0, 1], or minutes; None where only `text` is known.
        low: Lower end of the 95% interval.
        high: Upper end.
        text: What to show instead of the value, such as `< 0.047`.
        digits: Digits after the point.
        interval_digits: The same for both ends of the interval.
        unit: `share` or `minutes`.
        beside: A second number, which the paper puts into round brackets after the first.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    text: str = ""
    digits: int = 3
    interval_digits: int = 2
    unit: str = "share"
    beside: Figure | None = None

    @property
    def main(self) -> str:
        """The number as shown, without its interval."""
        own = self.text or ("–" if self.value is None else f"{self.value:.{self.digits}f}")
        return own if self.beside is None else f"{own} ({self.beside.main})"

    @property
    def interval(self) -> str:
        """The interval as shown, such as `[0.91, 0.97]`; empty if there is none."""
        own = ""
        if self.low is not None and self.high is not None:
            own = f"[{self.low:.{self.interval_digits}f}, {self.high:.{self.interval_digits}f}]"
        beside = self.beside.interval if self.beside is not None else ""
        return f"{own or '–'} ({beside})" if beside else own

    def __str__(self) -> str:
        return f"{self.main} {self.interval}".rstrip()


Cell = str | Figure | None


def shown(cell: Cell) -> str:
    """Return a cell as plain text; a dash for nothing."""
    return "–" if cell is None else str(cell)


@dataclass(frozen=True)
class Trace:
    """Where a row's numbers come from.

    Args:
        record: The stored file or folder.
        facts: What to know beside the numbers, in order: images, seed, eps, protocol.
        warnings: Why the numbers may not be trusted as they stand.
    """

    record: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in self.facts.items() if value is not None]
        return ". ".join([", ".join([self.record, *parts]), *self.warnings])


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        source: `measured`, `paper` or `literature`.
        cells: One per column.
        trace: Where the numbers come from; None for the paper's.
    """

    source: str
    cells: tuple[Cell, ...]
    trace: Trace | None = None


@dataclass(frozen=True)
class ReportTable:
    """A table of the paper, filled.

    Args:
        number: The paper's number, such as `2`; empty for a table that the paper does not have.
        title: What it shows.
        columns: Headings; the column `figures` says whether a row is measured or quoted.
        rows: The measured ones first.
        notes: Sentences below it.
    """

    number: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        """Number and title."""
        return f"Table {self.number}. {self.title}" if self.number else self.title

    @property
    def anchor(self) -> str:
        """A short name for links and footnotes: the number, or the title's words."""
        return self.number or "-".join(re.findall("[a-z0-9]+", self.title.lower()))

    @property
    def traces(self) -> list[Trace]:
        """The rows' sources, each once, in order; footnote n is the n-th."""
        found: list[Trace] = []
        for row in self.rows:
            # Facts are mappings, so traces cannot be hashed.
            if row.trace is not None and row.trace not in found:
                found.append(row.trace)
        return found

    def mark(self, row: Row) -> int | None:
        """Return the number of a row's footnote, from 1; None where it has none."""
        return None if row.trace is None else self.traces.index(row.trace) + 1

    @property
    def marked(self) -> int:
        """Index of the column that holds the footnote marks: `figures`, or else the first."""
        return self.columns.index("figures") if "figures" in self.columns else 0

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers."""
        cells = [row.cells for row in self.rows]
        # One figure is enough: the other rows may have nothing there.
        return tuple(any(isinstance(line[k], Figure) for line in cells) for k in range(len(self.columns)))


def measured_figure(row: Mapping[str, Any] | None) -> Figure | None:
    """Turn a row or headline of an evaluation into a figure."""
    return None if row is None else Figure(row["accuracy"], *row["ci95"])


def paper_figure(value: float | str | None) -> Figure | None:
    """Turn a number of the paper, or a bound such as `< 0.047`, into a figure."""
    if value is None:
        return None
    # The paper states its accuracies to four digits.
    return Figure(None, text=value) if isinstance(value, str) else Figure(value, digits=4)
