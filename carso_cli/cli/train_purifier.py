"""`carso train-purifier`: Section 4 and Appendix C."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from carso_cli.cli.display import accuracy, duration, figure, output, print_json, table
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

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

_BEYOND = {
    "adversarial": "adversarial, beyond the paper",
    "both": "adversarial and ELBO, beyond the paper",
}


def command(
    recipe: RecipeArgument = None,
    run: RunOption = None,
    resume: ResumeOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    limit: LimitOption = None,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train the recipe's purifier on adversarially-balanced batches (Section 4, Appendix C).

    Beyond the paper, `training.objective` may be adversarial (cross-entropy through the whole defence, on
    examples made against it) or both; `training.initial` names a purifier to start from.

    The run folder (runs/RECIPE when left out) receives purifier.safetensors, one line of metrics an epoch,
    and the state from which --resume goes on after an interruption.
    """
    chosen = read_recipe(recipe, overrides, seed)
    folder = run or Path(chosen.run_folder)
    if dry_run:
        from carso_cli.training.preflight import estimate_cost

        show_cost(chosen, folder, estimate_cost(chosen, device=device, limit=limit), as_json=json)
        return
    from carso_cli.training.purifier import train_purifier

    result = train_purifier(
        chosen, run=folder, reporter=RichReporter(), resume=resume, device=device, limit=limit
    )
    if json:
        print_json(result)
        return
    objective = chosen.training.objective
    rows = [
        *([["objective", _BEYOND[objective]]] if objective in _BEYOND else []),
        ["clean accuracy of the defence, held out", accuracy(result["defence_clean_accuracy"])],
    ]
    if objective in _BEYOND:
        rows.append(["the same, under PGD", accuracy(result["defence_attacked_accuracy"])])
    terms = "" if objective in _BEYOND else " (BCE + beta KL)"
    rows.append([f"loss an image{terms}", figure(result["loss"])])
    if "bce" in result:
        rows.append(["BCE, KL", f"{figure(result['bce'])}, {figure(result['kl'])}"])
    rows += [
        ["training time", duration(result["seconds_total"])],
        ["run", result["run"]],
    ]
    output().print(table(("trained purifier", ""), rows))
    output().print(f"next: carso evaluate --run {result['run']}")


def show_cost(recipe: Recipe, folder: Path, cost: dict[str, Any], *, as_json: bool) -> None:
    """Show a resolved recipe, its parameter counts and the predicted time."""
    from carso_cli.recipe.load import dump_recipe

    if as_json:
        print_json({"recipe": recipe.model_dump(mode="json"), "run": str(folder), "cost": cost})
        return
    output().print(dump_recipe(recipe), soft_wrap=True)
    rows = [[f"parameters, {part}", f"{count:,}"] for part, count in cost["parameters"].items()]
    images = cost["images"]
    objective = recipe.training.objective
    rows += [
        ["objective", _BEYOND.get(objective, "elbo, as in the paper")],
        ["run folder", str(folder)],
        ["training images", "known once they are read" if images is None else f"{images:,}"],
        ["epochs", str(recipe.training.epochs)],
        ["time an image and epoch", f"{figure(1000 * cost['seconds_per_image'])} ms"],
        ["time in all, about", "–" if cost["seconds"] is None else duration(cost["seconds"])],
    ]
    output().print(table(("predicted cost on this device", ""), rows))
