"""Which tables can be drawn: the paper's by number, and those beyond it by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from carso_cli.errors import UsageError, nearest
from carso_cli.reports.ablations import further_ablations, table_five, table_four, table_seventeen
from carso_cli.reports.comparison import comparison_tables
from carso_cli.reports.results import table_eighteen, table_nineteen, table_one, table_three, table_two
from carso_cli.reports.stored import StoredRun
from carso_cli.reports.table import ReportTable

_PAPER: dict[str, Callable[[Sequence[StoredRun]], ReportTable]] = {
    "1": table_one,
    "2": table_two,
    "3": table_three,
    "4": table_four,
    "5": table_five,
    "17": table_seventeen,
    "18": table_eighteen,
    "19": table_nineteen,
}
_COMPARISON = "comparison"
TABLES = (*_PAPER, _COMPARISON)
"""What can be asked for: the paper's tables by number, and one beyond them."""


def require_tables(numbers: Sequence[str]) -> None:
    """Refuse what is not among `TABLES`.

    Raises:
        UsageError: If a number is not; the message holds the nearest.
    """
    for number in numbers:
        if number not in TABLES:
            said = (f"there is no table '{number}' to draw", nearest(number, TABLES))
            raise UsageError("; ".join(filter(None, said)), hint=f"use {', '.join(TABLES)}")


def draw_tables(runs: Sequence[StoredRun], numbers: Sequence[str] = ()) -> list[ReportTable]:
    """Draw tables from what runs have stored.

    Args:
        runs: The runs.
        numbers: Some of `TABLES`; when empty all of the paper's, and of the others, further ablations among
            them, those that have rows.

    Raises:
        UsageError: If a number is not among `TABLES`.
    """
    require_tables(numbers)
    drawn: list[ReportTable] = []
    for number in dict.fromkeys(numbers or TABLES):
        drawn += comparison_tables(runs) if number == _COMPARISON else [_PAPER[number](runs)]
    return drawn if numbers else [one for one in drawn + further_ablations(runs) if one.number or one.rows]
