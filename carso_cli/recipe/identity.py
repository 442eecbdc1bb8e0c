"""What identifies a recipe: the hash of its values, and the checksum in the copy that a run stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from carso_cli.errors import RecipeError, StateError
from carso_cli.recipe.schema import ClassifierTraining, Recipe

TRAINING_SECTIONS = (
    *("data", "threat", "classifier", "representation", "purifier", "training", "seed", "precision"),
)
"""What determines a trained purifier; `data.root` says only where the images lie and is never hashed."""

_NEWER_CLASSIFIER_KEYS = {
    "schedule": "triangular",
    **{"initial_learning_rate": 0.0, "final_learning_rate": 0.0, "mixup": 0.0},
}
"""Keys of `classifier.training` that runs from before them do not know, and what these did."""

CLASSIFIER_KEYS = (
    *("data", "threat", "seed", "precision"),
    *(f"classifier.{key}" for key in ("depth", "width", "activation", "training")),
)
"""What determines a classifier that is trained."""

INFERENCE_SECTIONS = ("precision", "compile", "threat", "evaluation")
"""What may differ between training a purifier and using it; `data.root` too."""

_FIRST_LINE = "# written by a run; sha256 of the lines below: "


def recipe_hash(recipe: Recipe, sections: Sequence[str] | None = None) -> str:
    """Return the sha256 of a recipe's values as hexadecimal text.

    Args:
        recipe: The recipe; how it was written (order, `8/255` or its decimal) makes no difference.
        sections: Top-level keys to hash, such as `TRAINING_SECTIONS`; by default all.

    Raises:
        ValueError: If a section is unknown.
    """
    values = _hashed_values(recipe)
    chosen = tuple(values) if sections is None else tuple(sections)
    unknown = [name for name in chosen if name not in values]
    if unknown:
        raise ValueError(f"a recipe has no section {unknown[0]!r}; it has {', '.join(values)}")
    # Sorted and without spaces: the same values always give the same text.
    canonical = json.dumps(
        {name: values[name] for name in chosen}, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def _hashed_values(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values, without those that only say where files lie or how to compute the same."""
    values = recipe.model_dump(mode="json")
    classifier, training = values["classifier"], values["training"]
    # `training.initial` is a path: the tensors in it are identified by their fingerprint.
    del values["data"]["root"], training["initial"], values["compile"], training["save_every_minutes"]
    # What is followed while training changes nothing of it.
    del values["data"]["follow"]
    # A newer key is left out at its default, so that runs from before it existed keep their hash.
    # Written out, not read from the schema: where a default changes there, old hashes must not.
    for section, key, default in (
        (classifier, "architecture", None),
        (classifier, "given", None),
        (classifier, "architecture_options", {}),
        (classifier["training"], "initial", None),
        *((classifier["training"], key, default) for key, default in _NEWER_CLASSIFIER_KEYS.items()),
        (values["purifier"], "input_share", 0),
        (training, "keep", "last"),
        (training["attack_mix"], "reuse", 1),
        (training["attack_mix"], "attacks", ["fgsm", "pgd"]),
        (training["attack_mix"], "strengths", [0.5, 1.0]),
        (training["attack_mix"], "homogeneous", False),
        (training["attack_mix"], "eps_convention", "pixels"),
        (training["adversarial"], "augment", False),
        (training["adversarial"], "targets", "labels"),
        (training["optimiser"], "average_decay", 0),
        (values["evaluation"], "gradient_precision", "auto"),
    ):
        if section[key] == default:
            del section[key]
    # Without effect under `elbo`, and unknown to runs from before there was a choice.
    if training["objective"] == "elbo":
        del training["objective"], training["adversarial"]
    return values


def classifier_training_values(section: ClassifierTraining) -> dict[str, Any]:
    """Return what determines a classifier's training, as runs from before the newer keys stored it."""
    values = section.model_dump(exclude={"initial"})
    return {key: value for key, value in values.items() if value != _NEWER_CLASSIFIER_KEYS.get(key)}


def differing_values(stored: Recipe, asked: Recipe, keys: Sequence[str] = TRAINING_SECTIONS) -> list[str]:
    """Say in which values two recipes differ, by dotted key: `training.epochs was 2, now 3`.

    Args:
        stored: The recipe that something was made with.
        asked: The recipe at hand.
        keys: Dotted keys of what is compared, such as sections.
    """
    pairs = [(_value(_hashed_values(stored), key), _value(_hashed_values(asked), key), key) for key in keys]
    return [text for before, after, key in pairs for text in _differing(before, after, key)]


def _differing(before: Any, after: Any, key: str) -> list[str]:  # noqa: ANN401  (any value of a recipe)
    if isinstance(before, dict) and isinstance(after, dict):
        names = dict.fromkeys((*before, *after))
        return [
            text for name in names for text in _differing(before.get(name), after.get(name), f"{key}.{name}")
        ]
    return [] if before == after else [f"{key} was {json.dumps(before)}, now {json.dumps(after)}"]


def refuse_other_training(recipe: Recipe, trained: Recipe, overrides: Sequence[str], path: str) -> None:
    """Refuse a `--set` that contradicts how a run was trained, rather than ignore it.

    Args:
        recipe: What is asked for, with the overrides.
        trained: What the run was trained with.
        overrides: `section.key=value` each.
        path: The run, for the message.

    Raises:
        StateError: If an override changes a value that the purifier was trained with.
    """
    asked, stored = recipe.model_dump(mode="json"), trained.model_dump(mode="json")
    for text in overrides:
        key = text.partition("=")[0].strip()
        # With a dot at the end `threat` frees `threat.eps`, but no key that only begins like it.
        if any(f"{key}.".startswith(f"{free}.") for free in (*INFERENCE_SECTIONS, "data.root")):
            continue
        # Parsed values, so that 8/255 and its decimal agree.
        if _value(asked, key) != (found := _value(stored, key)):
            elsewhere = "to train with it, or to attack a classifier alone, choose another folder: --run DIR"
            raise StateError(
                f"{path} was trained with {key} {json.dumps(found)}; --set {text} cannot change it",
                hint="use --seed for the seed of an evaluation" if key == "seed" else elsewhere,
            )


def _value(values: Any, key: str) -> Any:  # noqa: ANN401  (any value of a recipe)
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def add_checksum_line(text: str) -> str:
    """Return a recipe's text below a first line with its checksum, as a run stores it."""
    return f"{_FIRST_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def verify_checksum_line(text: str, source: str) -> None:
    """Compare a recipe's text with the checksum in its first line, if it has one.

    Raises:
        RecipeError: If the text has changed since a run wrote it.
    """
    first, _, rest = text.partition("\n")
    if first.startswith(_FIRST_LINE) and add_checksum_line(rest) != text:
        raise RecipeError(
            f"{source} has changed since its run wrote it: it does not match the checksum in its first line",
            hint="resuming its training with --resume rewrites it; to use it as a recipe of your own, copy "
            "it elsewhere without its first line",
        )
