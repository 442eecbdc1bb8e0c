"""What tells one recipe's runs from another's: a hash of the values, however they were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from carso_cli.recipe.schema import Recipe

TRAINING_SECTIONS = (
    "data",
    "threat",
    "classifier",
    "representation",
    "purifier",
    "training",
    "seed",
    "precision",
)
"""What determines a trained purifier; `data.root` says only where the images lie and is never hashed."""


def recipe_hash(recipe: Recipe, sections: Sequence[str] | None = None) -> str:
    """Return the sha256 of a recipe's values as hexadecimal text.

    Args:
        recipe: The recipe; how it was written (order, `8/255` or its decimal) makes no difference.
        sections: Top-level keys to hash, such as `TRAINING_SECTIONS`; all when left out.

    Raises:
        ValueError: If a section is unknown.
    """
    values = _hashed_values(recipe)
    chosen = tuple(values) if sections is None else tuple(sections)
    unknown = [name for name in chosen if name not in values]
    if unknown:
        raise ValueError(f"a recipe has no section {unknown[0]!r}; it has {', '.join(values)}")
    canonical = json.dumps(
        {name: values[name] for name in chosen}, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def _hashed_values(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values without what says only where files lie or how the same is computed.

    A key that says nothing is left out, so that runs from before there was such a key keep their hash.
    """
    values = recipe.model_dump(mode="json")
    classifier, training = values["classifier"], values["training"]
    del values["data"]["root"], training["initial"], values["compile"]
    if classifier["architecture"] is None:
        del classifier["architecture"]
    if classifier["training"]["initial"] is None:
        del classifier["training"]["initial"]
    if not values["purifier"]["input_share"]:
        del values["purifier"]["input_share"]
    if training["attack_mix"]["reuse"] == 1:
        del training["attack_mix"]["reuse"]
    if training["objective"] == "elbo":
        del training["objective"], training["adversarial"]
    return values
