"""`carso report`: the paper's tables, a page and pictures from what runs have stored.

    result = report([Path("runs/digits")], reporter=reporter, tables=["2"])
    to_markdown(result.tables)

Nothing is attacked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from carso_cli.errors import StateError, UsageError, nearest
from carso_cli.io.json_files import ensure_folder, write_atomically
from carso_cli.reports.comparison import comparison_tables
from carso_cli.reports.load import read_run, results_of
from carso_cli.reports.paper_tables import PAPER_TABLES, further_ablations
from carso_cli.reports.stored import StoredAblation, StoredEvaluation, StoredRun
from carso_cli.reports.table import ReportTable
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter

_COMPARISON = "comparison"
_NOT = "not "
TABLES = (*PAPER_TABLES, _COMPARISON)
"""The tables that users can ask for: the paper's by number, and one beyond them."""


@dataclass(frozen=True)
class Report:
    """What was drawn.

    Args:
        tables: The tables.
        written: Files: the page, the pictures.
    """

    tables: list[ReportTable]
    written: list[Path]


def report(
    runs: Sequence[Path],
    *,
    reporter: Reporter,
    tables: Sequence[str] = (),
    evaluations: Sequence[str] = (),
    html: Path | None = None,
    pictures: Path | None = None,
    device: str = "auto",
) -> Report:
    """Draw tables, and if asked for a page and pictures.

    Args:
        runs: Run folders; every one under `runs/` when empty.
        reporter: Where progress and warnings go.
        tables: Some of `TABLES`; all when empty.
        evaluations: Only these, by the folder's name or by the attack; `not NAME` leaves one out.
        html: File of a page that opens offline.
        pictures: Folder that receives every picture as PNG and SVG.
        device: Where reconstructions are made.

    Raises:
        UsageError: If a table or an evaluation is unknown, or the pictures of two runs would take the same
            names.
        StateError: If a folder holds no run, or there is none.
        CarsoError: If a file cannot be written.
    """
    # First, so that a misspelt table is not hidden by a missing run.
    for name in tables:
        if name not in TABLES:
            parts = (f"there is no table '{name}' to draw", nearest(name, TABLES))
            raise UsageError("; ".join(filter(None, parts)), hint=f"use {', '.join(TABLES)}")
    folders = list(dict.fromkeys(runs)) or find_runs(Path("runs"))
    stored = choose_evaluations([read_run(folder, reporter) for folder in folders], evaluations)
    drawn = draw_tables(stored, tables)
    written: list[Path] = []
    if html is not None or pictures is not None:
        # Only pages and pictures need matplotlib and torch.
        from carso_cli.reports.page import build_page
        from carso_cli.reports.plots import draw_plots

        # Names and folders before any drawing, which may load models and take minutes.
        if pictures is not None:
            _require_different_names(stored)
            ensure_folder(pictures)
        if html is not None:
            ensure_folder(html.parent)
        plots = {run.path: draw_plots(run, reporter, device) for run in stored}
        if pictures is not None:
            for run in stored:
                # Absolute, since a run that is named `.` has no name of its own.
                folder = pictures if len(stored) == 1 else ensure_folder(pictures / run.path.absolute().name)
                written += [path for plot in plots[run.path] for path in plot.save(folder)]
        if html is not None:
            write_atomically(html, build_page(stored, drawn, plots))
            written.append(html)
    return Report(drawn, written)


def choose_evaluations(runs: Sequence[StoredRun], names: Sequence[str]) -> list[StoredRun]:
    """Return runs with some of their evaluations, and with those rows of their ablations that show them.

    Args:
        runs: The runs.
        names: Folder names or attacks to choose; `not NAME` leaves one out.

    Raises:
        UsageError: If no evaluation bears a name.
    """
    every = [one for run in runs for one in (*run.evaluations, *_of_ablations(run))]
    known = {name for one in every for name in _names(one)}
    left_out = {name.removeprefix(_NOT).strip() for name in names if name.startswith(_NOT)}
    chosen = {name for name in names if not name.startswith(_NOT)}
    for name in (*chosen, *left_out):
        if name not in known:
            parts = (f"no evaluation is named '{name}'", nearest(name, known))
            raise UsageError("; ".join(filter(None, parts)), hint=f"use {', '.join(sorted(known))}")

    def wanted(one: StoredEvaluation) -> bool:
        return (not chosen or bool(_names(one) & chosen)) and not _names(one) & left_out

    def rows_of(ablation: StoredAblation) -> StoredAblation:
        return replace(ablation, rows=tuple(row for row in ablation.rows if wanted(row.evaluation)))

    return [
        replace(
            run,
            evaluations=list(filter(wanted, run.evaluations)),
            ablations=list(map(rows_of, run.ablations)),
        )
        for run in runs
    ]


def _of_ablations(run: StoredRun) -> list[StoredEvaluation]:
    return [row.evaluation for ablation in run.ablations for row in ablation.rows]


def _names(one: StoredEvaluation) -> set[str]:
    return {one.path.name, str(one.identity["attack"])}


def draw_tables(runs: Sequence[StoredRun], names: Sequence[str] = ()) -> list[ReportTable]:
    """Draw tables from what runs have stored.

    Args:
        runs: The runs.
        names: Some of `TABLES`; when empty all of the paper's, and of the others, further ablations among
            them, those that have rows.
    """
    drawn: list[ReportTable] = []
    for name in dict.fromkeys(names or TABLES):
        drawn += comparison_tables(runs) if name == _COMPARISON else [PAPER_TABLES[name](runs)]
    # A table that was asked for is shown even without rows: it says that nothing is stored.
    return drawn if names else [one for one in drawn + further_ablations(runs) if one.number or one.rows]


def _require_different_names(runs: Sequence[StoredRun]) -> None:
    named: dict[str, Path] = {}
    for run in runs:
        name = run.path.absolute().name
        other = named.setdefault(name, run.path)
        if other != run.path:
            raise UsageError(
                f"the pictures of {other} and {run.path} would both go to a folder {name}",
                hint="draw one of them at a time, each with its own --pictures folder",
            )


def find_runs(parent: Path) -> list[Path]:
    """Return the run folders directly under a folder: those with results, or with a trained purifier.

    Raises:
        StateError: If there is none.
    """
    folders = [RunFolder(path) for path in sorted(parent.glob("*"))]
    found = [
        folder.path
        for folder in folders
        if results_of(folder) or (folder.recipe.is_file() and folder.purifier.is_file())
    ]
    if not found:
        raise StateError(
            f"{parent} holds no run to report",
            hint="name the folder of a run, or make one with: carso quickstart",
        )
    return found
