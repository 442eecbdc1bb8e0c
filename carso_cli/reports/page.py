"""The page of a report: figures to look for first, pictures, tables, trust checks, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carso_cli import __version__
from carso_cli.errors import CarsoError
from carso_cli.io.json_files import write_atomically
from carso_cli.pictures.curves import (
    DARK,
    LIGHT,
    Picture,
    bars_picture,
    curves_picture,
    render,
    save_pictures,
    training_pictures,
)
from carso_cli.pictures.grids import render_grid
from carso_cli.reports.evaluations import StoredEvaluation
from carso_cli.reports.grid import Grid, reconstruction_grid
from carso_cli.reports.html import (
    EmbeddedPicture,
    checks_html,
    page_html,
    settings_html,
    table_html,
    tiles_html,
)
from carso_cli.reports.results import trace_of
from carso_cli.reports.series import caption_of, comparable, eps_curves, layer_bars, sample_curves
from carso_cli.reports.stored import StoredRun
from carso_cli.reports.table import ReportTable, measured_figure
from carso_cli.runtime.reporter import Reporter

_INTERVALS = "Lines: 95% Wilson intervals; the records of each row are named below the table of this title."


@dataclass(frozen=True)
class Shown:
    """Pictures that belong together: one file when saved, side by side on a page.

    Args:
        name: Stem of the file name.
        pictures: Curves or bars.
        grid: A picture grid instead.
    """

    name: str
    pictures: Sequence[Picture] = ()
    grid: Grid | None = None

    def save(self, folder: Path) -> list[Path]:
        """Write `NAME.png` and `NAME.svg`."""
        if self.grid is None:
            return save_pictures(folder, self.name, self.pictures)
        paths = [folder / f"{self.name}.png", folder / f"{self.name}.svg"]
        for path in paths:
            write_atomically(path, render_grid(self.grid.rows, self.grid.captions, path.suffix[1:]))
        return paths

    def embed(self) -> list[EmbeddedPicture]:
        """Return what a page shows."""
        if self.grid is not None:
            light, dark = (
                render_grid(self.grid.rows, self.grid.captions, "png", ink=style.ink, paper=style.paper)
                for style in (LIGHT, DARK)
            )
            title = "Reconstructions of perturbed images"
            alt = "grid of inputs, perturbed inputs, samples and their mean"
            return [EmbeddedPicture(title, self.grid.caption, alt, light, dark, kind="png", wide=True)]
        return [
            EmbeddedPicture(
                picture.title,
                picture.caption,
                f"{picture.title}, plotted",
                render([picture], "svg", LIGHT, titles=False),
                render([picture], "svg", DARK, titles=False),
            )
            for picture in self.pictures
        ]


def draw_pictures(run: StoredRun, reporter: Reporter, device: str) -> list[Shown]:
    """Return every picture that a run's records allow, with a warning for those that fail."""
    found = []
    eps, samples, layers = eps_curves(run), sample_curves(run), layer_bars(run)
    if eps:
        title = f"Accuracy against eps, {run.recipe['threat']['norm']}"
        caption = caption_of(comparable(run, "eps"))
        label = "eps, in pixel units of images in [0, 1]"
        found.append(Shown("eps", [curves_picture("eps", title, eps, label=label, caption=caption)]))
    if samples:
        caption = caption_of(comparable(run, "n_samples"))
        label = "samples N an image"
        picture = curves_picture(
            "samples", "Accuracy against samples", samples, label=label, caption=caption, doubling=True
        )
        found.append(Shown("samples", [picture]))
    if layers:
        title, label = "Accuracy by layers of the representation", "accuracy of the defence"
        found.append(
            Shown("layers", [bars_picture("layers", title, layers, label=label, caption=_INTERVALS)])
        )
    try:
        grid = reconstruction_grid(run.path, device)
    except CarsoError as error:
        reporter.warning(f"{run.path}: no picture of reconstructions: {error.message}")
        grid = None
    if grid is not None:
        found.append(Shown("reconstructions", grid=grid))
    training = training_pictures(run.metrics)
    return [*found, Shown("training", training)] if training else found


def build_page(
    runs: Sequence[StoredRun], tables: Sequence[ReportTable], shown: Mapping[Path, Sequence[Shown]]
) -> str:
    """Return the whole page as HTML."""
    sections = []
    for number, run in enumerate(runs, start=1):
        content = _tiles(run) + _pictures(shown[run.path])
        sections.append((f"run-{number}", f"{run.data}: {run.path}", content))
    sections.append(("tables", "The paper's tables", "".join(table_html(table) for table in tables)))
    sections.append(("checks", "Trust checks", "".join(_checks(run) for run in runs)))
    sections.append(("settings", "Settings", "".join(_settings(run) for run in runs)))
    title = f"carso report: {', '.join(dict.fromkeys(run.data for run in runs))}"
    return page_html(title, sections, version=__version__)


def _pictures(shown: Sequence[Shown]) -> str:
    pictures = "".join(picture.html() for group in shown for picture in group.embed())
    return f'<div class="pictures">{pictures}</div>' if pictures else ""


def _tiles(run: StoredRun) -> str:
    tiles: list[tuple[str, str, str]] = []
    plain = (one for one in run.plain_evaluations if "defence" in one.worst)
    attacked = (one for one in run.evaluations if one.identity["attack"] != "noise")
    one = next(plain, None) or next(attacked, None)
    if one is not None:
        departing = (key for key in sorted(run.departures(one)) if key in one.identity)
        other = "".join(f", {key} {one.identity[key]}" for key in departing)
        images = f"{one.identity['n_images']} images{other}, {one.path.name}"
        rows = {
            "defence, clean": one.find("defence", "none"),
            f"defence, worst case of {one.identity['attack']}": one.worst.get("defence"),
            "classifier alone, clean": one.find("classifier", "none"),
            f"classifier alone, worst case of {one.identity['attack']}": one.worst.get("classifier"),
        }
        for name, row in rows.items():
            figure = measured_figure(row)
            if figure is not None:
                tiles.append((name, figure.main, f"{figure.interval} 95%; {images}"))
        verdict = f"{len(one.failed)} failed" if one.failed else "none failed"
        tiles.append(("trust checks", verdict, ", ".join(one.failed) or images))
    if run.metrics:
        minutes = sum(float(line["seconds"]) for line in run.metrics) / 60.0
        tiles.append(("training", f"{minutes:.1f} min", f"{len(run.metrics)} epochs, by the run's own clock"))
    return tiles_html(tiles) if tiles else "<p>Nothing is stored yet.</p>"


def _checks(run: StoredRun) -> str:
    main = run.plain_evaluations[:1]
    return "".join(
        checks_html(one.summary, f"{run.path}, {one.path.name}", unfolded=one in main)
        for one in run.evaluations
    )


def _settings(run: StoredRun) -> str:
    parts = []
    recipe = run.path / "recipe.yaml"
    if recipe.is_file():
        parts.append(settings_html(str(recipe), recipe.read_text(errors="replace")))
    if run.environment:
        parts.append(settings_html(str(run.path / "environment.json"), _lines(run.environment)))
    parts += [
        settings_html(f"{one.path}: {trace_of(run, one)}", _lines(_identity(one))) for one in run.evaluations
    ]
    return "".join(parts)


def _identity(one: StoredEvaluation) -> dict[str, Any]:
    settings = one.summary["settings"]
    return {**settings["identity"], "carso": settings["carso"], **settings["environment"]}


def _lines(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in values.items())
