"""The page of a report: the main figures, pictures, tables, sanity checks, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carso_cli.reports.plots import Plot
from carso_cli.reports.render import render_page
from carso_cli.reports.rows import trace_of
from carso_cli.reports.stored import StoredRun
from carso_cli.reports.table import ReportTable, measured_figure


def build_page(
    runs: Sequence[StoredRun], tables: Sequence[ReportTable], plots: Mapping[Path, Sequence[Plot]]
) -> str:
    """Return the whole page as HTML.

    Args:
        runs: The runs.
        tables: Their tables.
        plots: Their pictures, by the run's path.
    """
    parts: dict[str, list[Any]] = {"runs": [], "checks": [], "settings": []}
    for run in runs:
        pictures = [picture for plot in plots[run.path] for picture in plot.for_page()]
        parts["runs"].append({"title": f"{run.data}: {run.path}", "tiles": _tiles(run), "pictures": pictures})
        for one in run.evaluations:
            unfolded = one in run.plain_evaluations[:1]
            title = f"{run.path}, {one.path.name}"
            parts["checks"].append({"title": title, "open": unfolded, "summary": one.summary})
        parts["settings"] += _settings(run)
    title = f"carso report: {', '.join(dict.fromkeys(run.data for run in runs))}"
    return render_page(title, tables=tables, **parts)


def _tiles(run: StoredRun) -> list[tuple[str, str, str]]:
    """Return name, value and remark of the figures that a reader looks for first."""
    tiles = []
    plain = [one for one in run.plain_evaluations if "defence" in one.worst]
    # Where no evaluation is at the recipe's own settings, another heads the run and says how it departs.
    for one in [*plain, *(one for one in run.evaluations if one.identity["attack"] != "noise")][:1]:
        known = one.identity
        # `second_kind` departs without being a field of the identity.
        departing = (key for key in sorted(run.departures(one)) if key in known)
        settings = "".join(f", {key} {known[key]}" for key in departing)
        images = f"{known['n_images']} images{settings}, {one.path.name}"
        for target, name in {"defence": "defence", "classifier": "classifier alone"}.items():
            for attack, against in {"none": "clean", "worst": f"worst case of {known['attack']}"}.items():
                figure = measured_figure(one.find(target, attack))
                if figure is not None:
                    tiles.append((f"{name}, {against}", figure.main, f"{figure.interval} 95%; {images}"))
        verdict = f"{len(one.failed)} failed" if one.failed else "none failed"
        tiles.append(("sanity checks", verdict, ", ".join(one.failed) or images))
    if run.metrics:
        minutes = sum(float(line["seconds"]) for line in run.metrics) / 60.0
        tiles.append(("training", f"{minutes:.1f} min", f"{len(run.metrics)} epochs, by the run's own clock"))
    return tiles


def _settings(run: StoredRun) -> list[tuple[str, str]]:
    """Return title and text of the recipe, the environment, and each evaluation's identity."""
    settings = []
    recipe = run.path / "recipe.yaml"
    if recipe.is_file():
        settings.append((str(recipe), recipe.read_text(errors="replace")))
    if run.environment:
        settings.append((str(run.path / "environment.json"), _lines(run.environment)))
    for one in run.evaluations:
        stored = one.summary["settings"]
        facts = {**stored["identity"], "carso": stored["carso"], **stored["environment"]}
        settings.append((f"{one.path}: {trace_of(run, one)}", _lines(facts)))
    return settings


def _lines(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in values.items())
