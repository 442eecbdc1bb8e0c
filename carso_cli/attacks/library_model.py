"""The adapter for advertorch and pyautoattack: a target as the differentiable callable that they expect.

    model = LibraryModel(target, labels, recorder)
    LinfPGDAttack(model, eps=8 / 255).perturb(images, labels)

Handing them the model itself would not do: both call `backward`, which fills the parameters' `.grad`, and
AutoAttack calls `.view` on gradients, which must then be contiguous.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from carso_cli.attacks.attack import BestPoint
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.target import AttackTarget, ExpectedLoss
from carso_cli.attacks.threat_model import ThreatModel

LOGGER = logging.getLogger("auto-attack")
"""Where pyautoattack reports zero gradients and the like."""


@dataclass(eq=False)
class LibraryModel:
    """Wraps a target for a library: gradients reach the images only, and are counted on their way.

    Args:
        target: The model under attack.
        labels: (B,) labels, when the library calls with all images every time; lets the recorder see loss
            and saturation, and `best` keep the best point.
        recorder: Counts the gradients that pass through.
        best: Is offered every point that the library asks about, with its cross-entropy.
        direction: If given, the library gets this threat model's ascent direction in place of the gradient.
        keep_nan: Pass NaN gradients on, as a model without this adapter would.
    """

    target: AttackTarget
    labels: Tensor | None = None
    recorder: GradientRecorder | None = None
    best: BestPoint | None = None
    direction: ThreatModel | None = None
    keep_nan: bool = False
    step: int = field(default=0, init=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the (B, C) logits of one forward pass, differentiable in the images."""
        if torch.is_grad_enabled() and images.requires_grad:
            logits: Tensor = _TargetFunction.apply(images, self)  # type: ignore[no-untyped-call]
        else:
            logits = self.target(images)
        if self.best is not None and self.labels is not None:
            # By rank: a NaN loss must not hide a point at which most samples are wrong.
            self.best.offer(images.detach(), _answer(logits.detach(), self.labels).rank)
        return logits

    def pass_back(self, gradient: Tensor, logits: Tensor, cotangent: Tensor) -> Tensor:
        """Record a gradient, (B, channels, H, W); return what the library gets, by default no NaN."""
        if self.recorder is not None:
            answer = None if self.labels is None else _answer(logits, self.labels)
            # DLR is constant once the label has fallen to the third place; a certain answer, at which
            # cross-entropy is flat, counts as a zero gradient.
            certain = logits.float().softmax(dim=1).amax(dim=1) >= 1.0 - torch.finfo(torch.float32).eps
            aimless = (cotangent == 0).all(dim=1) & ~certain
            self.recorder.record(self.step, gradient, answer, aimless=aimless)
        # One step per backward pass: only that is seen from here, whatever the library calls a step.
        self.step += 1
        if self.direction is not None:
            # Under l2 advertorch divides by the gradient's length or 1e-6, whichever is more: where a
            # confident model leaves less than that, its steps would shrink to nothing.
            return self.direction.ascent_direction(gradient)
        if self.keep_nan:
            return gradient
        # Infinities stay: their sign is a direction, and the recorder has counted them.
        return torch.nan_to_num(gradient, nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _answer(logits: Tensor, labels: Tensor) -> ExpectedLoss:
    return ExpectedLoss.of(cross_entropy(logits, labels), logits, labels)


class _TargetFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, model: LibraryModel) -> Tensor:  # noqa: ANN401  (torch's own type)
        # A graph of its own, which the library's `backward` does not walk: parameters keep their `.grad`.
        logits, ctx.vjp = model.target.vjp(images)
        ctx.model, ctx.logits = model, logits
        # A copy, as autograd would mark the stored logits themselves as this function's output.
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401  (torch's own type)
        return ctx.model.pass_back(ctx.vjp(cotangents[0]), ctx.logits, cotangents[0]), None


@contextmanager
def warnings_to(recorder: GradientRecorder | None) -> Iterator[None]:
    """Send what pyautoattack logs to the recorder instead of the terminal."""

    def keep(record: logging.LogRecord) -> bool:
        if recorder is not None and record.levelno >= logging.WARNING:
            recorder.note(record.getMessage())
        return False  # no handler sees the record

    # A filter, as a handler of ours would not keep the record from the handlers of others.
    LOGGER.addFilter(keep)
    try:
        yield
    finally:
        LOGGER.removeFilter(keep)
