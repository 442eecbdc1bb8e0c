"""`carso extract`: list a classifier's layers, or write its internal representation to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from carso_cli.cli.display import figure, output, print_json, table
from carso_cli.cli.options import (
    DeviceOption,
    JsonOption,
    LimitOption,
    RecipeArgument,
    SeedOption,
    SetOption,
    optional,
    read_recipe,
)
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import UsageError

ImagesArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="IMAGE…", help="Image files to extract from instead of a split.", show_default=False
    ),
]
ListOption = Annotated[bool, typer.Option("--list", help="List the layers; write nothing.")]
LayersOption = Annotated[
    str | None,
    optional("--layers", metavar="GLOB", help="Layers by shell pattern; the recipe's when left out."),
]
KindOption = Annotated[
    str | None,
    optional("--kind", metavar="KIND", help="Classifier: at or clean; the recipe's when left out."),
]
SplitOption = Annotated[str, typer.Option("--split", metavar="SPLIT", help="train or test.")]
OutOption = Annotated[Path | None, optional("--out", metavar="FILE", help="Safetensors file to write.")]


def command(
    recipe: RecipeArgument = None,
    images: ImagesArgument = None,
    list_only: ListOption = False,
    layers: LayersOption = None,
    kind: KindOption = None,
    split: SplitOption = "test",
    limit: LimitOption = None,
    out: OutOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """List a classifier's layers, or write the internal representation of images (Section 4.1, Table 7)."""
    chosen = read_recipe(recipe, overrides, seed)
    for option, value, allowed in (
        ("--split", split, ("train", "test")),
        ("--kind", kind, ("at", "clean", None)),
    ):
        if value not in allowed:
            raise UsageError(f"{option} {value} is not allowed; use {allowed[0]} or {allowed[1]}")
    from carso_cli.workflows.extract import extract, list_layers

    if list_only:
        found = list_layers(chosen, pattern=layers or "*", kind=kind)
        _show_layers(found, as_json=json)
        return
    if out is None:
        raise UsageError("--out FILE is needed", hint="or list the layers with --list")
    result = extract(
        chosen,
        out=out,
        reporter=RichReporter(),
        split=split,
        files=images or (),
        pattern=layers,
        kind=kind,
        limit=limit,
        device=device,
    )
    if json:
        print_json(result)
        return
    _show_summary(result)


def _show_summary(result: dict[str, Any]) -> None:
    rows = [
        [row["layer"], "x".join(map(str, row["shape"])), figure(row["mean"]), figure(row["std"])]
        for row in result["layers"]
    ]
    title = f"internal representation of {result['images']} images"
    output().print(
        table(("layer", "shape", "mean", "std"), rows, title=title, numeric=("shape", "mean", "std"))
    )
    output().print(f"written to {result['out']}")


def _show_layers(found: list[Any], *, as_json: bool) -> None:
    if as_json:
        print_json([vars(layer) for layer in found])
        return
    rows = [
        [layer.name, layer.kind, "x".join(map(str, layer.shape)), "yes" if layer.in_recipe else ""]
        for layer in found
    ]
    output().print(table(("layer", "kind", "shape an image", "in recipe"), rows, numeric=("shape an image",)))
