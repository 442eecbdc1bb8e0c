"""Draw the paper's tables, a page and pictures from what runs have stored.

    result = report([Path("runs/digits")], reporter=reporter, tables=["2"])
    to_markdown(result.tables)

Nothing is attacked here. A page shows reconstructions of stored adversarial examples; for them alone the
defence is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from carso_cli.errors import CarsoError, StateError, UsageError
from carso_cli.io.json_files import ensure_folder, read_json, write_atomically
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.reports.stored import StoredRun, read_run
from carso_cli.reports.table import ReportTable
from carso_cli.reports.tables import draw_tables, require_tables
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter


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
    html: Path | None = None,
    pictures: Path | None = None,
    device: str = "auto",
) -> Report:
    """Draw tables, and if asked for a page and pictures.

    Args:
        runs: Run folders; every one under `runs/` when empty.
        reporter: Where progress and warnings go.
        tables: The paper's numbers, of `carso_cli.reports.tables.TABLES`; all when empty.
        html: File of a page that opens offline.
        pictures: Folder that receives every picture as PNG and SVG.
        device: Where reconstructions are made.

    Raises:
        UsageError: If a table is unknown, or the pictures of two runs would take the same names.
        StateError: If a folder holds no run, or there is none.
        CarsoError: If a file cannot be written.
    """
    require_tables(tables)
    folders = list(dict.fromkeys(runs)) or find_runs(Path("runs"))
    stored = [read_stored_run(folder, reporter) for folder in folders]
    drawn = draw_tables(stored, tables)
    written: list[Path] = []
    if html is not None or pictures is not None:
        # Only pages and pictures need matplotlib and torch.
        from carso_cli.reports.page import build_page, draw_pictures

        if pictures is not None:
            _require_names_of_their_own(stored)
        for file in (html, pictures):
            if file is not None:
                ensure_folder(file.parent if file is html else file)
        shown = {run.path: draw_pictures(run, reporter, device) for run in stored}
        if pictures is not None:
            for run in stored:
                folder = pictures if len(stored) == 1 else ensure_folder(pictures / run.path.absolute().name)
                written += [path for group in shown[run.path] for path in group.save(folder)]
        if html is not None:
            write_atomically(html, build_page(stored, drawn, shown))
            written.append(html)
    return Report(drawn, written)


def _require_names_of_their_own(runs: Sequence[StoredRun]) -> None:
    named: dict[str, Path] = {}
    for run in runs:
        name = run.path.absolute().name
        other = named.setdefault(name, run.path)
        if other != run.path:
            raise UsageError(
                f"the pictures of {other} and {run.path} would both go to a folder {name}",
                hint="draw one of them at a time, into --pictures folders of their own",
            )


def find_runs(parent: Path) -> list[Path]:
    """Return the run folders directly under a folder.

    Raises:
        StateError: If there is none.
    """
    found = sorted(path for path in parent.glob("*") if _holds_run(path))
    if not found:
        raise StateError(
            f"{parent} holds no run to report",
            hint="name the folder of a run, or make one with: carso quickstart",
        )
    return found


def _holds_run(path: Path) -> bool:
    folder = RunFolder(path)
    return bool(_results(folder)) or (folder.recipe.is_file() and folder.purifier.is_file())


def _results(folder: RunFolder) -> list[Path]:
    """Return the files that say what was measured: evaluations' settings, then ablations' tables."""
    return [*sorted(folder.evaluation.glob("*/settings.json")), *sorted(folder.ablations.glob("*.json"))]


def read_stored_run(path: Path, reporter: Reporter) -> StoredRun:
    """Read a run folder with its recipe.

    Raises:
        StateError: If the folder holds no run.
    """
    return read_run(path, _recipe_of(path).model_dump(mode="json"), reporter)


def _recipe_of(path: Path) -> Recipe:
    """Return a run's recipe; for a run without training, the shipped one that its results name."""
    folder = RunFolder(path)
    if folder.recipe.is_file():
        return load_recipe(str(folder.recipe.resolve()))
    results = _results(folder)
    if not results:
        raise StateError(
            f"{path} holds no run: neither recipe.yaml nor an evaluation is in it",
            hint="name the folder that carso train-purifier or carso evaluate wrote to",
        )
    name = read_json(results[0]).get("recipe")
    try:
        return load_recipe(str(name))
    except CarsoError as error:
        raise StateError(
            f"{path} holds no recipe.yaml, and the recipe '{name}' of {results[0]} is not a shipped one",
            hint=f"copy the recipe to {folder.recipe}",
        ) from error
