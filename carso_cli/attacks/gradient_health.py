"""Whether an attack had gradients to work with, step by step.

A defence whose output saturates returns gradients that are NaN or zero. An attack then cannot move, and its
failure looks like robustness. `GradientRecorder` counts such gradients as an attack runs:

    recorder = GradientRecorder()
    PGDEoT(threat, steps=20, eot_samples=4, step_size=0.007, recorder=recorder)(target, images, labels)
    recorder.summary().nan            # share of (image, step) pairs whose gradient held a NaN
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from carso_cli.attacks.target import ExpectedLoss


@dataclass(frozen=True)
class GradientHealth:
    """Shares in [0, 1] of the gradients seen, and the mean loss.

    Args:
        gradients: Number of gradients (one per image and step) behind the shares.
        nan: Share with a NaN entry.
        inf: Share with an infinite entry and no NaN.
        zero: Share with every entry exactly zero.
        unusable: Share without a single finite entry other than zero: the image cannot move.
        saturated: Mean share of EoT samples whose output gave the label probability 1 in float32, or was not
            finite; NaN where the attack had no labels to compare with.
        loss: Mean of the finite losses; NaN where there are none.
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
        return asdict(self)


@dataclass
class GradientRecorder:
    """Counts unusable gradients per step, over all batches and restarts that it is passed to.

    Args:
        messages: What a library warned of while its attack ran, each once.
    """

    messages: list[str] = field(default_factory=list)
    _steps: dict[int, dict[str, float]] = field(default_factory=dict)

    def record(self, step: int, gradient: Tensor, answer: ExpectedLoss | None = None) -> None:
        """Count the gradients of one step.

        Args:
            step: 0 at the attack's start.
            gradient: (B, channels, H, W), as the model gave it.
            answer: Loss and saturation at the same point, if known.
        """
        entries = gradient.detach().flatten(1)
        nan = entries.isnan().any(dim=1)
        # Sums and not shares, as batches and restarts of unequal size are added up before dividing.
        counts: dict[str, float] = {
            "gradients": len(entries),
            "nan": int(nan.sum()),
            "inf": int((entries.isinf().any(dim=1) & ~nan).sum()),
            "zero": int((entries == 0).all(dim=1).sum()),
            "unusable": int((~(entries.isfinite() & (entries != 0)).any(dim=1)).sum()),
        }
        if answer is not None:
            # One infinite loss would hide all the others in a mean.
            finite = answer.loss[torch.isfinite(answer.loss)]
            counts |= {
                "saturated": float(answer.saturated.double().sum()),
                "saturated_known": len(entries),
                "loss": float(finite.double().sum()),
                "finite_losses": len(finite),
            }
        self._steps[step] = _sum((self._steps.get(step, {}), counts))

    def note(self, message: str) -> None:
        """Keep a library's warning."""
        if message not in self.messages:
            self.messages.append(message)

    def steps(self) -> list[GradientHealth]:
        """Return the health of each step, in order: shares and the loss trajectory."""
        return [_health(self._steps[step]) for step in sorted(self._steps)]

    def summary(self) -> GradientHealth:
        """Return the health over all steps."""
        return _health(_sum(self._steps.values()))


def _sum(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def _health(counts: dict[str, float]) -> GradientHealth:
    def mean(key: str, of: str, empty: float) -> float:
        return counts[key] / counts[of] if counts.get(of) else empty

    # Of no gradients at all, none is unusable; their loss and saturation are unknown.
    shares = {key: mean(key, "gradients", 0.0) for key in ("nan", "inf", "zero", "unusable")}
    return GradientHealth(
        gradients=int(counts.get("gradients", 0)),
        **shares,
        saturated=mean("saturated", "saturated_known", float("nan")),
        loss=mean("loss", "finite_losses", float("nan")),
    )
