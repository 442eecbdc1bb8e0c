"""What a run says about itself: its resolved recipe, and what it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carso_cli.errors import RecipeError, StateError
from carso_cli.io.json_files import read_json, write_atomically, write_json
from carso_cli.recipe.identity import add_checksum_line
from carso_cli.recipe.load import dump_recipe, load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter


def describe_run(
    folder: RunFolder, recipe: Recipe, environment: Mapping[str, Any], reporter: Reporter
) -> None:
    """Store what a run is; of a run that is resumed, only what is damaged or missing, with a warning.

    Args:
        folder: The run, held by this process.
        recipe: The resolved recipe.
        environment: Where it runs.
        reporter: Where warnings go.

    Raises:
        CarsoError: If it cannot be written.
    """
    if not folder.recipe.is_file():
        write_json(folder.environment, environment)
        # Last, since it makes the folder a run: a start that is cut short can be repeated.
        write_recipe(folder, recipe)
        return
    try:
        read_json(folder.environment)
    except StateError as error:
        reporter.warning(f"{error.message}; it is written anew")
        write_json(folder.environment, environment)
    try:
        load_recipe(str(folder.recipe.resolve()))
    except RecipeError as error:
        reporter.warning(f"{error.message}; it is written anew")
        write_recipe(folder, recipe)


def write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Write a run's resolved recipe, with its checksum.

    Raises:
        CarsoError: If it cannot be written.
    """
    write_atomically(folder.recipe, add_checksum_line(dump_recipe(recipe)))


def class_names(folder: RunFolder, recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the classes without opening the data: stored ones, or else their numbers."""
    numbers = tuple(str(label) for label in range(recipe.data.classes))
    try:
        stored = read_json(folder.environment).get("classes")
    except StateError:
        return numbers
    if not isinstance(stored, list) or len(stored) != len(numbers):
        return numbers
    return tuple(str(name) for name in stored)
