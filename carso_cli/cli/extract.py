"""`carso extract`: list a classifier's layers, or write its internal representation to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carso_cli.cli import options
from carso_cli.cli.console import figure, print_json, print_plain, print_result, show_table
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import StateError, UsageError

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

ImagesArgument = Annotated[
    list[Path] | None,
    typer.Argument(metavar="IMAGE…", help="Image files to use instead of a split.", show_default=False),
]
ListOption = Annotated[
    bool, typer.Option("--list", help="List the layers, and those proposed for a recipe; write nothing.")
]
LayersOption = Annotated[
    str | None,
    options.optional("--layers", metavar="GLOB", help="Layers by shell pattern (default: the recipe's)."),
]
KindOption = Annotated[
    options.Kind | None,
    options.choice("--kind", "Training of the classifier", "at", "clean", default="the recipe's"),
]
SplitOption = Annotated[str, options.choice("--split", "Split of the data", "train", "test", default="test")]
OutOption = Annotated[
    Path | None, options.optional("--out", metavar="FILE", help="Safetensors file to write.")
]


def command(
    recipe: options.RecipeArgument = None,
    images: ImagesArgument = None,
    run: options.RunOption = None,
    list_only: ListOption = False,
    layers: LayersOption = None,
    kind: KindOption = None,
    split: SplitOption = "test",
    limit: options.LimitOption = None,
    out: OutOption = None,
    overrides: options.SetOption = None,
    seed: options.SeedOption = None,
    device: options.DeviceOption = "auto",
    json: options.JsonOption = False,
) -> None:
    """List a classifier's layers, or write the internal representation of images (Section 4.1, Table 7)."""
    chosen = options.read_recipe_to_train(recipe, run, overrides, seed)
    if recipe is None and run is not None and chosen.file is None:
        raise StateError(f"{run} holds no run: it has no recipe.yaml")
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
    print_result(result, _show_summary, as_json=json)


def _show_summary(result: dict[str, Any]) -> None:
    rows = [
        [row["layer"], "x".join(map(str, row["shape"])), figure(row["mean"]), figure(row["std"])]
        for row in result["layers"]
    ]
    columns = ("layer", "shape", "mean", "std")
    title = f"internal representation of {result['images']} images"
    show_table(columns, rows, title=title, numeric=columns[1:])
    print_plain(f"written to {result['out']}")


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
    caption = "recipe: the recipe names it; rule: the rule behind Table 7 proposes it"
    show_table(columns, rows, caption=caption, numeric=("shape an image",))
    # A filter hides layers that the rule would propose, so the lists below would not be whole.
    if filtered:
        return
    proposed = [layer.name for layer in found if layer.proposed]
    if not proposed:
        print_plain("no layer is proposed: no convolution here gives square maps")
    # Order counts: the purifier takes the layers in the order of the recipe.
    elif proposed == [layer for layer in recipe.representation.layers if layer in proposed]:
        print_plain("the recipe names every layer that the rule proposes")
    else:
        print_plain("to use the layers that the rule proposes, put into the recipe:\n")
        lines = ["representation:", f"  kind: {recipe.representation.kind}", "  layers:"]
        print_plain("\n".join([*lines, *(f"    - {name}" for name in proposed)]))
