"""Which of a recipe's data and weights are on this machine, whole, and how to get those that are not.

`take_stock` looks and changes nothing; `fetch_missing` downloads what is published.
"""

from __future__ import annotations

from pathlib import Path

from carso_cli.classifiers.architectures import check_architecture
from carso_cli.errors import RecipeError
from carso_cli.io.download import fetch
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.shipped import start_command
from carso_cli.runtime.reporter import Reporter
from carso_cli.tools.asset import MISSING, PRESENT, Item
from carso_cli.tools.asset_data import data_items
from carso_cli.tools.asset_weights import weights_item


def take_stock(recipe: Recipe) -> list[Item]:
    """List everything a recipe needs, data first.

    Raises:
        RecipeError: If the recipe names a classifier or an architecture that is not known.
        MissingError: If the architecture's library is not installed.
    """
    if recipe.classifier.architecture is not None:
        check_architecture(recipe.classifier.family, recipe.classifier.architecture)
    items = data_items(recipe)
    for kind, weights in (("at", recipe.classifier.at), ("clean", recipe.classifier.clean)):
        required = kind in (recipe.representation.kind, recipe.evaluation.second_kind)
        if weights is not None:
            items.append(weights_item(recipe, kind, weights, required))
        elif required:
            raise RecipeError(f"recipe '{recipe.name}' names no weights for classifier.{kind}")
    if recipe.training.initial is not None:
        start = Path(recipe.training.initial).expanduser()
        state = PRESENT if start.is_file() else MISSING
        command = start_command(recipe)
        items.append(
            Item("start", start.name, state, True, str(start), note="see training.initial", command=command)
        )
    return items


def fetch_missing(recipe: Recipe, reporter: Reporter) -> list[Item]:
    """Download what a recipe needs, lacks, and has a published address.

    Raises:
        MissingError: See `carso_cli.io.download.fetch`; what was downloaded before stays.
    """
    wanted = [item for item in take_stock(recipe) if item.required and item.state == MISSING]
    fetched = [item for item in wanted if item.download]
    for item in fetched:
        fetch(
            item.download,
            Path(item.place),
            name=item.what,
            reporter=reporter,
            checksum=item.checksum,
            page=item.source,
        )
    return fetched
