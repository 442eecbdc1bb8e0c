"""Auto-PGD on the margin to each of several classes, one after the other (multi-targeted attack).

Title: "An Alternative Surrogate Loss for PGD-based Adversarial Testing" (Gowal et al., 2019),
https://arxiv.org/abs/1910.09338, with the steps of Auto-PGD (Croce and Hein, 2020).
Distance: linf, l2, with one radius per image if wanted.
Published setting: 9 targets. Loss: a target's score minus the label's. It does not saturate, and its
direction does not depend on the scale of the scores.

    attack = TargetedAPGD(ThreatModel("linf", 8 / 255), steps=50, eot_samples=4, targets=9, seed=0)
    perturbed = attack(target, images, labels)

On a random model every gradient is a mean over `eot_samples` samples. Each target starts from the unperturbed
image; an image that is wrong in every sample of a check leaves the queue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.attack import Attack, BestPoint, require_finite
from carso_cli.attacks.losses import margin
from carso_cli.attacks.target import AttackTarget

_CHECKS = 10
"""Samples of a random model that must all be wrong before an image leaves the queue."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TargetedAPGD(Attack):
    """Auto-PGD towards each of the classes that score highest beside the label.

    Args:
        steps: Steps towards each target, from 1.
        eot_samples: K, samples of the model per gradient; a deterministic target needs 1.
        targets: Classes to aim at; all others where there are fewer.
    """

    steps: int
    eot_samples: int = 1
    targets: int = 9

    name = "apgd-targeted"

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `Attack`."""
        samples = self.eot_samples if target.stochastic else 1
        checks = _CHECKS if target.stochastic else 1
        attack = APGD(
            self.threat,
            loss="targeted",
            steps=self.steps,
            eot_samples=samples,
            seed=self.seed,
            recorder=self.recorder,
        )
        best = BestPoint(images)
        first = target.expected_loss(images, labels, margin, checks)
        best.offer(images, first.rank)
        queue = (first.correct > 0).nonzero()[:, 0]
        order = _other_classes(target, images, labels, samples)
        for rank in range(min(self.targets, order.shape[1])):
            if not len(queue):
                break
            aims = torch.stack([labels[queue], order[queue, rank]], dim=1)
            found, _ = attack.run_from(images[queue], target, images[queue], aims)
            answer = target.expected_loss(found, labels[queue], margin, checks)
            offered, losses = images.clone(), torch.full_like(best.loss, -torch.inf)
            offered[queue], losses[queue] = found, answer.rank.to(losses.dtype)
            best.offer(offered, losses)
            queue = queue[answer.correct > 0]
        return require_finite(best.images, self.name)


def _other_classes(target: AttackTarget, images: Tensor, labels: Tensor, samples: int) -> Tensor:
    """Return the classes other than the label, (B, C - 1), by mean score, the highest first."""
    scores = torch.stack([target(images) for _ in range(samples)]).mean(dim=0)
    is_label = F.one_hot(labels, scores.shape[1]).bool()
    return scores.masked_fill(is_label, -torch.inf).argsort(dim=1, descending=True)[:, :-1]
