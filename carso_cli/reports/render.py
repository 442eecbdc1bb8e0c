"""A report's tables as Markdown, LaTeX, CSV and JSON, and as an HTML page by `page.html.j2`.

Markdown, LaTeX and HTML are for people, with footnotes that name the records of each row; CSV and JSON for
programs, every figure with its interval and its record.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carso_cli import __version__
from carso_cli.reports.table import Figure, ReportTable, shown

if TYPE_CHECKING:
    from jinja2 import Template

# For `translate`, in one pass: sign after sign, replacing would escape its own backslashes.
_LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "–": "--",
        "†": r"\dag{}",
        "‡": r"\ddag{}",
        "…": r"\dots{}",
    }
)
_MARKDOWN = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]<>|#"} | {"\n": " "})
# Signs with which a spreadsheet begins a formula, and blanks that it skips before one.
_FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")
CSV_COLUMNS = (
    *("table", "row", "source", "label", "column", "value", "low", "high", "text", "unit"),
    *("record", "facts", "warnings"),
)


def to_markdown(tables: Sequence[ReportTable]) -> str:
    """Return tables in Markdown, with footnotes `[^2-1]` of table and record."""
    return "\n".join(map(_markdown_table, tables))


def _markdown_table(table: ReportTable) -> str:
    # pandas writes Markdown only with the package tabulate, which carso does not need otherwise.
    name = table.anchor
    rules = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [list(map(_markdown, table.columns)), rules]
    lines += _escaped_cells(table, _markdown, lambda mark: f"[^{name}-{mark}]")
    parts = [f"## {_markdown(table.heading)}", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    parts += map(_markdown, table.notes)
    traces = enumerate(map(str, table.traces), start=1)
    footnotes = "\n".join(f"[^{name}-{mark}]: {_markdown(trace)}" for mark, trace in traces)
    return "\n\n".join(filter(None, (*parts, footnotes))) + "\n"


def _markdown(text: str) -> str:
    return text.translate(_MARKDOWN)


def _escaped_cells(
    table: ReportTable, escape: Callable[[str], str], footnote: Callable[[int], str]
) -> list[list[str]]:
    """Return the rows as escaped texts, each with the mark of its footnote."""
    lines = []
    for row in table.rows:
        cells = [escape(shown(cell)) for cell in row.cells]
        if (mark := table.mark(row)) is not None:
            # After the escape, since a mark is markup itself.
            cells[table.marked] += footnote(mark)
        lines.append(cells)
    return lines


def to_latex(tables: Sequence[ReportTable]) -> str:
    """Return tables in LaTeX, which needs the package booktabs."""
    return "\n".join(map(_latex_table, tables))


def _latex_table(table: ReportTable) -> str:
    import pandas  # type: ignore[import-untyped]

    cells = _escaped_cells(table, _latex, lambda mark: rf"\textsuperscript{{{mark}}}")
    layout = "".join("r" if numeric else "l" for numeric in table.numeric)
    # pandas would escape the footnote marks too, and leave `<` and `>`, which LaTeX's oldest fonts lack.
    tabular = pandas.DataFrame(cells, columns=list(map(_latex, table.columns))).to_latex(
        index=False, escape=False, column_format=layout
    )
    notes = list(map(_latex, table.notes))
    traces = enumerate(map(str, table.traces), start=1)
    notes += [rf"\textsuperscript{{{mark}}}{_latex(trace)}." for mark, trace in traces]
    footnotes = "".join(f"{{\\footnotesize {note}\\par}}\n" for note in notes)
    opening = f"\\begin{{table}}\n\\centering\n\\caption{{{_latex(table.heading)}}}\n"
    return f"{opening}{tabular}\n{footnotes}\\end{{table}}\n"


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def to_csv(tables: Sequence[ReportTable]) -> str:
    """Return one line per figure, see `CSV_COLUMNS`; empty cells of a table have no line."""
    import pandas

    lines = []
    for table in tables:
        for number, row in enumerate(table.rows, start=1):
            label = "; ".join(cell for cell in row.cells if isinstance(cell, str))
            trace: tuple[str, ...] = ("", "", "")
            if row.trace is not None:
                facts = [f"{name} {value}" for name, value in row.trace.facts.items() if value is not None]
                trace = (_harmless(row.trace.record), "; ".join(facts), "; ".join(row.trace.warnings))
            for column, cell in zip(table.columns, row.cells, strict=True):
                named = {column: cell, f"{column}, in brackets": getattr(cell, "beside", None)}
                for name, figure in named.items():
                    if isinstance(figure, Figure) and figure.main != "–":
                        place = (table.anchor, number, row.source, _harmless(label), _harmless(name))
                        values = (figure.value, figure.low, figure.high, _harmless(figure.text), figure.unit)
                        lines.append((*place, *values, *trace))
    # One kind of line end on every system, so that the same report is the same file.
    return str(pandas.DataFrame(lines, columns=CSV_COLUMNS).to_csv(index=False, lineterminator="\n"))


def _harmless(text: str) -> str:
    # A spreadsheet takes such a text for a formula.
    return f"'{text}" if text.startswith(_FORMULA_SIGNS) else text


def to_json(tables: Sequence[ReportTable]) -> str:
    """Return `schema` and `tables` as JSON, each with `number`, `title`, `columns`, `rows` and `notes`.

    A row has `source`, `cells` and `trace`. A figure is an object with `value`, `low`, `high`, `text` and
    `unit`; other cells are texts or null.
    """

    def without_layout(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return a dataclass as an object, without a figure's digits, which are for people."""
        return {name: value for name, value in fields if name not in ("digits", "interval_digits")}

    drawn = [asdict(table, dict_factory=without_layout) for table in tables]
    content = {"schema": 1, "tables": [{**table, "number": table["number"] or None} for table in drawn]}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_html(tables: Sequence[ReportTable]) -> str:
    """Return a page of tables alone."""
    return render_page("carso report", tables=tables)


def render_page(title: str, **parts: Any) -> str:  # noqa: ANN401  (see `page.html.j2`)
    """Return an HTML page that opens offline: no script, no request, every text escaped.

    Args:
        title: Title and heading.
        **parts: `runs`, `tables`, `checks` and `settings`, as the head of `page.html.j2` describes them.
    """
    empty: dict[str, Any] = {"runs": (), "tables": (), "checks": (), "settings": ()}
    return _template().render(**empty | parts, title=title, version=__version__) + "\n"


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # True, not chosen by the file's ending: Jinja takes `.j2` for plain text.
        autoescape=True,
        # A misspelt name in the template must be an error, not an empty cell.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=shown, base64=lambda content: b64encode(content).decode())
    return environment.get_template("page.html.j2")
