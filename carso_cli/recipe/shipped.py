"""The recipes that come with the package, found by bare name from any folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import carso_cli
from carso_cli.errors import RecipeError, nearest
from carso_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe file that comes with the package: its name is the file's, whichever subfolder it is in."""

    name: str
    path: Path


def recipes_folder() -> Path:
    """Return the folder of shipped recipes: inside the wheel, or beside the package in a source checkout.

    Raises:
        RecipeError: If the installation has neither.
    """
    package = Path(carso_cli.__file__).resolve().parent
    # The wheel's first: beside an installed package `recipes` may be anyone's folder.
    for folder in (package / "shipped_recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise RecipeError(
        f"the shipped recipes are missing: no folder 'shipped_recipes' in {package}",
        hint="install carso again, or give the path of a recipe of your own",
    )


def list_recipes() -> tuple[ShippedRecipe, ...]:
    """Return every shipped recipe, subfolders included, in alphabetical order."""
    found = (ShippedRecipe(path.stem, path) for path in recipes_folder().rglob("*.yaml"))
    return tuple(sorted(found, key=lambda recipe: recipe.name))


def find_recipe(name: str) -> Path:
    """Return the file of a shipped recipe.

    Raises:
        RecipeError: If there is none of that name; the message holds the nearest and all names.
    """
    known = {recipe.name: recipe.path for recipe in list_recipes()}
    if name in known:
        return known[name]
    # With its subfolder, as a listing of the folder shows it.
    folder = recipes_folder()
    for path in known.values():
        if path.relative_to(folder).with_suffix("").as_posix() == name:
            return path
    suggestion = nearest(Path(name).stem if name.endswith((".yaml", ".yml")) else name, known)
    raise RecipeError(
        f"there is no file and no shipped recipe '{name}'"
        + (f"; {suggestion}" if suggestion else "")
        + f"\nshipped recipes: {', '.join(known)}",
        hint="`carso recipes ls` shows the shipped recipes; a recipe of your own is given by its path",
    )


def start_command(recipe: Recipe) -> str:
    """Return the command that leads to the purifier that training starts from; empty where none is known.

    It is the training of the shipped recipe whose run the purifier lies in; for another run of a shipped
    recipe's, to show that recipe, whose head says how its start is trained.
    """
    known = [shipped.name for shipped in list_recipes()]
    run = Path(recipe.training.initial or "").parent
    # A run of that name elsewhere may have been trained from another recipe.
    if run.name in known and run == Path("runs", run.name):
        return f"carso train-purifier {run.name}"
    return f"carso recipes show {recipe.reference}" if recipe.reference in known else ""
