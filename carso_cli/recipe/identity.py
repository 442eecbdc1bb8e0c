"""What tells one recipe's runs from another's: a hash of the values, however they were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from carso_cli.errors import StateError
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

CHOSEN_AFRESH = ("precision", "compile", "threat", "evaluation")
"""What a trained purifier may be used with other than it was trained with; `data.root` too."""


def refuse_other_training(recipe: Recipe, trained: Recipe, overrides: Sequence[str], path: str) -> None:
    """Refuse a `--set` that a trained run cannot follow, rather than leave it without effect.

    Args:
        recipe: What is asked for, with the overrides.
        trained: What the run was trained with.
        overrides: `section.key=value` each.
        path: The run, for the message.

    Raises:
        StateError: If an override gives a value other than the run's to what says how a purifier was
            trained: all but the threat, the evaluation, precision, compilation and the data's folder.
    """
    asked, stored = recipe.model_dump(mode="json"), trained.model_dump(mode="json")
    for text in overrides:
        key = text.partition("=")[0].strip()
        if any(key == chosen or key.startswith(f"{chosen}.") for chosen in (*CHOSEN_AFRESH, "data.root")):
            continue
        if _value(asked, key) != (found := _value(stored, key)):
            elsewhere = "train it so, or attack a classifier alone, in a folder of its own with --run DIR"
            raise StateError(
                f"{path} was trained with {key} {json.dumps(found)}; --set {text} cannot change it",
                hint="use --seed for the seed of an evaluation" if key == "seed" else elsewhere,
            )


def _value(values: Any, key: str) -> Any:  # noqa: ANN401  (whatever a recipe holds)
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


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
    if not training["adversarial"]["augment"]:
        del training["adversarial"]["augment"]
    if training["objective"] == "elbo":
        del training["objective"], training["adversarial"]
    return values
