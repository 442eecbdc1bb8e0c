"""A target as the differentiable callable that advertorch and AutoAttack expect.

Differences from handing them the model itself: gradients reach the images only (both libraries call
`backward`, which would fill the parameters' `.grad`), come back contiguous (AutoAttack calls `.view`),
NaN entries become zero after they are counted, and memory stays bounded for a defence.

    model = LibraryModel(target, labels, recorder)
    LinfPGDAttack(model, eps=8 / 255).perturb(images, labels)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carso_cli.attacks.attack import BestPoint
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.target import AttackTarget, correctness, ordered_loss, saturation


class LibraryModel:
    """Wraps a target for a library, and watches what the library does with it.

    Args:
        target: The model under attack.
        labels: (B,) labels, when the library calls with all images every time; lets the recorder see loss
            and saturation, and `best` keep the best point.
        recorder: Counts the gradients that pass through.
        best: Is offered every point that the library asks about, with its cross-entropy.
    """

    def __init__(
        self,
        target: AttackTarget,
        labels: Tensor | None = None,
        recorder: GradientRecorder | None = None,
        best: BestPoint | None = None,
    ) -> None:
        self.target = target
        self.labels = labels
        self.recorder = recorder
        self.best = best
        self.step = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Return the (B, C) logits of one draw, differentiable in the images."""
        if torch.is_grad_enabled() and images.requires_grad:
            logits: Tensor = _ThroughTarget.apply(images, self)  # type: ignore[no-untyped-call]
        else:
            logits = self.target(images)
        if self.best is not None and self.labels is not None:
            found = logits.detach()
            loss = ordered_loss(cross_entropy(found, self.labels), correctness(found, self.labels))
            self.best.offer(images.detach(), loss)
        return logits

    def watch(self, gradient: Tensor, logits: Tensor) -> None:
        """Record one gradient on its way back to the library."""
        if self.recorder is not None:
            loss = saturated = None
            if self.labels is not None:
                loss, saturated = cross_entropy(logits, self.labels), saturation(logits, self.labels)
            self.recorder.record(self.step, gradient, loss=loss, saturated=saturated)
        self.step += 1


class _ThroughTarget(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, model: LibraryModel) -> Tensor:  # noqa: ANN401  (torch's own type)
        logits, ctx.back = model.target.vjp(images)
        ctx.model, ctx.logits = model, logits
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401  (torch's own type)
        gradient = ctx.back(cotangents[0])
        ctx.model.watch(gradient, ctx.logits)
        return torch.nan_to_num(gradient, nan=0.0, posinf=torch.inf, neginf=-torch.inf), None
