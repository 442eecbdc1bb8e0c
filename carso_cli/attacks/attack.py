"""What an attack is: an object built once with its budget, then called on batches.

    attack = PGDEoT(threat, steps=200, draws=20, step_size=0.007, seed=0)
    perturbed = attack(target, images, labels)

Every attack returns a point of the ball and of the pixel range for every image: its best-loss point, also
where the model is not fooled, since only fresh draws of a random defence can say whether it is.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from carso_cli.attacks.target import AttackTarget
from carso_cli.errors import NumericsError


class Attack(Protocol):
    """Makes adversarial examples; the same call twice gives the same images from targets seeded alike."""

    @property
    def name(self) -> str:
        """Name on the command line and in results."""

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images.

        Args:
            target: The model under attack.
            images: (B, channels, H, W) in [0, 1].
            labels: (B,) int64, the true classes.

        Returns:
            (B, channels, H, W), in the threat model's ball and in [0, 1].
        """


@runtime_checkable
class MultipleAttack(Protocol):
    """An attack that offers several examples per image, to be scored one by one."""

    def candidates(self, target: AttackTarget, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the examples by name, each (B, channels, H, W)."""


def candidates(attack: Attack, target: AttackTarget, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return every example that an attack offers, by name: one, or one per part of a `MultipleAttack`."""
    if isinstance(attack, MultipleAttack):
        return attack.candidates(target, images, labels)
    return {attack.name: attack(target, images, labels)}


class BestPoint:
    """The point of largest loss seen so far, per image. A NaN loss never wins, whatever it is up against.

    Args:
        images: (B, channels, H, W), returned for images that no offer improved.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.loss = torch.full((len(images),), -torch.inf, device=images.device, dtype=images.dtype)

    def offer(self, images: Tensor, loss: Tensor) -> Tensor:
        """Take each image whose (B,) loss is larger than the best so far; return the (B,) mask of those."""
        better = loss > self.loss
        self.images[better] = images[better]
        self.loss[better] = loss[better].to(self.loss.dtype)
        return better


def require_finite(images: Tensor, name: str) -> Tensor:
    """Return the images of an attack, detached.

    Raises:
        NumericsError: If a pixel is NaN or infinite, which would count as a failed attack in silence.
    """
    if not bool(torch.isfinite(images).all()):
        raise NumericsError(f"attack '{name}' produced pixels that are not finite")
    return images.detach()
