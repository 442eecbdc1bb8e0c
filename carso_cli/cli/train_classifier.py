"""`carso train-classifier`: train a recipe's classifier, for data sets without public weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carso_cli.cli.display import accuracy, duration, figure, output, print_json, print_plain, table
from carso_cli.cli.options import (
    DeviceOption,
    DryRunOption,
    JsonOption,
    LimitOption,
    RecipeArgument,
    ResumeOption,
    RunOption,
    SeedOption,
    SetOption,
    read_recipe,
)
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import UsageError, nearest

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Kind, Recipe

KindOption = Annotated[
    str, typer.Option("--kind", metavar="KIND", help="at: adversarially trained; clean: on clean images.")
]


def command(
    recipe: RecipeArgument = None,
    kind: KindOption = "at",
    run: RunOption = None,
    resume: ResumeOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    limit: LimitOption = None,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train the recipe's classifier, adversarially or on clean images.

    The run folder (runs/RECIPE-classifier-KIND when left out) receives classifier.safetensors, which a
    recipe names in classifier.at.file or classifier.clean.file.
    """
    chosen = read_recipe(recipe, overrides, seed)
    trained_as = _check_kind(kind)
    folder = run or Path("runs") / f"{chosen.name}-classifier-{trained_as}"
    if dry_run:
        from carso_cli.training.preflight import estimate_classifier_cost

        cost = estimate_classifier_cost(chosen, trained_as, device=device, limit=limit)
        _show_cost(chosen, folder, cost, json)
        return
    from carso_cli.training.classifier import train_classifier

    result = train_classifier(
        chosen,
        trained_as,
        run=folder,
        reporter=RichReporter(),
        resume=resume,
        device=device,
        limit=limit,
    )
    if json:
        print_json(result)
        return
    rows = [
        ["clean accuracy, held out", accuracy(result["clean_accuracy"])],
        ["accuracy under PGD, held out", accuracy(result["pgd_accuracy"])],
        ["loss", figure(result["loss"])],
        ["time", duration(result["seconds_total"])],
    ]
    output().print(table(("trained classifier", ""), rows))
    # On a line of its own, which no table folds: it is there to be copied.
    print_plain(f"weights: {result['weights']}")


def _check_kind(kind: str) -> Kind:
    known: dict[str, Kind] = {"at": "at", "clean": "clean"}
    if kind not in known:
        raise UsageError(f"--kind {kind} is not allowed; use at or clean", hint=nearest(kind, known))
    return known[kind]


def _show_cost(recipe: Recipe, folder: Path, cost: dict[str, Any], as_json: bool) -> None:
    from carso_cli.recipe.load import dump_recipe

    if as_json:
        print_json({"recipe": recipe.model_dump(mode="json"), "run": str(folder), "cost": cost})
        return
    print_plain(dump_recipe(recipe))
    rows = [
        ["run folder", str(folder)],
        ["parameters", f"{cost['parameters']:,}"],
        ["epochs", str(recipe.classifier.training.epochs)],
        ["training images", f"{cost['images']:,}" if "images" in cost else "unknown before they are read"],
        ["time an image", f"{figure(1000 * cost['seconds_per_image'])} ms"],
        ["time in all, about", duration(cost["seconds"]) if "seconds" in cost else "–"],
    ]
    output().print(table(("predicted cost", ""), rows))
