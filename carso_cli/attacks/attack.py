"""What an attack is: an object built once with its budget, then called on batches.

    attack = PGDEoT(threat, steps=200, eot_samples=20, step_size=0.007, seed=0)
    perturbed = attack(target, images, labels)

Every attack returns, for every image, a point of the ball and of the pixel range: its best-loss point, also
where the model is not fooled, since only new samples of a random defence can say whether it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, fields

import torch
from torch import Tensor

from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.losses import Loss
from carso_cli.attacks.target import AttackTarget, LossGradient
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.errors import NumericsError

LEAVES_AFTER, _STEPS = 16, 2
"""Samples, and steps, in which a random model must be wrong every time before an image leaves the queue."""


@dataclass(frozen=True, eq=False)
class Attack(ABC):
    """Makes adversarial examples; the same call twice gives the same images from targets of equal seed.

    Args:
        threat: Norm and radius (or radii).
        seed: Seed of everything random in the attack, such as its starts.
        recorder: Counts unusable gradients, where the attack asks for gradients.
    """

    threat: ThreatModel
    _: KW_ONLY
    seed: int = 0
    recorder: GradientRecorder | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """Name on the command line and in results."""

    @abstractmethod
    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images.

        Args:
            target: The model under attack.
            images: (B, channels, H, W) in [0, 1].
            labels: (B,) int64, the true classes.

        Returns:
            (B, channels, H, W), in the threat model's ball and in [0, 1].
        """

    def candidates(self, target: AttackTarget, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return every example that the attack offers per image, by name, each (B, channels, H, W)."""
        return {self.name: self(target, images, labels)}


class BestPoint:
    """The point of largest loss seen so far, per image. A NaN loss never wins, not even against -infinity.

    Args:
        images: (B, channels, H, W), returned for images that no offer improved.
    """

    def __init__(self, images: Tensor) -> None:
        # Written in place below: a caller's images, or an attack's current point, must not change with it.
        self.images = images.clone()
        # Minus infinity, so that any known loss wins, even that of an image the model gets right by far.
        self.loss = torch.full((len(images),), -torch.inf, device=images.device, dtype=images.dtype)

    def offer(self, images: Tensor, loss: Tensor) -> Tensor:
        """Take each image whose (B,) loss is larger than the best so far; return the (B,) mask of those."""
        # False where the loss is NaN.
        better = loss > self.loss
        self.images[better] = images[better]
        self.loss[better] = loss[better].to(self.loss.dtype)
        return better


class Queue:
    """The images of a batch that an attack still works on; of a random model, broken ones leave it.

    An image leaves when it was wrong in every sample of consecutive steps: two, or more where it takes more
    for `LEAVES_AFTER` samples. What is scored is its point of largest loss, on samples drawn afresh.

    Args:
        target: The model under attack.
        labels: What the loss takes of each image, (B,) or (B, 2).
        loss: The loss.
        eot_samples: K, samples of the model per gradient.
        recorder: Told of every gradient that is taken.
        leaves: Whether images may leave; where the model is deterministic, none does.
    """

    def __init__(
        self,
        target: AttackTarget,
        labels: Tensor,
        loss: Loss,
        eot_samples: int,
        recorder: GradientRecorder | None = None,
        *,
        leaves: bool = True,
    ) -> None:
        self._leaves = leaves and target.stochastic
        self._target, self._labels, self._loss, self._samples = target, labels, loss, eot_samples
        self._recorder, self._step = recorder, 0
        self._wrong = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
        self._known: LossGradient | None = None

    @property
    def rows(self) -> Tensor:
        """Rows of the batch that are still attacked."""
        needed = max(_STEPS, -(-LEAVES_AFTER // self._samples))
        return (self._wrong < needed).nonzero()[:, 0]

    def loss_and_gradient(self, images: Tensor, *, saturates: bool) -> LossGradient:
        """Return loss and gradient at (B, channels, H, W) images; where one has left, its last ones.

        `saturates` is what the recorder is told of the loss.
        """
        rows = self.rows
        answer = self._target.loss_and_gradient(images[rows], self._labels[rows], self._loss, self._samples)
        if self._recorder is not None:
            self._recorder.record(self._step, answer.gradient, answer, saturates=saturates)
        self._step += 1
        if self._leaves:
            self._wrong[rows] = torch.where(answer.correct <= 0, self._wrong[rows] + 1, 0)
        if self._known is not None and len(rows) < len(images):
            # Copies: an attack may hold on to what it was given a step earlier.
            answer = LossGradient(
                *(
                    getattr(self._known, each.name).index_copy(0, rows, getattr(answer, each.name))
                    for each in fields(LossGradient)
                )
            )
        self._known = answer
        return answer


def require_finite(images: Tensor, name: str) -> Tensor:
    """Return the images of an attack, detached.

    Raises:
        NumericsError: If a pixel is NaN or infinite, which would silently count as a failed attack.
    """
    if not bool(torch.isfinite(images).all()):
        raise NumericsError(f"attack '{name}' produced pixels that are not finite")
    return images.detach()
