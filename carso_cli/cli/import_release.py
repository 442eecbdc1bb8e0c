"""`carso import-release`: the purifiers that the paper's authors publish, as runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carso_cli.cli.display import output, print_json, table
from carso_cli.cli.options import JsonOption, RunOption, SetOption, read_recipe
from carso_cli.cli.progress import RichReporter


def command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder with the three safetensors files of one purifier."),
    ],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="Recipe of the classifier that the purifier is for: a shipped name, or a path.",
        ),
    ],
    run: RunOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Turn a published purifier into a run that evaluate, attack, predict and report use like any other.

    DIR holds three files, whose names end in _repr_compressors.safetensors,
    _repr_fcn_compressor.safetensors and _decoder.safetensors; the classifier's
    weights are those of the recipe. Every tensor must fit. The encoder is not
    published, so the run cannot be trained on.
    """
    chosen = read_recipe(recipe, overrides)
    target = run or Path(chosen.run_folder)
    from carso_cli.tools.import_release import import_release

    result = import_release(folder, chosen, run=target, reporter=RichReporter())
    if json:
        print_json(result)
        return
    checksums = {**result["sha256"], "classifier": result["classifier"]}
    rows = [
        *([f"{part}, SHA-256", f"{checksum[:16]}…"] for part, checksum in checksums.items()),
        ["parameters", f"{result['parameters']:,}"],
        ["run", result["run"]],
    ]
    output().print(table(("imported purifier, inference only", ""), rows))
    output().print(f"next: carso evaluate --run {result['run']} --attack none --limit 1000", soft_wrap=True)
