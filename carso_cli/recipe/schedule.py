"""Scales the epochs of the schedules when `--set training.epochs=N` alone asks for another length."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeGuard

from pydantic import BaseModel

from carso_cli.recipe.document import Document
from carso_cli.recipe.purifier_training import BetaIncrease, LearningRate

_RATE = ("warmup_epochs", "plateau_epochs", "annealing_epochs")
_BETA = ("first_epoch", "last_epoch")


def scale_epochs(document: Document) -> None:
    """Keep the schedules' proportions (Table 16) when only the number of epochs is overridden.

    Does nothing unless `training.epochs` was overridden, no epoch of a schedule was, and all counts are
    whole numbers; anything else is left to the recipe's own checks.
    """
    text = document.overrides.get(("training", "epochs"))
    scheduled = (("training", "learning_rate"), ("training", "beta_increase"))
    if text is None or any(key[:2] in scheduled for key in document.overrides):
        return
    training = document.data.get("training")
    if not isinstance(training, dict):
        return
    epochs = training.get("epochs")
    rate = _counts(training.get("learning_rate"), LearningRate, _RATE)
    beta = _counts(training.get("beta_increase"), BetaIncrease, _BETA)
    total = sum(rate.values())
    if not _is_whole(epochs) or epochs < 1 or len(rate) < len(_RATE) or len(beta) < len(_BETA) or total < 1:
        return

    def scaled(epoch: int) -> int:
        # Half up, in whole numbers: the same on every machine.
        return (2 * epoch * epochs + total) // (2 * total)

    first, second = rate["warmup_epochs"], rate["warmup_epochs"] + rate["plateau_epochs"]
    # RAdam's first steps are plain gradient descent on a summed loss: without any warm-up they diverge.
    warm = max(scaled(first), min(first, 1))
    boundaries = [0, warm, max(scaled(second), warm), epochs]
    lengths = (after - before for before, after in itertools.pairwise(boundaries))
    for name, value in zip(_RATE, lengths, strict=True):
        document.override(["training", "learning_rate", name], value, text)
    for name in _BETA:
        document.override(["training", "beta_increase", name], scaled(beta[name]), text)


def _counts(section: object, model: type[BaseModel], names: tuple[str, ...]) -> dict[str, int]:
    """Return the whole-number counts of a section as written, with the schema's defaults where left out."""
    written: Mapping[str, Any] = section if isinstance(section, dict) else {}
    if section is not None and not isinstance(section, dict):
        return {}
    values = {name: written.get(name, model.model_fields[name].default) for name in names}
    return {name: value for name, value in values.items() if _is_whole(value) and value >= 0}


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
