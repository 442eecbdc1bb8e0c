"""`carso recipes`: list, show, copy and validate recipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from carso_cli.cli import options
from carso_cli.cli.console import print_json, print_plain, print_text, show_error, show_table
from carso_cli.errors import CarsoError, RecipeError, UsageError

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

command = typer.Typer(help="List, show, copy and validate recipes.", rich_markup_mode="rich")

NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of a shipped recipe, or a path.",
        autocompletion=options.complete_recipe,
    ),
]


@command.command("ls")
def list_shipped(json: options.JsonOption = False) -> None:
    """List the shipped recipes."""
    from carso_cli.recipe.load import load_recipe
    from carso_cli.recipe.shipped import list_recipes

    found = [
        {"name": shipped.name, "path": str(shipped.path), **_summary(load_recipe(str(shipped.path)))}
        for shipped in list_recipes()
    ]
    if json:
        print_json(found)
        return
    rows: list[list[str]] = []
    for recipe in found:
        row = f" [{recipe['reproduces']}]" if recipe["reproduces"] else ""
        rows.append(
            [
                str(recipe["name"]),
                f"{recipe['data']}\n{recipe['classifier']}",
                f"{recipe['description']}{row}",
            ]
        )
    show_table(("recipe", "data, network", "description [what it reproduces]"), rows)
    print_text("carso recipes show NAME prints one; carso recipes cp NAME copies one for you to change")


def _summary(recipe: Recipe) -> dict[str, str | int]:
    data, classifier = recipe.data, recipe.classifier
    network = f"WRN-{classifier.depth}-{classifier.width}"
    return {
        "data": data.name,
        "images": f"{data.channels}x{data.image_size}x{data.image_size}",
        "classes": data.classes,
        "classifier": network if classifier.family == "wide-resnet" else classifier.architecture or "own",
        "reproduces": recipe.reproduces,
        "description": recipe.description,
    }


@command.command("show")
def show(
    name: NameArgument,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Write out every default and override, as a run stores it.")
    ] = False,
    overrides: options.SetOption = None,
) -> None:
    """Print a recipe."""
    from carso_cli.recipe.load import dump_recipe, read_recipe_file

    recipe = options.read_recipe(name, overrides)
    # An override does not stand in the file's own text, so the resolved form is shown then.
    print_plain(dump_recipe(recipe) if resolved or overrides else read_recipe_file(name), end="")


@command.command("cp")
def copy(
    name: NameArgument,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File or folder (default: ./NAME.yaml).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a recipe, comments included, so that you can change it."""
    from carso_cli.io.files import atomic_write
    from carso_cli.recipe.load import locate_recipe

    source = locate_recipe(name)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target} is the recipe itself")
    if target.exists() and not force:
        raise UsageError(f"{target} exists already", hint="give another name, or --force to overwrite it")
    try:
        # In one step, so that a full disk leaves no half recipe.
        with atomic_write(target) as stream:
            stream.write(source.read_bytes())
    except OSError as error:
        raise CarsoError(f"cannot copy {source} to {target}: {error.strerror or error}") from None
    print_plain(str(target))


@command.command("validate")
def validate(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Recipe files, folders of them, or shipped names.")
    ],
    json: options.JsonOption = False,
) -> None:
    """Check recipes and show every problem of each; exit code 2 if there is any.

    Layers are looked for in the architecture, which is built without weights.
    """
    from carso_cli.recipe.load import load_recipe
    from carso_cli.tools.extract import check_layers

    notes: dict[str, str] = {}
    errors: dict[str, RecipeError | None] = {}
    # All are checked before any is shown, so that stdout under --json holds one document.
    for reference in (name for path in paths for name in _expand(path)):
        try:
            notes[reference] = check_layers(load_recipe(reference))
            errors[reference] = None
        except RecipeError as error:
            errors[reference] = error
    if json:
        print_json(
            [
                {
                    "path": reference,
                    "valid": found is None,
                    "error": found.message if found else None,
                    "note": notes.get(reference) or None,
                }
                for reference, found in errors.items()
            ]
        )
    for reference, found in errors.items():
        if found is not None:
            show_error(found)
        elif not json:
            print_plain("; ".join(filter(None, (f"{reference}: valid", notes[reference]))))
    if any(errors.values()):
        raise typer.Exit(2)


def _expand(reference: str) -> list[str]:
    """Return the recipe files in a folder, or the reference itself; a bare name stays a name."""
    # os.path answers False for names that no file can have, where Path may raise.
    if not os.path.isdir(reference):
        return [reference]
    found = sorted(path for path in Path(reference).rglob("*") if path.suffix in (".yaml", ".yml"))
    if not found:
        raise UsageError(f"the folder {reference} holds no recipe: no file ending in .yaml")
    return [str(path) for path in found]
