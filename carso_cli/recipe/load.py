"""Reads recipes: a file, the recipe it extends and `--set` in; a checked `Recipe` out.

A recipe with `extends: NAME` says only where it differs from the shipped recipe of that name; a run stores
the whole.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from carso_cli.errors import RecipeError
from carso_cli.io.files import read_limited
from carso_cli.recipe.document import Document, Problem
from carso_cli.recipe.identity import verify_checksum_line
from carso_cli.recipe.messages import HINT, blame_overrides, explain, show
from carso_cli.recipe.purifier_training import BetaIncrease, LearningRate
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.shipped import find_recipe, recipes_folder

DEFAULT_RECIPE = "digits"
MAX_BYTES = 1_000_000

_OWN = ("name", "description", "reproduces")
"""Keys that identify a recipe; an extending recipe does not inherit them."""
_OF_A_RUN = "recipe.yaml"
_SCHEDULES = (("training", "learning_rate"), ("training", "beta_increase"))
_SCHEDULE_NAMES = {name for _, name in _SCHEDULES}
_NO_EPS = "another norm needs an eps of its own; give threat.eps too (8/255 is usual for linf, 0.5 for l2)"


def load_recipe(reference: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        reference: Path, or bare name of a shipped recipe; None means `digits`.
        overrides: `section.key=value` each, the value read as YAML (`training.epochs=3`, `data.root=../x`,
            `representation.layers=[a, b]`).

    Raises:
        RecipeError: If it cannot be found, read or carried out; all problems at once.
    """
    path = locate_recipe(reference)
    # A shipped recipe is referred to by its name, which holds in any folder.
    shipped = recipes_folder() in path.parents
    source = f"recipe '{path.stem}'" if shipped else str(path)
    recipe = load_recipe_text(_read_file(path), source=source, overrides=overrides)
    return recipe if shipped else recipe.read_from(path)


def load_recipe_text(text: str, *, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as YAML text.

    Args:
        text: The YAML.
        source: Name to show in messages.
        overrides: `section.key=value` each; a number of epochs alone scales the schedules with it.

    Raises:
        RecipeError: With every problem found: place, dotted key, value, what is allowed, nearest known name.
    """
    document = Document.read(text, source)
    if not isinstance(document.data, dict):
        kinds = {type(None): "nothing", list: "a list"}
        found = kinds.get(type(document.data), "a single value")
        raise RecipeError(
            f"{source}: a recipe is sections of keys and values, and this file holds {found}",
            hint=f"`carso recipes show {DEFAULT_RECIPE}` shows a complete recipe",
        )
    # In this order: --set overrides what is inherited too, and may set the epochs to scale to.
    _extend(document)
    norm = _norm(document.data)
    for override in overrides:
        _apply_override(document, override)
    given = {key: text for key, text in document.overrides.items() if text}
    epochs = given.get(("training", "epochs"))
    if epochs and not any(key[:2] in _SCHEDULES for key in given):
        _scale_epochs(document, epochs)
    if _norm(document.data) not in (norm, None) and not {("threat", "eps"), ("threat",)} & given.keys():
        document.problems.append(Problem(("threat", "norm"), _NO_EPS))
    try:
        recipe = Recipe.model_validate(document.data)
        if not document.problems:
            return recipe
        problem = explain(document, [])
    except ValidationError as error:
        problem = explain(document, error.errors(include_url=False))
    raise blame_overrides(problem, source) if overrides and _is_valid(text) else problem


def _is_valid(text: str) -> bool:
    try:
        load_recipe_text(text)
    except RecipeError:
        return False
    return True


def locate_recipe(reference: str | None) -> Path:
    """Return the file behind a reference: a path, or the bare name of a shipped recipe (`digits` for None).

    A bare name means the shipped recipe even where a file or folder of that name lies in the working folder;
    write `./name` for those.

    Raises:
        RecipeError: If there is neither; the message names the nearest.
    """
    name = DEFAULT_RECIPE if reference is None else reference
    # os.path answers False for names that no file can have, where Path may raise.
    path = Path(os.path.expanduser(name))
    if name.endswith((".yaml", ".yml")) or name.startswith((".", "/", "~")):
        # Of a bare name with this ending, `find_recipe` says in its error which shipped name is near.
        return path if os.path.exists(path) or path.is_absolute() or "/" in name else find_recipe(name)
    try:
        return find_recipe(name)
    except RecipeError:
        # A run is let through to `_read_file`, which says how runs are used.
        if os.path.isfile(path) or os.path.isfile(path / _OF_A_RUN):
            return path
        raise


def read_recipe_file(reference: str | None) -> str:
    """Return the text of a recipe's file as it was written, comments included.

    Raises:
        RecipeError: If it cannot be found or read.
    """
    return _read_file(locate_recipe(reference))


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML with every default written out; it loads back equal."""
    # Escaped, since PyYAML writes some unescaped line separators that it reads back as spaces.
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=False, width=100)


def _read_file(path: Path) -> str:
    if os.path.isfile(path / _OF_A_RUN):
        raise RecipeError(f"{path} is a run, not a recipe", hint=f"to use a trained run, give --run {path}")
    try:
        raw = read_limited(path, MAX_BYTES)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    try:
        # Some editors put a byte-order mark first.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text in UTF-8: byte {error.start} cannot be decoded") from None
    verify_checksum_line(text, str(path))
    return text


def _extend(document: Document, extending: tuple[str, ...] = ()) -> None:
    """Add the values of the shipped recipe named in `extends`, where this one leaves them out.

    A number of epochs without schedules scales those that are inherited, or the defaults.

    Raises:
        RecipeError: If there is no such recipe, or it extends itself.
    """
    own = document.data
    inherited: dict[str, Any] = {}
    if "extends" in own:
        inherited = _inherited(document, extending)
        document.data = _merged(inherited, own)
    training, threat = own.get("training"), own.get("threat")
    if isinstance(training, dict) and "epochs" in training and not training.keys() & _SCHEDULE_NAMES:
        _scale_epochs(document)
    if (
        isinstance(threat, dict)
        and "norm" in threat
        and "eps" not in threat
        and _norm(own) not in (_norm(inherited), None)
    ):
        document.problems.append(Problem(("threat", "norm"), _NO_EPS))


def _inherited(document: Document, extending: tuple[str, ...]) -> dict[str, Any]:
    """Take `extends` out of a recipe; return the values of the recipe that it names."""
    reference = document.data.pop("extends")
    where = f"{document.source}, {document.origin(('extends',))[1]}, extends"
    if not isinstance(reference, str) or reference in extending:
        reason = "recipes extend each other in a circle" if extending else "give the name of a shipped recipe"
        raise RecipeError(f"{where}: {show(reference)} is not allowed; {reason}", hint=HINT)
    try:
        path = find_recipe(reference)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from None
    base = Document.read(_read_file(path), f"recipe '{reference}'")
    _extend(base, (*extending, reference))
    # A changed recipe is not that of the row of the paper, and needs a run folder of its own.
    return {key: value for key, value in base.data.items() if key not in _OWN}


def _norm(data: dict[str, Any]) -> str | None:
    """Return the norm that a recipe says or means; None for what is no norm, which `Recipe` reports."""
    threat = data.get("threat")
    norm = threat.get("norm", "linf") if isinstance(threat, dict) else "linf"
    return norm if norm in ("linf", "l2") else None


def _merged(base: Any, changes: Any) -> Any:  # noqa: ANN401
    """Merge sections; lists and plain values are replaced."""
    # Weights are one value: a name inherited from the base does not belong to another source's file.
    if not isinstance(base, dict) or not isinstance(changes, dict) or "source" in changes:
        return changes
    return base | {name: _merged(base.get(name), value) for name, value in changes.items()}


def _apply_override(document: Document, text: str) -> None:
    """Apply `section.key=value`, with the value read as YAML."""
    dotted, equals, value = text.partition("=")
    path = dotted.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(
            f"--set {text}: an override is written section.key=value, such as training.epochs=3",
            hint=f"`carso recipes show {DEFAULT_RECIPE}` shows the sections and keys",
        )
    read = Document.read(value, f"--set {text}")
    document.problems += [Problem(tuple(path), problem.text) for problem in read.problems]
    document.override(path, read.data, text)


def _scale_epochs(document: Document, text: str = "") -> None:
    """Keep the schedules' proportions (Table 16) where `training.epochs` alone is given.

    Does nothing if a value is invalid, which `Recipe` reports.

    Args:
        document: The recipe.
        text: The `--set` that gave the epochs; the recipe itself where it is empty.
    """
    training = document.data.get("training")
    if not isinstance(training, dict):
        return
    # A schedule that is left out has its defaults, which need scaling as well.
    written = [{} if (section := training.get(name)) is None else section for _, name in _SCHEDULES]
    try:
        rate, beta = LearningRate.model_validate(written[0]), BetaIncrease.model_validate(written[1])
    except ValidationError:
        return
    epochs = training["epochs"]
    total = rate.warmup_epochs + rate.plateau_epochs + rate.annealing_epochs
    # Not `isinstance`: true is an int to it.
    if type(epochs) is not int or epochs < 1 or total < 1:
        return

    def scaled(epoch: int) -> int:
        # Half up, in whole numbers: the same on every machine.
        return (2 * epoch * epochs + total) // (2 * total)

    # Boundaries are rounded, not lengths, so that the three parts add up to `epochs`.
    first, second = rate.warmup_epochs, rate.warmup_epochs + rate.plateau_epochs
    # RAdam's first steps are plain gradient descent on a summed loss: without any warm-up they diverge.
    warm = max(scaled(first), min(first, 1))
    boundaries = (0, warm, max(scaled(second), warm), epochs)
    names = ("warmup_epochs", "plateau_epochs", "annealing_epochs")
    for name, (before, after) in zip(names, itertools.pairwise(boundaries), strict=True):
        document.override((*_SCHEDULES[0], name), after - before, text)
    start, end = scaled(beta.first_epoch), scaled(beta.last_epoch)
    # Full weight from the first epoch would not be the recipe's schedule any more.
    end = max(end, start + (beta.last_epoch > beta.first_epoch))
    for name, epoch in (("first_epoch", start), ("last_epoch", end)):
        document.override((*_SCHEDULES[1], name), epoch, text)
