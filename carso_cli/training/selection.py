"""Which epoch's purifier is kept: the last, as in the paper, or the best on held-out images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from carso_cli.errors import RecipeError
from carso_cli.recipe.schema import Recipe

_ACCURACIES = ("defence_clean_accuracy", "defence_attacked_accuracy")


def refuse_blind_choice(recipe: Recipe, *, resume: bool = False) -> None:
    """Refuse to keep the best epoch where no image is held out to tell it by.

    Raises:
        RecipeError: If `training.keep` is best, `data.holdout` 0 and `data.follow` the training images.
    """
    data = recipe.data
    # A run may have been begun before this was refused.
    if not resume and recipe.training.keep == "best" and not data.holdout and data.follow == "train":
        raise RecipeError(
            f"recipe '{recipe.name}': training.keep 'best' has no held-out images to choose by, since "
            "data.holdout is 0: it would be the epoch that fits the training images best",
            hint="hold images out with --set data.holdout=0.02, or keep the last epoch; --set "
            "data.follow=test chooses by the test images, whose accuracy is then too high",
        )


def held_out_score(metrics: Mapping[str, Any]) -> float:
    """Return the mean of an epoch's accuracies on held-out images; 0 where there are no such images."""
    found = [metrics[name] for name in _ACCURACIES if metrics.get(name) is not None]
    return sum(found) / len(found) if found else 0.0


def best_epoch(metrics: Sequence[Mapping[str, Any]]) -> int:
    """Return the position of the epoch with the highest score; of several, the last."""
    return max(range(len(metrics)), key=lambda epoch: (held_out_score(metrics[epoch]), epoch))


class BestPurifier:
    """The weights of the best epoch so far, as a part of a checkpoint; empty before the first epoch."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        return self.tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights back."""
        self.tensors = dict(tensors)
