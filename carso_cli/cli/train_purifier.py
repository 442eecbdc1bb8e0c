"""`carso train-purifier`: Section 4 and Appendix C."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from carso_cli.cli import options
from carso_cli.cli.console import (
    accuracy,
    duration,
    figure,
    followed,
    print_json,
    print_plain,
    print_result,
    show_table,
)
from carso_cli.cli.progress import RichReporter

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

_BEYOND = {
    "adversarial": "adversarial, beyond the paper",
    "both": "adversarial and ELBO, beyond the paper",
}


def command(
    recipe: options.RecipeArgument = None,
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
    """Train the recipe's purifier on adversarially-balanced batches (Section 4, Appendix C).

    Beyond the paper, `training.objective` may be adversarial (cross-entropy of the whole defence, on
    examples made against it) or both; `training.initial` names a purifier to start from.

    Writes purifier.safetensors into the run folder (default: runs/RECIPE), one line of metrics per epoch,
    and the training state; after an interruption, resume with --resume.
    """
    chosen = options.read_recipe_to_train(recipe, run, overrides, seed)
    folder = run or Path(chosen.run_folder)
    if dry_run:
        from carso_cli.training.preflight import estimate_cost, require_data, require_weights

        cost = estimate_cost(chosen, device=device, limit=limit)
        rows = [[f"parameters, {part}", f"{count:,}"] for part, count in cost["parameters"].items()]
        rows.append(["objective", _BEYOND.get(chosen.training.objective, "elbo, as in the paper")])
        show_cost(chosen, folder, cost, rows, epochs=chosen.training.epochs, as_json=json)
        # Last: the cost does not depend on what is missing, and the first of it ends the command.
        require_weights(chosen)
        if told := require_data(chosen):
            RichReporter().warning(told)
        return
    from carso_cli.training.purifier import train_purifier
    from carso_cli.training.tracking import tracked

    viewers = log.split(",") if log else ()
    with tracked(RichReporter(), viewers, folder, chosen) as reporter:
        result = train_purifier(
            chosen, run=folder, reporter=reporter, resume=resume, device=device, limit=limit
        )
    print_result(result, lambda found: _show(found, chosen.training.objective), as_json=json)


def _show(result: dict[str, Any], objective: str) -> None:
    beyond = objective in _BEYOND
    rows = [["objective", _BEYOND[objective]]] if beyond else []
    rows.append(
        [f"clean accuracy of the defence, {followed(result)}", held_out(result, "defence_clean_accuracy")]
    )
    if beyond:
        rows.append(["the same, under PGD", held_out(result, "defence_attacked_accuracy")])
    rows.append([f"loss per image{'' if beyond else ' (BCE + beta KL)'}", figure(result["loss"])])
    # Training through the defence alone has no ELBO, so it logs neither part of it.
    if "bce" in result:
        rows.append(["BCE, KL", f"{figure(result['bce'])}, {figure(result['kl'])}"])
    rows += [["training time", duration(result["seconds_total"])], ["run", result["run"]]]
    show_table(("trained purifier", ""), rows)
    print_plain(f"next: carso evaluate --run {result['run']}")


def held_out(result: dict[str, Any], name: str) -> str:
    """Write an accuracy on held-out images with its interval and their number."""
    from carso_cli.runs.intervals import wilson

    value, count = result[name], result.get("held_out_images")
    if value is None or not count:
        return accuracy(value)
    images = "1 image" if count == 1 else f"{count} images"
    return f"{accuracy(value, wilson(value * count, count))} of {images}"


def show_cost(
    recipe: Recipe, folder: Path, cost: dict[str, Any], rows: list[list[str]], *, epochs: int, as_json: bool
) -> None:
    """Show the resolved recipe and the predicted time of training.

    Args:
        recipe: The recipe.
        folder: Run folder.
        cost: `seconds_per_image`, and `images` and `seconds` where the data set's size is known.
        rows: What to show above, such as counts of parameters.
        epochs: Epochs of this training.
        as_json: Print JSON instead.
    """
    from carso_cli.recipe.load import dump_recipe

    if as_json:
        print_json({"recipe": recipe.model_dump(mode="json"), "run": str(folder), "cost": cost})
        return
    print_plain(dump_recipe(recipe))
    images = cost.get("images")
    rows = [
        *rows,
        ["run folder", str(folder)],
        ["training images", "known once they are read" if images is None else f"{images:,}"],
        ["epochs", str(epochs)],
        ["time per image and epoch", f"{figure(1000 * cost['seconds_per_image'])} ms"],
        ["time in all, about", duration(cost.get("seconds"))],
    ]
    show_table(("predicted cost on this device", ""), rows)
