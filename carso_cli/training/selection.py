"""Which epoch's purifier is kept: the last, as in the paper, or the best on held-out images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_ACCURACIES = ("defence_clean_accuracy", "defence_attacked_accuracy")


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
