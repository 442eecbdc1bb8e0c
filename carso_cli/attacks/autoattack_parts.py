"""AutoAttack's parts as attacks of their own, on deterministic models.

Titles and links: APGD, https://arxiv.org/abs/2003.01690; "Minimally Distorted Adversarial Examples with a
Fast Adaptive Boundary Attack" (Croce and Hein, 2020), https://arxiv.org/abs/1907.02044; "Square Attack: a
query-efficient black-box adversarial attack via random search" (Andriushchenko et al., 2020),
https://arxiv.org/abs/1912.00049.
Distance: linf, l2; APGD and FAB take one radius per image.
Published setting: 100 steps, 5 restarts; Square 5000 queries, 1 restart.
Shapes: images (B, channels, H, W) in [0, 1], labels (B,).

    attack = FAB(ThreatModel("l2", 0.5), steps=100, restarts=5)
    perturbed = attack(ClassifierTarget(classifier), images, labels)

`apgd` and `square_eot` hold our own versions, for random models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from carso_cli.attacks.autoattack_library import LibraryAttack, LibrarySession, one_radius


@dataclass(frozen=True, eq=False, kw_only=True)
class FAB(LibraryAttack):
    """FAB: the nearest point of another class, drawn back to the ball's surface where it lies outside.

    Args:
        steps: Steps of each restart.
        restarts: Starts: the image itself, then random points.
    """

    name: ClassVar[str] = "fab"
    steps: int
    restarts: int = 1

    def perturb(self, session: LibrarySession, images: Tensor, labels: Tensor) -> Tensor:
        """Run it; see `LibraryAttack.perturb`."""
        return session.fab(images, labels, steps=self.steps, restarts=self.restarts)


@dataclass(frozen=True, eq=False, kw_only=True)
class LibraryAPGD(LibraryAttack):
    """APGD on cross-entropy (`ce`) or the difference of logits ratio (`dlr`).

    Args:
        loss: `ce` or `dlr`.
        steps: Steps of each restart.
        restarts: Random starts.
    """

    loss: str
    steps: int
    restarts: int = 1

    @property
    def name(self) -> str:
        """`apgd-ce` or `apgd-dlr`."""
        return f"apgd-{self.loss}"

    def perturb(self, session: LibrarySession, images: Tensor, labels: Tensor) -> Tensor:
        """Run it; see `LibraryAttack.perturb`.

        Raises:
            UsageError: If the target has fewer than three classes under `dlr`.
        """
        return session.apgd(images, labels, loss=self.loss, steps=self.steps, restarts=self.restarts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Square(LibraryAttack):
    """Square: random search over square patches, black box.

    Args:
        queries: Queries of each restart.
        restarts: Random starts.
    """

    name: ClassVar[str] = "square"
    queries: int
    restarts: int = 1

    def perturb(self, session: LibrarySession, images: Tensor, labels: Tensor) -> Tensor:
        """Run it; see `LibraryAttack.perturb`.

        Raises:
            UsageError: If each image has its own radius.
        """
        one_radius(self.threat, self.name)
        return session.square(images, labels, queries=self.queries, restarts=self.restarts)
