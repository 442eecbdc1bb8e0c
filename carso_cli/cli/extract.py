"""`carso extract`: list a classifier's layers, or write its internal representation to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

ImagesArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="IMAGE…", help="Image files to extract from instead of a split.", show_default=False
    ),
]
ListOption = Annotated[
    bool, typer.Option("--list", help="List the layers, and those to choose; write nothing.")
]
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
    from carso_cli.tools.extract import extract, list_layers

    if list_only:
        found = list_layers(chosen, pattern=layers or "*", kind=kind)
        if json:
            print_json([vars(layer) for layer in found])
        else:
            _show_layers(found, chosen, filtered=layers is not None)
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


def _show_layers(found: list[Any], recipe: Recipe, *, filtered: bool) -> None:
    rows = [
        [
            layer.name,
            layer.kind,
            "x".join(map(str, layer.shape)),
            "yes" if layer.in_recipe else "",
            "yes" if layer.proposed else "",
        ]
        for layer in found
    ]
    columns = ("layer", "kind", "shape an image", "recipe", "rule")
    caption = "recipe: it is named there; rule: the one behind Table 7 proposes it"
    output().print(table(columns, rows, caption=caption, numeric=("shape an image",)))
    proposed = [layer.name for layer in found if layer.proposed]
    if filtered:
        return
    if not proposed:
        output().print("no layer is proposed: no convolution here gives square maps")
    elif proposed == [layer for layer in recipe.representation.layers if layer in proposed]:
        output().print("the recipe names every layer that the rule proposes")
    else:
        output().print("to take what the rule proposes, put into the recipe:\n")
        lines = ["representation:", f"  kind: {recipe.representation.kind}", "  layers:"]
        output().print("\n".join([*lines, *(f"    - {name}" for name in proposed)]))
