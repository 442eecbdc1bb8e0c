"""Projected gradient descent.

Title: "Towards Deep Learning Models Resistant to Adversarial Attacks" (Madry et al., 2018),
https://arxiv.org/abs/1706.06083; advertorch's implementation.
Distance: linf, l2.
Published setting (Table 14): 40 steps of 0.01 on cross-entropy, eps 4/255 and 8/255.
Shapes: images (B, channels, H, W) in [0, 1], labels (B,).

    attack = PGD(ThreatModel("linf", 8 / 255), steps=40, step_size=0.01, random_start=True, seed=0)
    perturbed = attack(classifier, images, labels)

A random defence is attacked through one draw per step; `pgd_eot` averages over several.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from carso_cli.attacks.advertorch_steps import projected_descent, random_change
from carso_cli.attacks.attack import BestPoint, require_finite
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.library_model import LibraryModel
from carso_cli.attacks.target import AttackTarget, Model, as_target
from carso_cli.attacks.threat_model import ThreatModel


@dataclass(frozen=True, eq=False)
class PGD:
    """Projected gradient ascent on cross-entropy.

    Args:
        threat: Norm and radius (or radii).
        steps: Number of steps, from 1.
        step_size: In the norm's units (pixels under linf); one for all images, or (B,).
        random_start: Start from a random point of the ball rather than from the image.
        seed: Seed of that point; the same on every call.
        keep_best: Return the point of largest loss on the way, at the price of one more evaluation;
            otherwise the last point, as training uses.
        recorder: Counts unusable gradients.
    """

    name: ClassVar[str] = "pgd"
    threat: ThreatModel
    _: KW_ONLY
    steps: int
    step_size: float | Tensor
    random_start: bool = True
    seed: int = 0
    keep_best: bool = False
    recorder: GradientRecorder | None = None

    def __call__(self, target: AttackTarget | Model, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `carso_cli.attacks.attack.Attack`."""
        return self.run_from(self.start(images), target, images, labels)

    def start(self, images: Tensor) -> Tensor:
        """Return the change that each of (B, channels, H, W) images starts with."""
        if not self.random_start:
            return torch.zeros_like(images)
        return random_change(self.threat, images, self.seed)

    def run_from(self, start: Tensor, target: AttackTarget | Model, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images from a given start: the change of each, (B, channels, H, W)."""
        best = BestPoint(images) if self.keep_best else None
        model = LibraryModel(as_target(target), labels, self.recorder, best)
        perturbed = projected_descent(
            model,
            self.threat,
            images,
            labels,
            steps=self.steps,
            step_size=self.step_size,
            start=start,
        )
        if best is not None:
            # The library never asks about its last point.
            model(perturbed)
            perturbed = self.threat.project(best.images, images)
        return require_finite(perturbed, self.name)
