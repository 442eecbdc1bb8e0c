"""AutoAttack's version for random defences: APGD-CE and APGD-DLR with Expectation over Transformation.

Title: "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks"
(Croce and Hein, 2020), `rand` version, https://arxiv.org/abs/2003.01690.
Distance: linf, l2, with one radius per image if wanted.
Published setting (Section 5.1): 100 steps, 20 EoT samples, 1 restart of each loss.

    attack = RandAutoAttack(ThreatModel("linf", 8 / 255), steps=100, eot_samples=20)
    examples = attack.candidates(target, images, labels)   # {"apgd-ce": …, "apgd-dlr": …}

The library drops an image after one wrong answer and returns the rest unperturbed. Here both attacks run on
every image, and their examples are kept to be scored on new samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.attack import Attack, BestPoint
from carso_cli.attacks.losses import margin
from carso_cli.attacks.target import AttackTarget


@dataclass(frozen=True, eq=False, kw_only=True)
class RandAutoAttack(Attack):
    """APGD on both losses; with two classes, where DLR is undefined, on cross-entropy alone.

    Args:
        steps: Steps of each restart.
        eot_samples: K, samples of the model per gradient.
        restarts: Random starts of each loss.
    """

    name: ClassVar[str] = "rand-aa"
    steps: int
    eot_samples: int
    restarts: int = 1

    def candidates(self, target: AttackTarget, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the examples of both attacks by name, each (B, channels, H, W)."""
        examples = {}
        # One forward pass of one image is the only way to learn C from a target.
        for loss in ("ce", "dlr") if target(images[:1]).shape[1] >= 3 else ("ce",):
            attack = APGD(
                self.threat,
                loss=loss,
                steps=self.steps,
                eot_samples=self.eot_samples,
                restarts=self.restarts,
                seed=self.seed,
                recorder=self.recorder,
            )
            if self.recorder is not None:
                # The losses are on two scales, and DLR is constant where cross-entropy is not.
                self.recorder.part = attack.name
            examples[attack.name] = attack(target, images, labels)
        return examples

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Return, for each image, the example of larger mean margin over K samples."""
        examples = list(self.candidates(target, images, labels).values())
        best = BestPoint(examples[0])
        for example in examples:
            # By margin: the losses that the two attacks raised are not on one scale.
            best.offer(example, target.expected_loss(example, labels, margin, self.eot_samples).rank)
        return best.images
