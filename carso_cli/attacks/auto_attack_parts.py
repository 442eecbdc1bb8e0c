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

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor

from carso_cli.attacks.attack import require_finite
from carso_cli.attacks.auto_attack_library import library_session, one_radius
from carso_cli.attacks.diagnostics import GradientRecorder
from carso_cli.attacks.target import AttackTarget
from carso_cli.attacks.threat import ThreatModel


@dataclass(frozen=True, eq=False)
class FAB:
    """FAB: the nearest point of another class, drawn back to the ball's surface where it lies outside.

    Args:
        threat: Norm, radius (or radii) and pixel range, which must be [0, 1].
        steps: Steps of each restart.
        restarts: Starts: the image itself, then random points.
        seed: Seed of those.
        recorder: Counts unusable gradients, here of single logits.
    """

    name: ClassVar[str] = "fab"
    threat: ThreatModel
    _: KW_ONLY
    steps: int
    restarts: int = 1
    seed: int = 0
    recorder: GradientRecorder | None = None

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `carso_cli.attacks.attack.Attack`.

        Raises:
            UsageError: If the target is random.
        """
        images = images.contiguous()
        with library_session(target, self.threat, images, self.name, self.seed, self.recorder) as session:
            found = session.fab(images, labels, steps=self.steps, restarts=self.restarts)
        return require_finite(found, self.name)


@dataclass(frozen=True, eq=False)
class LibraryAPGD:
    """APGD on cross-entropy (`ce`) or the difference of logits ratio (`dlr`).

    Args:
        threat: Norm, radius (or radii) and pixel range, which must be [0, 1].
        loss: `ce` or `dlr`.
        steps: Steps of each restart.
        restarts: Random starts.
        seed: Seed of those.
        recorder: Counts unusable gradients and keeps the library's warnings.
    """

    threat: ThreatModel
    _: KW_ONLY
    loss: str
    steps: int
    restarts: int = 1
    seed: int = 0
    recorder: GradientRecorder | None = None

    @property
    def name(self) -> str:
        """`apgd-ce` or `apgd-dlr`."""
        return f"apgd-{self.loss}"

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `carso_cli.attacks.attack.Attack`.

        Raises:
            UsageError: If the target is random, or has fewer than three classes under `dlr`.
        """
        images = images.contiguous()
        with library_session(target, self.threat, images, self.name, self.seed, self.recorder) as session:
            found = session.apgd(images, labels, loss=self.loss, steps=self.steps, restarts=self.restarts)
        return require_finite(found, self.name)


@dataclass(frozen=True, eq=False)
class Square:
    """Square: random search over square patches, black box.

    Args:
        threat: Norm, one radius for all images, and pixel range, which must be [0, 1].
        queries: Queries of each restart.
        restarts: Random starts.
        seed: Seed of the search.
        recorder: Keeps the library's warnings.
    """

    name: ClassVar[str] = "square"
    threat: ThreatModel
    _: KW_ONLY
    queries: int
    restarts: int = 1
    seed: int = 0
    recorder: GradientRecorder | None = None

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `carso_cli.attacks.attack.Attack`.

        Raises:
            UsageError: If the target is random, or each image has its own radius.
        """
        one_radius(self.threat, self.name)
        images = images.contiguous()
        with library_session(target, self.threat, images, self.name, self.seed, self.recorder) as session:
            found = session.square(images, labels, queries=self.queries, restarts=self.restarts)
        return require_finite(found, self.name)
