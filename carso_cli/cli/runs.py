"""`carso runs`: what was trained and measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from carso_cli.cli import options
from carso_cli.cli.console import accuracy, print_json, print_plain, print_text, show_table

command = typer.Typer(help="List runs with their results.", rich_markup_mode="rich")


@command.callback()
def _several() -> None:
    """List runs with their results."""


@command.command("ls")
def list_all(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that holds run folders.", show_default="runs")
    ] = Path("runs"),
    json: options.JsonOption = False,
) -> None:
    """List runs: recipe, when, clean and robust accuracy with its attack, and the verdict."""
    from carso_cli.runs.listing import list_runs

    found = list_runs(folder)
    if json:
        print_json(found)
        return
    if not found:
        print_plain(f"no runs in {folder}")
        return
    columns = ("run", "when", "clean", "robust [95%]", "verdict")
    show_table(columns, [_row(run) for run in found], numeric=("clean", "robust [95%]"))
    print_text("carso report RUN shows all that a run measured")


def _row(run: dict[str, Any]) -> list[str]:
    path, robust = Path(run["run"]), run["robust"]
    # A run folder is called as its recipe unless the user chose another name.
    name = path.name if path.name == run["recipe"] else f"{path.name}\n{run['recipe']}"
    images = f", {run['n_images']} images" if run["n_images"] else ""
    return [
        name.rstrip(),
        run["when"][:10],
        accuracy(run["clean"] and run["clean"]["accuracy"]),
        accuracy(robust and robust["accuracy"], robust and robust["ci95"]),
        f"{run['verdict']} ({run['attack']}{images})" if run["attack"] else run["verdict"],
    ]
