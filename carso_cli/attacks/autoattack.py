"""AutoAttack's standard ensemble, for deterministic models.

Title: "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks"
(Croce and Hein, 2020), https://arxiv.org/abs/2003.01690.
Distance: linf, l2, one radius for all images.
Published setting (standard version): APGD on cross-entropy, targeted APGD on DLR, targeted FAB, 100 steps
each, up to 9 target classes; Square with 5000 queries; each on the images that still stand.
Shapes: images (B, channels, H, W) in [0, 1], labels (B,).

    attack = AutoAttack(ThreatModel("linf", 8 / 255), steps=100, queries=5000)
    perturbed = attack(ClassifierTarget(classifier), images, labels)

Where an image is not fooled the library returns it unchanged; here it comes back as APGD's best-loss point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from carso_cli.attacks.autoattack_library import LibraryAttack, LibrarySession, one_radius


@dataclass(frozen=True, eq=False, kw_only=True)
class AutoAttack(LibraryAttack):
    """The standard ensemble: each attack on the images that still stand.

    An image that the model gets wrong unperturbed is returned as it is. With fewer than four classes the
    targeted losses are undefined: untargeted APGD-DLR (from three classes) and FAB take their place.

    Args:
        steps: Steps of APGD and FAB.
        queries: Queries of Square.
    """

    name: ClassVar[str] = "aa"
    steps: int
    queries: int

    def perturb(self, session: LibrarySession, images: Tensor, labels: Tensor) -> Tensor:
        """Run the parts; see `LibraryAttack.perturb`.

        Raises:
            UsageError: If each image has its own radius.
        """
        one_radius(self.threat, self.name)
        result = images.clone()
        logits = session.model(result)
        standing = logits.argmax(dim=1) == labels
        for part in ("apgd-ce", *_later_parts(logits.shape[1])):
            chosen = standing.nonzero()[:, 0]
            if not len(chosen):
                break
            found = self._run(part, session, images[chosen], labels[chosen])
            fooled = session.model(found).argmax(dim=1) != labels[chosen]
            # The first attack's best-loss points stay where nothing fools the model.
            kept = torch.ones_like(fooled) if part == "apgd-ce" else fooled
            result[chosen[kept]] = found[kept]
            standing[chosen[fooled]] = False
        return self.threat.project(result, images)

    def _run(self, part: str, session: LibrarySession, images: Tensor, labels: Tensor) -> Tensor:
        if part == "apgd-targeted":
            return session.targeted_apgd(images, labels, steps=self.steps)
        if part == "fab-targeted":
            return session.targeted_fab(images, labels, steps=self.steps)
        if part == "fab":
            return session.fab(images, labels, steps=self.steps, restarts=1)
        if part == "square":
            return session.square(images, labels, queries=self.queries, restarts=1)
        return session.apgd(images, labels, loss=part.removeprefix("apgd-"), steps=self.steps, restarts=1)


def _later_parts(classes: int) -> tuple[str, ...]:
    if classes >= 4:
        return ("apgd-targeted", "fab-targeted", "square")
    return (*(("apgd-dlr",) if classes == 3 else ()), "fab", "square")
