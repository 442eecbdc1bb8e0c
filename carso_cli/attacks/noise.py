"""Baselines: no perturbation, and random noise of the attacker's size.

Distance: linf, l2. Published setting: none; noise shows what an unaimed perturbation of this size does,
which an attack must clearly beat.

    attack = RandomNoise(ThreatModel("linf", 8 / 255), seed=0)
    noisy = attack(target, images, labels)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from carso_cli.attacks.attack import Attack, require_finite
from carso_cli.attacks.target import AttackTarget
from carso_cli.runtime.seed import generator


@dataclass(frozen=True, eq=False, kw_only=True)
class NoPerturbation(Attack):
    """Returns the images: the result is clean accuracy."""

    name: ClassVar[str] = "none"

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Return the images."""
        # A copy, as from every attack: a caller may write to the examples and keep the images.
        return images.detach().clone()


@dataclass(frozen=True, eq=False, kw_only=True)
class RandomNoise(Attack):
    """Noise uniform on the ball, cut to the pixel range; the same on every call."""

    name: ClassVar[str] = "noise"

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images without asking the target anything."""
        return require_finite(self.threat.random_start(images, generator(self.seed, self.name)), self.name)
