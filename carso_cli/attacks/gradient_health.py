"""Whether an attack had gradients to work with, step by step.

A defence whose output saturates returns gradients that are NaN or zero; an attack then stands still and
the result passes for robustness. `GradientRecorder` counts such gradients as an attack runs:

    recorder = GradientRecorder()
    PGDEoT(threat, steps=20, draws=4, step_size=0.007, seed=0, recorder=recorder)(target, images, labels)
    recorder.summary().nan            # share of (image, step) pairs whose gradient held a NaN
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientHealth:
    """Shares in [0, 1] of the gradients seen, and the mean loss.

    Args:
        gradients: Number of gradients (one per image and step) behind the shares.
        nan: Share with a NaN entry.
        inf: Share with an infinite entry and no NaN.
        zero: Share with every entry exactly zero.
        unusable: Share without a single finite entry other than zero: the image cannot move.
        saturated: Mean share of draws whose output gave the label probability 1 in float32, or was not
            finite; NaN where the attack had no labels to compare with.
        loss: Mean of the finite losses.
    """

    gradients: int
    nan: float
    inf: float
    zero: float
    unusable: float
    saturated: float
    loss: float

    def as_dict(self) -> dict[str, float]:
        """Return plain numbers for a result file."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


@dataclass
class _Tally:
    gradients: int = 0
    nan: int = 0
    inf: int = 0
    zero: int = 0
    unusable: int = 0
    saturated: float = 0.0
    saturated_known: int = 0
    loss: float = 0.0
    finite_losses: int = 0

    def add(self, other: _Tally) -> None:
        """Take in the counts of another."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))

    def health(self) -> GradientHealth:
        """Return the counts as shares; NaN for what was never counted."""
        count = max(self.gradients, 1)
        return GradientHealth(
            gradients=self.gradients,
            nan=self.nan / count,
            inf=self.inf / count,
            zero=self.zero / count,
            unusable=self.unusable / count,
            saturated=self.saturated / self.saturated_known if self.saturated_known else float("nan"),
            loss=self.loss / self.finite_losses if self.finite_losses else float("nan"),
        )


@dataclass
class GradientRecorder:
    """Counts unusable gradients per step, over as many batches and restarts as it is shown.

    Args:
        messages: What a library warned of while its attack ran, each once.
    """

    messages: list[str] = field(default_factory=list)
    _steps: dict[int, _Tally] = field(default_factory=dict)

    def record(
        self, step: int, gradient: Tensor, *, loss: Tensor | None = None, saturated: Tensor | None = None
    ) -> None:
        """Count the gradients of one step.

        Args:
            step: 0 at the attack's start.
            gradient: (B, channels, H, W), as the model gave it.
            loss: (B,) loss at the same point, if known.
            saturated: (B,) share of draws that were saturated, if known.
        """
        self._steps.setdefault(step, _Tally()).add(_tally(gradient.detach(), loss, saturated))

    def note(self, message: str) -> None:
        """Keep a library's warning."""
        if message not in self.messages:
            self.messages.append(message)

    def steps(self) -> list[GradientHealth]:
        """Return the health of each step, in order: shares and the loss trajectory."""
        return [self._steps[step].health() for step in sorted(self._steps)]

    def summary(self) -> GradientHealth:
        """Return the health over all steps."""
        total = _Tally()
        for tally in self._steps.values():
            total.add(tally)
        return total.health()


def _tally(gradient: Tensor, loss: Tensor | None, saturated: Tensor | None) -> _Tally:
    entries = gradient.flatten(1)
    nan = entries.isnan().any(dim=1)
    inf = entries.isinf().any(dim=1) & ~nan
    usable = (entries.isfinite() & (entries != 0)).any(dim=1)
    tally = _Tally(
        gradients=len(entries),
        nan=int(nan.sum()),
        inf=int(inf.sum()),
        zero=int((entries == 0).all(dim=1).sum()),
        unusable=int((~usable).sum()),
    )
    if saturated is not None:
        tally.saturated = float(saturated.double().sum())
        tally.saturated_known = len(saturated)
    if loss is not None:
        finite = loss.detach()[torch.isfinite(loss)]
        tally.loss = float(finite.double().sum())
        tally.finite_losses = len(finite)
    return tally
