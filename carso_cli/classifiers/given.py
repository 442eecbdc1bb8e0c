"""A classifier that is a function, or that answers probabilities, as a module that answers logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class GivenClassifier(nn.Module):
    """A model of any form as a module from images to logits.

    Args:
        model: (B, channels, H, W) images in [0, 1] to (B, C) scores; a module or a function.
        parts: Modules that a function refers to: their layers can be read, and their weights identify it.
        logarithm: Whether the scores are probabilities; their logarithms are logits.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        *,
        parts: Iterable[nn.Module] = (),
        logarithm: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.parts = nn.ModuleList(parts)
        self.logarithm = logarithm

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, channels, H, W) images in [0, 1] to (B, C) logits."""
        scores = self.model(images)
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if self.logarithm else scores
