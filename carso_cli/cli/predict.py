"""`carso predict`: classify image files with a trained defence."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from carso_cli.cli import options
from carso_cli.cli.console import messages, print_result, show_table
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import UsageError


def command(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Image files, folders of them, or - for a list on stdin."),
    ],
    run: options.RunOption = None,
    n_samples: options.NSamplesOption = None,
    aggregation: options.AggregationOption = None,
    classifier: options.ClassifierOption = None,
    seed: options.SeedOption = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Crop and resize images that do not have the recipe's size.")
    ] = False,
    save: Annotated[
        Path | None,
        options.optional("--save", metavar="DIR", help="Folder for the reconstructions, as PNG."),
    ] = None,
    device: options.DeviceOption = "auto",
    json: options.JsonOption = False,
) -> None:
    """Classify image files: class, probability, and the votes of the reconstructions.

    Grey images are converted to colour and colour to grey, as the run needs; images of another size are
    refused without --resize. The same image and seed always give the same answer.
    """
    # Before torch is imported, so that an empty list is refused at once.
    named = _read_names(images)
    from carso_cli.tools.predict import predict

    result = predict(
        named,
        run=options.run_or_default(run),
        reporter=RichReporter(),
        n_samples=n_samples,
        aggregation=aggregation,
        classifier=classifier,
        seed=seed,
        device=device,
        resize=resize,
        save=save,
    )
    print_result(result, _show, as_json=json)


def _read_names(images: Sequence[str]) -> list[str]:
    """Replace `-` by the lines of stdin.

    Raises:
        UsageError: If stdin holds no path.
    """
    if "-" not in images:
        return list(images)
    # Bytes, since a path need not be valid text in any encoding.
    # Only empty lines are dropped, and none is stripped: a file's name may end in a blank.
    lines = [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line.strip()]
    if not lines:
        raise UsageError("no path came on stdin", hint="carso predict - reads one path per line")
    place = images.index("-")
    # A second `-` is dropped, since stdin can be read only once.
    return [*images[:place], *lines, *(name for name in images[place + 1 :] if name != "-")]


def _show(result: dict[str, Any]) -> None:
    rows = [
        [
            row["path"],
            row["class"],
            f"{row['probability']:.3f}",
            f"{row['mean_probability']:.3f}",
            f"{row['agreement']:.2f}",
            ", ".join(f"{name}: {count}" for name, count in row["votes"].items()),
            row["classifier"]["class"],
        ]
        for row in result["images"]
    ]
    columns = ("image", "class", "P", "mean p", "agree", "votes", "classifier")
    title = f"{result['recipe']}: {result['aggregation']}, N = {result['n_samples']}, seed {result['seed']}"
    caption = (
        "P: probability after aggregation, always near 1 under doubly-exponential; mean p: the class's "
        "softmax averaged over samples; agree: share of samples for the class; classifier: without purifier"
    )
    show_table(columns, rows, title=title, caption=caption, numeric=("P", "mean p", "agree"))
    if result["grid"] is not None:
        count = sum(len(row["saved"]) for row in result["images"])
        messages().print(f"{count} reconstructions and {result['grid']} written", soft_wrap=True)
