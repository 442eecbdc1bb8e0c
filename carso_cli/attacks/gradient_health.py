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
        zero: Share with every entry exactly zero, of an image that is not yet wrong: there a gradient has no
            task left, and the loss may be constant.
        unusable: Share without a single finite entry other than zero: the image cannot move.
        saturated: Mean share of EoT samples whose output gave the label probability 1 in float32, or was not
            finite; NaN where the attack had no labels to compare with.
        loss: Mean of the finite losses; NaN where there are none.
        part: Part of the attack that took these gradients, where it has several with losses of their own.
    """

    gradients: int
    nan: float
    inf: float
    zero: float
    unusable: float
    saturated: float
    loss: float
    part: str = ""

    def as_dict(self) -> dict[str, float | str]:
        """Return plain numbers for a result file."""
        return asdict(self)


@dataclass
class GradientRecorder:
    """Counts unusable gradients per step, over all batches and restarts that it is passed to.

    Args:
        messages: What a library warned of while its attack ran, each once.
        part: Part of the attack that runs now; its gradients are counted apart from those of the others.
    """

    messages: list[str] = field(default_factory=list)
    part: str = ""
    _steps: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    def record(
        self,
        step: int,
        gradient: Tensor,
        answer: ExpectedLoss | None = None,
        *,
        saturates: bool = True,
        aimless: Tensor | None = None,
    ) -> None:
        """Count the gradients of one step.

        Args:
            step: 0 at the attack's start.
            gradient: (B, channels, H, W), as the model gave it.
            answer: Loss and saturation at the same point, if known.
            saturates: Whether the loss is one that a certain answer makes flat, as it does cross-entropy; a
                margin saturates only where it is not finite.
            aimless: (B,) bool, images at which the loss asks for no change, where no `answer` says so.
        """
        entries = gradient.detach().flatten(1)
        nan = entries.isnan().any(dim=1)
        done = torch.zeros_like(nan) if aimless is None else aimless
        if answer is not None:
            done = answer.correct <= 0
        found = {
            "nan": nan,
            "inf": entries.isinf().any(dim=1) & ~nan,
            "zero": (entries == 0).all(dim=1) & ~done,
            "unusable": ~(entries.isfinite() & (entries != 0)).any(dim=1),
        }
        # Sums and not shares, as batches and restarts of unequal size are added up before dividing; in one
        # list, since each number that is read waits for the device.
        sums = torch.stack(tuple(found.values())).sum(dim=1).tolist()
        counts: dict[str, float] = {"gradients": len(entries), **dict(zip(found, sums, strict=True))}
        if answer is not None:
            # One infinite loss would hide all the others in a mean.
            finite = answer.loss[torch.isfinite(answer.loss)]
            saturated = answer.saturated if saturates else ~torch.isfinite(answer.loss)
            counts |= {
                "saturated": float(saturated.double().sum()),
                "saturated_known": len(entries),
                "loss": float(finite.double().sum()),
                "finite_losses": len(finite),
            }
        key = (self.part, step)
        self._steps[key] = _sum((self._steps.get(key, {}), counts))

    def note(self, message: str) -> None:
        """Keep a library's warning."""
        if message not in self.messages:
            self.messages.append(message)

    def steps(self) -> list[GradientHealth]:
        """Return the health of each step, in order, part by part: shares and the loss trajectory."""
        parts = dict.fromkeys(part for part, _ in self._steps)
        return [
            _health(self._steps[key], part)
            for part in parts
            for key in sorted(key for key in self._steps if key[0] == part)
        ]

    def summary(self) -> GradientHealth:
        """Return the health over all steps."""
        return _health(_sum(self._steps.values()))


def _sum(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def _health(counts: dict[str, float], part: str = "") -> GradientHealth:
    def mean(key: str, of: str, empty: float) -> float:
        return counts[key] / counts[of] if counts.get(of) else empty

    # Of no gradients at all, none is unusable; their loss and saturation are unknown.
    shares = {key: mean(key, "gradients", 0.0) for key in ("nan", "inf", "zero", "unusable")}
    return GradientHealth(
        gradients=int(counts.get("gradients", 0)),
        **shares,
        saturated=mean("saturated", "saturated_known", float("nan")),
        loss=mean("loss", "finite_losses", float("nan")),
        part=part,
    )
