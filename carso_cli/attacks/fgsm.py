"""The fast gradient sign method, FGSM.

Title: "Explaining and Harnessing Adversarial Examples" (Goodfellow, Shlens and Szegedy, 2015),
https://arxiv.org/abs/1412.6572; advertorch's implementation.
Distance: linf; under l2 the normalised gradient takes the place of its sign.
Published setting (Table 14): one step of size eps on cross-entropy, from the image itself.

    attack = FGSM(ThreatModel("linf", 8 / 255))
    perturbed = attack(classifier, images, labels)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from carso_cli.attacks.attack import Attack, require_finite
from carso_cli.attacks.library_model import LibraryModel
from carso_cli.attacks.target import AttackTarget, Model, as_target
from carso_cli.runtime.third_party import prepare


@dataclass(frozen=True, eq=False, kw_only=True)
class FGSM(Attack):
    """One step of the whole radius along the gradient of cross-entropy."""

    name: ClassVar[str] = "fgsm"

    def __call__(self, target: AttackTarget | Model, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `Attack`. Returns the step's end, good or bad."""
        prepare()
        from advertorch.attacks import GradientAttack, GradientSignAttack

        # The model hands over a direction of unit size, so each step has the length of the radius.
        step = GradientSignAttack if self.threat.norm == "linf" else GradientAttack
        model = LibraryModel(as_target(target), labels, self.recorder, direction=self.threat)
        perturbed = step(model, eps=self.threat.radii(images)).perturb(images, labels)
        # advertorch cuts to the pixel range; rounding may still leave the ball by a bit.
        return require_finite(self.threat.project(perturbed, images), self.name)
