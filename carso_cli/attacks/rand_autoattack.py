"""AutoAttack's version for random defences: APGD-CE and APGD-DLR with Expectation over Transformation.

Title: "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks"
(Croce and Hein, 2020), `rand` version, https://arxiv.org/abs/2003.01690.
Distance: linf, l2, with one radius per image if wanted.
Published setting (Section 5.1): 100 steps, 20 draws, 1 restart of each loss.
Shapes: images (B, channels, H, W) in [0, 1], labels (B,).

    attack = RandAutoAttack(ThreatModel("linf", 8 / 255), steps=100, draws=20)
    examples = attack.candidates(target, images, labels)   # {"apgd-ce": …, "apgd-dlr": …}

The library drops an image after one wrong draw and returns the rest unperturbed. Here both attacks run on
every image, and their examples are kept to be scored on fresh draws.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.attack import BestPoint
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.losses import margin
from carso_cli.attacks.target import AttackTarget
from carso_cli.attacks.threat_model import ThreatModel


@dataclass(frozen=True, eq=False)
class RandAutoAttack:
    """APGD on both losses; with two classes, where DLR is undefined, on cross-entropy alone.

    Args:
        threat: Norm and radius (or radii).
        steps: Steps of each restart.
        draws: K, draws per gradient.
        restarts: Random starts of each loss.
        seed: Seed of the starts.
        recorder: Counts unusable gradients of both.
    """

    name: ClassVar[str] = "rand-aa"
    threat: ThreatModel
    _: KW_ONLY
    steps: int
    draws: int
    restarts: int = 1
    seed: int = 0
    recorder: GradientRecorder | None = None

    def candidates(self, target: AttackTarget, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the examples of both attacks by name, each (B, channels, H, W)."""
        losses = ("ce", "dlr") if target(images[:1]).shape[1] >= 3 else ("ce",)
        parts = [
            APGD(
                self.threat,
                loss=loss,
                steps=self.steps,
                draws=self.draws,
                restarts=self.restarts,
                seed=self.seed,
                recorder=self.recorder,
            )
            for loss in losses
        ]
        return {part.name: part(target, images, labels) for part in parts}

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Return, for each image, the example of larger mean margin over K draws."""
        examples = list(self.candidates(target, images, labels).values())
        best = BestPoint(examples[0])
        for example in examples:
            best.offer(example, target.expected_loss(example, labels, margin, self.draws).rank)
        return best.images
