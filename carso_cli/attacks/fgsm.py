"""The fast gradient sign method.

Title: "Explaining and Harnessing Adversarial Examples" (Goodfellow, Shlens and Szegedy, 2015),
https://arxiv.org/abs/1412.6572; advertorch's implementation.
Distance: linf; under l2 the normalised gradient takes the place of its sign.
Published setting (Table 14): one step of size eps on cross-entropy, from the image itself.
Shapes: images (B, channels, H, W) in [0, 1], labels (B,).

    attack = FGSM(ThreatModel("linf", 8 / 255))
    perturbed = attack(classifier, images, labels)
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor

from carso_cli.attacks.advertorch_steps import gradient_step
from carso_cli.attacks.attack import require_finite
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.library_model import LibraryModel
from carso_cli.attacks.target import AttackTarget, Model, as_target
from carso_cli.attacks.threat_model import ThreatModel


@dataclass(frozen=True, eq=False)
class FGSM:
    """One step of the whole radius.

    Args:
        threat: Norm and radius (or radii).
        recorder: Counts unusable gradients.
    """

    name: ClassVar[str] = "fgsm"
    threat: ThreatModel
    _: KW_ONLY
    recorder: GradientRecorder | None = None

    def __call__(self, target: AttackTarget | Model, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `carso_cli.attacks.attack.Attack`. Returns the step's end, good or bad."""
        model = LibraryModel(as_target(target), labels, self.recorder)
        return require_finite(gradient_step(model, self.threat, images, labels), self.name)
