"""Lookahead: slow weights that follow the optimiser's fast ones (Zhang et al., 2019b; Table 16)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Lookahead:
    """Keep slow weights; every `steps` inner steps move them towards the fast ones.

    Every `steps` calls of `step`, slow <- slow + decay * (fast - slow), and the fast weights restart
    from there. Call it after the inner optimiser's own step. Source: Zhang et al. (2019b), Algorithm 1,
    with their alpha called `averaging decay` as in Table 16.

    Args:
        parameters: The fast weights, updated in place.
        steps: Inner steps between two synchronisations.
        decay: Share of the way that the slow weights move, in [0, 1].
    """

    def __init__(self, parameters: Sequence[Tensor], *, steps: int, decay: float) -> None:
        self.fast = list(parameters)
        self.slow = [parameter.detach().clone() for parameter in self.fast]
        self.steps = steps
        self.decay = decay
        self.taken = 0

    @torch.no_grad()
    def step(self) -> None:
        """Count one inner step and synchronise when it is due."""
        self.taken += 1
        if self.taken % self.steps:
            return
        for fast, slow in zip(self.fast, self.slow, strict=True):
            slow.lerp_(fast.detach(), self.decay)
            fast.copy_(slow)
