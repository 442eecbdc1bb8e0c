"""`carso train-classifier`: train a recipe's classifier, for data sets without public weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from carso_cli.cli import options
from carso_cli.cli.console import duration, figure, followed, print_plain, print_result, show_table
from carso_cli.cli.progress import RichReporter
from carso_cli.cli.train_purifier import held_out, show_cost

KindOption = Annotated[
    options.Kind,
    options.choice("--kind", "Train adversarially (at) or on clean images", "at", "clean", default="at"),
]


def command(
    recipe: options.RecipeArgument = None,
    kind: KindOption = "at",
    run: options.RunOption = None,
    resume: options.ResumeOption = False,
    overrides: options.SetOption = None,
    seed: options.SeedOption = None,
    device: options.DeviceOption = "auto",
    limit: options.LimitOption = None,
    log: options.LogOption = None,
    json: options.JsonOption = False,
    dry_run: options.DryRunOption = False,
) -> None:
    """Train the recipe's classifier, adversarially or on clean images.

    Writes classifier.safetensors into the run folder (default: runs/RECIPE-classifier-KIND); a recipe uses
    it as classifier.at.file or classifier.clean.file.
    """
    chosen = options.read_recipe_to_train(recipe, run, overrides, seed)
    folder = run or Path("runs") / f"{chosen.name}-classifier-{kind}"
    if dry_run:
        from carso_cli.training.preflight import estimate_classifier_cost, require_data

        cost = estimate_classifier_cost(chosen, kind, device=device, limit=limit)
        rows = [["parameters", f"{cost['parameters']:,}"]]
        show_cost(chosen, folder, cost, rows, epochs=chosen.classifier.training.epochs, as_json=json)
        if told := require_data(chosen):
            RichReporter().warning(told)
        return
    from carso_cli.training.classifier import train_classifier
    from carso_cli.training.tracking import tracked

    viewers = log.split(",") if log else ()
    with tracked(RichReporter(), viewers, folder, chosen) as reporter:
        result = train_classifier(
            chosen, kind, run=folder, reporter=reporter, resume=resume, device=device, limit=limit
        )
    print_result(result, _show, as_json=json)


def _show(result: dict[str, Any]) -> None:
    where = followed(result)
    rows = [
        [f"clean accuracy, {where}", held_out(result, "clean_accuracy")],
        [f"accuracy under PGD, {where}", held_out(result, "pgd_accuracy")],
        ["loss", figure(result["loss"])],
        ["time", duration(result["seconds_total"])],
    ]
    show_table(("trained classifier", ""), rows)
    # Outside the table, which may fold it: a user copies this path.
    print_plain(f"weights: {result['weights']}")
