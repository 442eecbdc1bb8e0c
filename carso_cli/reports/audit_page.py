"""An audit as a page, as a part of a notebook, and as a table of pandas; one template, every text escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import pandas  # type: ignore[import-untyped]  # it comes without types

from carso_cli import __version__
from carso_cli.evaluation.audit_report import AuditReport
from carso_cli.runs.records import Record

_FOLDER = Path(__file__).parent
_DASH = "–"


def audit_page(report: AuditReport) -> str:
    """Return a whole page that opens offline and runs no script."""
    return _render("page", report)


def audit_part(report: AuditReport) -> str:
    """Return what a notebook shows: the page's content alone."""
    return _render("part", report)


def records_frame(records: Sequence[Record]) -> pandas.DataFrame:
    """Return one row per record; its columns are the record's fields, also where there is no record."""
    names = [entry.name for entry in fields(Record)]
    return pandas.DataFrame(
        [{name: getattr(record, name) for name in names} for record in records], columns=names
    )


def results_frame(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Return one row per target and attack of an evaluation."""
    names = ("target", "attack", "view", "n_samples", "eps", "norm", "accuracy")
    return pandas.DataFrame(
        [
            {name: row[name] for name in names}
            | dict(zip(("ci95_low", "ci95_high"), row["ci95"], strict=True))
            | {"n_images": row["n_images"]}
            for row in rows
        ]
    )


def result_part(headline: str, frame: pandas.DataFrame) -> str:
    """Return what a notebook shows of an evaluation: its number and verdict, and a table."""
    table = frame.to_html(index=False, float_format="%.3f", na_rep=_DASH, border=0)
    return f"<p><strong>{escape(headline)}</strong></p>\n{table}"


def _render(block: str, report: AuditReport) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        # Names come from files and command lines of others.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = _share
    environment.filters["number"] = _number
    environment.filters["interval"] = _interval
    return environment.get_template("audit.html.jinja").render(
        report=report,
        summary=report.summary,
        whole=block == "page",
        style=_FOLDER.joinpath("page.css").read_text(encoding="utf-8"),
        version=__version__,
    )


def _share(value: float | None) -> str:
    return _DASH if value is None else f"{value:.3f}"


def _number(value: Any) -> str:  # noqa: ANN401  (a JSON value)
    if value is None:
        return _DASH
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(values: Sequence[float] | None) -> str:
    return "" if not values else f"[{values[0]:.2f}, {values[1]:.2f}]"
