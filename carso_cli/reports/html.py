"""HTML from tables, pictures and settings; every text is escaped, nothing is fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from carso_cli.reports.markup import shown
from carso_cli.reports.table import Cell, Figure, ReportTable, Row

_STYLE = Path(__file__).with_name("page.css")
_VERDICTS = {True: "passed", False: "failed", None: "not run"}


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture in both styles, embedded in the page.

    Args:
        title: Heading above it.
        caption: What it was drawn from.
        alt: What it shows, for those who do not see it.
        light: File content for a light page.
        dark: The same for a dark one.
        kind: `svg` or `png`.
        wide: Whether it takes the whole width.
    """

    title: str
    caption: str
    alt: str
    light: bytes
    dark: bytes
    kind: str = "svg"
    wide: bool = False

    def html(self) -> str:
        """Return a figure element."""
        classes = f"{self.kind}{' wide' if self.wide else ''}"
        return (
            f'<figure class="{classes}"><h4>{escape(self.title)}</h4><picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="{self._uri(self.dark)}">'
            f'<img src="{self._uri(self.light)}" alt="{escape(self.alt)}"></picture>'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )

    def _uri(self, content: bytes) -> str:
        kind = {"svg": "image/svg+xml", "png": "image/png"}[self.kind]
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def table_html(table: ReportTable) -> str:
    """Return a table with its notes and the records of its rows."""
    name = f"t{table.anchor}"
    numeric = table.numeric
    head = "".join(
        f'<th scope="col"{_flush(flush)}>{escape(column)}</th>'
        for column, flush in zip(table.columns, numeric, strict=True)
    )
    body = "".join(_row_html(table, row, name, numeric) for row in table.rows)
    traces = "".join(
        f'<li id="{name}-{mark}">{escape(str(trace))}.</li>'
        for mark, trace in enumerate(table.traces, start=1)
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    footnotes = f"<ol>{traces}</ol>" if traces else ""
    return (
        f'<section class="table" id="{name}"><h3>{escape(table.heading)}</h3>'
        f'<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<div class="notes">{notes}{footnotes}</div></section>'
    )


def _row_html(table: ReportTable, row: Row, name: str, numeric: Sequence[bool]) -> str:
    cells = []
    for place, (cell, flush) in enumerate(zip(row.cells, numeric, strict=True)):
        text = _cell_html(cell)
        mark = table.mark(row)
        if place == table.marked and mark is not None:
            text += f'<sup><a href="#{name}-{mark}">{mark}</a></sup>'
        kind = ' class="source"' if place == table.marked else _flush(flush)
        cells.append(f'<th scope="row"{kind}>{text}</th>' if place == 0 else f"<td{kind}>{text}</td>")
    return f'<tr class="{escape(row.source)}">{"".join(cells)}</tr>'


def _cell_html(cell: Cell) -> str:
    if isinstance(cell, Figure) and cell.interval:
        return f"{escape(cell.main)} <small>{escape(cell.interval)}</small>"
    return escape(shown(cell))


def _flush(flush: bool) -> str:
    return ' class="number"' if flush else ""


def checks_html(summary: Mapping[str, Any], title: str, *, unfolded: bool = False) -> str:
    """Return an evaluation's trust checks, folded away unless `unfolded`."""
    rows = "".join(_check_html(check) for check in summary["checks"])
    head = "".join(
        f"<th{_flush(name in ('value', 'bound'))}>{name}</th>"
        for name in ("check", "value", "bound", "verdict", "meaning")
    )
    failed = len(summary["failed"])
    verdict = f'<span class="failed">{failed} failed</span>' if failed else "none failed"
    return (
        f"<details{' open' if unfolded else ''}><summary>{escape(title)}: {verdict}</summary>"
        f'<div class="scroll" tabindex="0"><table class="checks"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _check_html(check: Mapping[str, Any]) -> str:
    verdict = _VERDICTS[check["passed"]]
    return (
        f'<tr class="{verdict.replace(" ", "-")}"><th scope="row">{escape(check["name"])}</th>'
        f'<td class="number">{_number(check["value"])}</td>'
        f'<td class="number">{_number(check["threshold"])}</td>'
        f"<td>{verdict}</td><td>{escape(check['meaning'])}</td></tr>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def settings_html(title: str, text: str) -> str:
    """Return a text such as a recipe, folded away."""
    return (
        f"<details><summary>{escape(title)}</summary>"
        f'<div class="scroll" tabindex="0"><pre>{escape(text)}</pre></div></details>'
    )


def tiles_html(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Return the figures that a reader looks for first: name, value and remark of each."""
    return (
        '<dl class="tiles">'
        + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd><small>{escape(remark)}</small></dd></div>"
            for name, value, remark in tiles
        )
        + "</dl>"
    )


def page_html(title: str, sections: Sequence[tuple[str, str, str]], *, version: str) -> str:
    """Return a whole page that opens offline.

    Args:
        title: Title and heading.
        sections: Anchor, heading and HTML of each section.
        version: Version of carso, for the foot of the page.
    """
    links = "".join(f'<a href="#{escape(anchor)}">{escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section id="{escape(anchor)}"><h2>{escape(heading)}</h2>{content}</section>'
        for anchor, heading, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # No script and no request can come from this page, whatever a run's files say.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE.read_text()}</style></head>"
        f"<body><header><h1>{escape(title)}</h1><nav>{links}</nav></header><main>{body}</main>"
        f"<footer>Drawn from stored records by carso {escape(version)}. Rows marked paper or literature are "
        "quoted, all others measured.</footer></body></html>\n"
    )
