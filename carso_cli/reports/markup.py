"""A table as text: Markdown, LaTeX, CSV, JSON.

- `to_markdown`, `to_latex`: for people, with footnotes that say where each row comes from;
- `to_csv`, `to_json`: for programs, every figure with its interval and its record.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from carso_cli.reports.table import Cell, Figure, ReportTable, Row

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "†": r"\dag{}",
    "…": r"\dots{}",
}
_MARKDOWN = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]<>|#"} | {"\n": " "})
_FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")
CSV_COLUMNS = (
    *("table", "row", "source", "label", "column", "value", "low", "high", "text", "unit"),
    *("record", "facts", "warnings"),
)


def shown(cell: Cell) -> str:
    """Return a cell as plain text; a dash for nothing."""
    return "–" if cell is None else str(cell)


def to_markdown(tables: Sequence[ReportTable]) -> str:
    """Return tables in Markdown, with footnotes `[^2-1]` of table and record."""
    return "\n".join(_markdown_table(table) for table in tables)


def _markdown_table(table: ReportTable) -> str:
    name = table.anchor
    rules = ["---:" if flush else "---" for flush in table.numeric]
    lines = [
        f"## {_markdown(table.heading)}",
        "",
        _markdown_line([_markdown(text) for text in table.columns]),
    ]
    lines.append(_markdown_line(rules))
    for row in table.rows:
        cells = [_markdown(shown(cell)) for cell in row.cells]
        mark = table.mark(row)
        if mark is not None:
            cells[table.marked] += f"[^{name}-{mark}]"
        lines.append(_markdown_line(cells))
    for note in table.notes:
        lines += ["", _markdown(note)]
    lines += [""] if table.traces else []
    lines += [
        f"[^{name}-{mark}]: {_markdown(str(trace))}" for mark, trace in enumerate(table.traces, start=1)
    ]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    return text.translate(_MARKDOWN)


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def to_latex(tables: Sequence[ReportTable]) -> str:
    """Return tables in LaTeX that needs no package."""
    return "\n".join(_latex_table(table) for table in tables)


def _latex_table(table: ReportTable) -> str:
    layout = "".join("r" if flush else "l" for flush in table.numeric)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(table.heading)}}}"]
    lines += [rf"\begin{{tabular}}{{{layout}}}", r"\hline"]
    lines += [_latex_line([_latex(text) for text in table.columns]), r"\hline"]
    for row in table.rows:
        cells = [_latex(shown(cell)) for cell in row.cells]
        mark = table.mark(row)
        if mark is not None:
            cells[table.marked] += rf"\textsuperscript{{{mark}}}"
        lines.append(_latex_line(cells))
    lines += [r"\hline", r"\end{tabular}", ""]
    notes = [_latex(note) for note in table.notes]
    notes += [
        rf"\textsuperscript{{{mark}}}{_latex(str(trace))}."
        for mark, trace in enumerate(table.traces, start=1)
    ]
    lines += [rf"{{\footnotesize {note}\par}}" for note in notes]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def to_csv(tables: Sequence[ReportTable]) -> str:
    """Return one line per figure, see `CSV_COLUMNS`; empty cells of a table have no line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in tables:
        for number, row in enumerate(table.rows, start=1):
            for column, cell in zip(table.columns, row.cells, strict=True):
                if isinstance(cell, Figure):
                    writer.writerow(_csv_line(table, number, row, column, cell))
    return stream.getvalue()


def _csv_line(table: ReportTable, number: int, row: Row, column: str, figure: Figure) -> list[object]:
    label = "; ".join(cell for cell in row.cells if isinstance(cell, str))
    trace = row.trace
    facts = {} if trace is None else {key: value for key, value in trace.facts.items() if value is not None}
    return [
        table.anchor,
        number,
        row.source,
        _harmless(label),
        _harmless(column),
        figure.value,
        figure.low,
        figure.high,
        _harmless(figure.text),
        figure.unit,
        "" if trace is None else _harmless(trace.record),
        "; ".join(f"{name} {value}" for name, value in facts.items()),
        "" if trace is None else "; ".join(trace.warnings),
    ]


def _harmless(text: str) -> str:
    # A spreadsheet takes such a text for a formula.
    return f"'{text}" if text.startswith(_FORMULA_SIGNS) else text


def to_json(tables: Sequence[ReportTable]) -> str:
    """Return tables as JSON; see `as_values`."""
    return json.dumps(as_values(tables), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_values(tables: Sequence[ReportTable]) -> dict[str, Any]:
    """Return `schema` and `tables`, each with `number`, `title`, `columns`, `rows` and `notes`.

    A row has `source`, `cells` and `trace`. A figure is an object with `value`, `low`, `high`, `text` and
    `unit`; other cells are texts or null.
    """
    return {"schema": 1, "tables": [_table_values(table) for table in tables]}


def _table_values(table: ReportTable) -> dict[str, Any]:
    return {
        "number": table.number or None,
        "title": table.title,
        "columns": list(table.columns),
        "rows": [
            {
                "source": row.source,
                "cells": [_cell_values(cell) for cell in row.cells],
                "trace": None
                if row.trace is None
                else {
                    "record": row.trace.record,
                    "facts": dict(row.trace.facts),
                    "warnings": list(row.trace.warnings),
                },
            }
            for row in table.rows
        ],
        "notes": list(table.notes),
    }


def _cell_values(cell: Cell) -> object:
    if not isinstance(cell, Figure):
        return cell
    return {"value": cell.value, "low": cell.low, "high": cell.high, "text": cell.text, "unit": cell.unit}
