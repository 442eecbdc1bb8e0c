"""`carso report`: the paper's tables from stored results, an HTML page, pictures."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import TextWrapper
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from carso_cli.cli import options
from carso_cli.cli.console import messages, output, print_plain
from carso_cli.cli.progress import RichReporter
from carso_cli.reports.render import to_csv, to_html, to_json, to_latex, to_markdown
from carso_cli.reports.report import TABLES
from carso_cli.reports.table import Figure, ReportTable, Row, shown

_TEXTS = {"markdown": to_markdown, "latex": to_latex, "csv": to_csv, "json": to_json, "html": to_html}
FORMATS = ("rich", *_TEXTS)
_GAP = 2


RunsArgument = Annotated[
    list[Path] | None,
    typer.Argument(metavar="RUN", help="Run folders (default: all in runs/).", show_default=False),
]
RunOption = Annotated[
    list[Path] | None,
    options.optional("--run", "--run-dir", metavar="DIR", help="The same, as an option; repeatable."),
]
TablesOption = Annotated[
    list[str] | None,
    options.optional(
        "--table",
        metavar="N",
        help=f"Only this table, of the paper or beyond it ({', '.join(TABLES)}); repeatable.",
    ),
]
EvaluationsOption = Annotated[
    list[str] | None,
    options.optional(
        "--evaluation",
        metavar="NAME",
        help="Only this evaluation, by folder name or attack; 'not NAME' leaves it out; repeatable.",
    ),
]
FormatOption = Annotated[str | None, options.choice("--format", "Format", *FORMATS, default="rich")]
HtmlOption = Annotated[
    Path | None, options.optional("--html", metavar="FILE", help="Write one page that opens offline.")
]
PicturesOption = Annotated[
    Path | None, options.optional("--pictures", metavar="DIR", help="Write the pictures as PNG and SVG.")
]


def command(
    runs: RunsArgument = None,
    run: RunOption = None,
    tables: TablesOption = None,
    evaluations: EvaluationsOption = None,
    form: FormatOption = None,
    html: HtmlOption = None,
    pictures: PicturesOption = None,
    device: options.DeviceOption = "auto",
) -> None:
    """Show the paper's tables, filled from stored results, with the paper's figures beside ours.

    Measures nothing: every row of ours names the records it was drawn from. With --html, writes a page of
    tables, curves, picture grids, sanity checks and settings.
    """
    from carso_cli.reports.report import report

    result = report(
        [*(runs or ()), *(run or ())],
        reporter=RichReporter(),
        tables=tables or (),
        evaluations=evaluations or (),
        html=html,
        pictures=pictures,
        device=device,
    )
    # A user who asks for files only does not want every table on the terminal too.
    if form is not None or tables or not result.written:
        _print(result.tables, form or "rich")
    for path in result.written:
        messages().print(f"written: {path}", soft_wrap=True)


def _print(tables: list[ReportTable], form: str) -> None:
    if form == "rich":
        show_tables(tables)
    else:
        print_plain(_TEXTS[form](tables), end="")


class _Wrapper(TextWrapper):
    """Breaks lines after every hyphen too, since names of runs are long hyphenated words."""

    # The group keeps blanks as pieces of their own, which `TextWrapper` needs; it drops None and ''.
    wordsep_re = re.compile(r"(\s+)|(?<=\w-)")


def show_tables(tables: list[ReportTable]) -> None:
    """Print tables on stdout; one too wide for the terminal becomes one paragraph per row."""
    console = output()
    for place, one in enumerate(tables):
        if place:
            console.print()
        cells = [_cells(one, row) for row in one.rows]
        widths = _fit(one, cells, console.width)
        if widths is None:
            _print_paragraphs(console, one)
        else:
            console.print(_drawn(one, cells, widths))
        for note in one.notes:
            console.print(Text(note, style="dim"))
        for mark, trace in enumerate(one.traces, start=1):
            # Unwrapped, so that the path of the record can be copied.
            console.print(Text(f"({mark}) {trace}", style="dim"), soft_wrap=True)


def _cells(one: ReportTable, row: Row) -> list[str]:
    """Write a row's cells; a figure's interval goes below it, which saves a third of the width."""
    texts = [
        f"{cell.main}\n{cell.interval}".rstrip() if isinstance(cell, Figure) else shown(cell)
        for cell in row.cells
    ]
    texts[one.marked] += _mark(one, row)
    return texts


def _mark(one: ReportTable, row: Row) -> str:
    mark = one.mark(row)
    return "" if mark is None else f" ({mark})"


def _fit(one: ReportTable, cells: list[list[str]], available: int) -> list[int] | None:
    """Return the columns' widths, text columns narrowed as far as needed; None if they cannot fit."""
    columns = [[heading, *(line[place] for line in cells)] for place, heading in enumerate(one.columns)]
    widths = [max(len(part) for text in column for part in text.split("\n")) for column in columns]
    excess = sum(widths) + _GAP * (len(widths) - 1) - available
    for place, flush in enumerate(one.numeric):
        # A figure's interval holds a space and is not broken.
        if not flush and excess > 0:
            # Width 1 breaks wherever a break is allowed: the longest piece is the least width of the column.
            narrow = _Wrapper(width=1, break_long_words=False)
            longest = max(len(part) for text in columns[place] for part in narrow.wrap(text))
            given = min(excess, widths[place] - longest)
            widths[place] -= given
            excess -= given
    return None if excess > 0 else widths


def _drawn(one: ReportTable, cells: list[list[str]], widths: list[int]) -> Table:
    drawn = Table(
        title=one.heading, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    # The box itself puts one blank between columns.
    drawn.padding = (0, _GAP - 1, 0, 0)
    for column, flush, width in zip(one.columns, one.numeric, widths, strict=True):
        drawn.add_column(Text(column), justify="right" if flush else "left", no_wrap=flush, width=width)
    for line in cells:
        texts = zip(line, one.numeric, widths, strict=True)
        # Wrapped here, since Rich breaks no line after a hyphen.
        drawn.add_row(
            *(Text(text if flush else _Wrapper(width=width).fill(text)) for text, flush, width in texts)
        )
    return drawn


def _print_paragraphs(console: Console, one: ReportTable) -> None:
    console.print(Text(one.heading, style="italic"))
    for row in one.rows:
        texts = [cell for cell in row.cells if isinstance(cell, str)]
        console.print(Text(", ".join(texts) + _mark(one, row), style="bold"))
        named = zip(one.columns, row.cells, strict=True)
        figures = [f"{name} {cell}" for name, cell in named if isinstance(cell, Figure)]
        console.print(Text(f"  {'; '.join(figures) or '–'}"))
