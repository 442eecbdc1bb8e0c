"""Baselines: no perturbation, and random noise of the attacker's size.

Distance: linf, l2. Published setting: none; noise says what a perturbation of this size does when nobody
aims it, which an attack must clearly beat.
Shapes: images (B, channels, H, W) in [0, 1], labels (B,) unused.

    attack = RandomNoise(ThreatModel("linf", 8 / 255), seed=0)
    noisy = attack(target, images, labels)
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor

from carso_cli.attacks.attack import require_finite
from carso_cli.attacks.target import AttackTarget
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.runtime.seed import generator


class NoPerturbation:
    """Returns the images: the result is clean accuracy."""

    name: ClassVar[str] = "none"

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Return the images."""
        return images.detach().clone()


@dataclass(frozen=True, eq=False)
class RandomNoise:
    """Noise uniform on the ball.

    Args:
        threat: Norm and radius (or radii); noise is cut to the pixel range.
        seed: Seed of the noise; the same on every call.
    """

    name: ClassVar[str] = "noise"
    threat: ThreatModel
    _: KW_ONLY
    seed: int = 0

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images without asking the target anything."""
        return require_finite(self.threat.random_start(images, generator(self.seed, self.name)), self.name)
