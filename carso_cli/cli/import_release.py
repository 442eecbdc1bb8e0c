"""`carso import-release`: the purifiers that the paper's authors publish, as runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from carso_cli.cli import options
from carso_cli.cli.console import print_plain, print_result, show_table
from carso_cli.cli.progress import RichReporter


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with the three safetensors files of one purifier.")
    ],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="Recipe of the purifier's classifier: name of a shipped one, or path.",
        ),
    ],
    run: options.RunOption = None,
    overrides: options.SetOption = None,
    json: options.JsonOption = False,
) -> None:
    """Turn a purifier published by the paper's authors into a run, for evaluate, attack, predict and report.

    DIR holds three files, whose names end in _repr_compressors.safetensors,
    _repr_fcn_compressor.safetensors and _decoder.safetensors; the classifier's weights are those of the
    recipe. Every tensor must fit. The encoder is not published, so training cannot continue from this run.
    """
    chosen = options.read_recipe(recipe, overrides)
    target = run or Path(chosen.run_folder)
    from carso_cli.tools.import_release import import_release

    print_result(import_release(folder, chosen, run=target, reporter=RichReporter()), _show, as_json=json)


def _show(result: dict[str, Any]) -> None:
    checksums = {**result["sha256"], "classifier": result["classifier"]}
    rows = [
        *([f"{part}, SHA-256", f"{checksum[:16]}…"] for part, checksum in checksums.items()),
        ["parameters", f"{result['parameters']:,}"],
        ["run", result["run"]],
    ]
    show_table(("imported purifier, inference only", ""), rows)
    print_plain(f"next: carso evaluate --run {result['run']} --attack none --limit 1000")
