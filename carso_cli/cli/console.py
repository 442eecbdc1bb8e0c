"""What a user sees: results on stdout, everything else on stderr.

Text from files is shown as it is: markup in it is not interpreted, control characters are replaced.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import typer
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from carso_cli.errors import CarsoError

Result = TypeVar("Result")

# All control characters but tabulators and ends of lines, Unicode's second set of them included.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Console(Console):
    """Interprets no markup, and lets control characters through only where Rich itself sets them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            # Control segments are Rich's own, such as those that redraw a bar.
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def output() -> Console:
    """Return a console on stdout, for results."""
    # No highlighting: Rich would colour every number and path that it finds in a text.
    return _Console(highlight=False, markup=False)


def messages() -> Console:
    """Return a console on stderr, for progress, warnings and errors."""
    return _Console(stderr=True, highlight=False, markup=False)


def printable(text: str) -> str:
    """Return a text with a `\ufffd` in place of every control character."""
    return _CONTROL.sub("\ufffd", text)


def print_plain(text: str, *, end: str = "\n") -> None:
    """Print a text on stdout, neither wrapped nor coloured, so that it can be copied or redirected."""
    typer.echo(printable(text) + end, nl=False)


def print_result(result: Result, draw: Callable[[Result], None], *, as_json: bool) -> None:
    """Print what a command found: as JSON, or with the function that draws it for a reader."""
    if as_json:
        print_json(result)
    else:
        draw(result)


def print_text(text: str) -> None:
    """Print prose on stdout, wrapped between words at the terminal's width, at 80 columns elsewhere."""
    output().print(Text(text))


def show_error(error: CarsoError, *, title: str = "error") -> None:
    """Show an error and its hint on stderr: on a terminal the message in a panel, elsewhere plain lines."""
    console = messages()
    # In a log, a message stays on one line, so that it can be searched for.
    if console.is_terminal:
        console.print(Panel(Text(error.message), title=title, title_align="left", border_style="red"))
    else:
        console.print(Text(f"{title}: {error.message}"), soft_wrap=True)
    if error.hint:
        # Below the panel and never wrapped here: a command in it can be copied whole.
        console.print(Text(f"hint: {error.hint}", style="cyan"), soft_wrap=True)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    caption: str = "",
    numeric: Sequence[str] = (),
) -> Table:
    """Return a table that stays readable at 80 columns: long cells fold, nothing is cut.

    Args:
        columns: Headings.
        rows: One text per column; markup is not interpreted.
        title: Line above.
        caption: Line below.
        numeric: Headings whose cells are set flush right and kept on one line.
    """
    shown = Table(
        title=title or None,
        caption=caption or None,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
        padding=(0, 1),
    )
    names = max((len(row[0]) for row in rows), default=0)
    for position, heading in enumerate(columns):
        flush = heading in numeric
        shown.add_column(
            Text(heading),
            justify="right" if flush else "left",
            overflow="fold",
            no_wrap=flush,
            # Rich would narrow the names first, and they are what a reader looks for.
            min_width=min(names, 28) if position == 0 else None,
        )
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], **more: Any) -> None:  # noqa: ANN401
    """Print a `table` on stdout."""
    output().print(table(columns, rows, **more))


def figure(value: float | None) -> str:
    """Write a number with four significant digits: `123.4`, `0.001235`, `12,346`; a dash for None."""
    if value is None:
        return "–"
    if math.isfinite(value) and abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def accuracy(value: float | None, interval: Sequence[float] | None = None) -> str:
    """Write an accuracy in [0, 1] with its interval: `0.945 [0.91, 0.97]`; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def duration(seconds: float | None) -> str:
    """Write a time as `42 s`, `3 min 05 s` or `2 h 07 min`; a dash for None."""
    if seconds is None:
        return "–"
    # Rounded before the unit is chosen, so that 59.7 s reads `1 min 00 s`, not `60 s`.
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def print_json(result: object) -> None:
    """Print a result as JSON on stdout; numbers that are not finite become null."""
    # JSON has no NaN or infinity: Python would write bare words, which other parsers refuse.
    text = json.dumps(_finite(result), indent=2, ensure_ascii=False)
    # `json.dumps` escapes the first set of control characters only; a terminal acts on the second too.
    typer.echo(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def followed(result: Mapping[str, Any]) -> str:
    """Return on which images a training's accuracies are, as words for a table."""
    words = {"train": "on images trained on", "test": "on the test split"}
    return words.get(result.get("followed_on", ""), "held out")
