"""Auto-PGD on the margin to each of several classes, one after the other (multi-targeted attack).

Title: "An Alternative Surrogate Loss for PGD-based Adversarial Testing" (Gowal et al., 2019),
https://arxiv.org/abs/1910.09338, with the steps of Auto-PGD (Croce and Hein, 2020).
Distance: linf, l2, with one radius per image if wanted.
Published setting: 9 targets. Loss: a target's score minus the label's. It does not saturate, and its
direction does not depend on the scale of the scores.

    attack = TargetedAPGD(ThreatModel("linf", 8 / 255), steps=50, eot_samples=4, targets=9, seed=0)
    perturbed = attack(target, images, labels)

Each target starts from the unperturbed image; an image that is wrong in every sample of a check leaves the
queue. On a random model every gradient is a mean over `eot_samples` samples, and the steps and the loss are
those of `expected_error`: first towards any class, then towards each of `targets - 1` classes. The point of a
later run is taken where clearly more samples are wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.attack import Attack, BestPoint, require_finite
from carso_cli.attacks.expected_error import raise_expected, smooth_error, width_of
from carso_cli.attacks.losses import margin
from carso_cli.attacks.target import AttackTarget

_CHECKS = 50
"""Samples of a random model that judge a point; where all are wrong the image leaves the queue."""
_Run = Callable[[Tensor, Tensor], Tensor]
"""From images and what the loss aims at to perturbed images."""
_Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From points and labels to the share of samples that are right, (B,), and the rank of each point, (B,)."""


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
        scores = torch.stack([target(images) for _ in range(samples)]).mean(dim=0)
        order = _other_classes(scores, labels)
        run, judge = (self._random if target.stochastic else self._deterministic)(target, scores)
        best = BestPoint(images)
        correct, rank = judge(images, labels)
        best.offer(images, rank)
        queue = (correct > 0).nonzero()[:, 0]
        ranks = range(min(self.targets, order.shape[1]))
        # A random model may be wrong in several ways at once, which no single target says.
        for aimed in [None, *ranks[: self.targets - 1]] if target.stochastic else ranks:
            if not len(queue):
                break
            aims = labels[queue]
            if aimed is not None:
                aims = torch.stack([aims, order[queue, aimed]], dim=1)
            found = run(images[queue], aims)
            correct, rank = judge(found, labels[queue])
            doubt = torch.zeros_like(best.loss)
            offered, losses = images.clone(), torch.full_like(best.loss, -torch.inf)
            offered[queue], losses[queue] = found, rank.to(losses.dtype)
            if target.stochastic and aimed is not None:
                # Of many points one would seem the best by chance: two standard errors of the difference.
                variance = correct * (1.0 - correct)
                doubt[queue] = 2.0 * (2.0 * variance / _CHECKS).sqrt().to(doubt.dtype)
            better = best.offer(offered, losses - doubt)
            best.loss[better] += doubt[better]
            queue = queue[correct > 0]
        return require_finite(best.images, self.name)

    def _deterministic(self, target: AttackTarget, scores: Tensor) -> tuple[_Run, _Judge]:
        """Return Auto-PGD on the margin, and the margin."""
        attack = APGD(self.threat, loss="targeted", steps=self.steps, seed=self.seed, recorder=self.recorder)

        def run(images: Tensor, aims: Tensor) -> Tensor:
            return attack.run_from(images, target, images, aims)[0]

        def judge(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            answer = target.expected_loss(points, labels, margin, 1)
            return answer.correct, answer.rank

        return run, judge

    def _random(self, target: AttackTarget, scores: Tensor) -> tuple[_Run, _Judge]:
        """Return ascent on the smooth error, and the share of wrong samples."""
        loss = smooth_error(width_of(scores))

        def run(images: Tensor, aims: Tensor) -> Tensor:
            return raise_expected(
                loss,
                target,
                images,
                aims,
                threat=self.threat,
                steps=self.steps,
                eot_samples=self.eot_samples,
                recorder=self.recorder,
            )

        def judge(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            answer = target.expected_loss(points, labels, loss, _CHECKS)
            # The loss only orders points at which as many samples are wrong.
            return answer.correct, torch.nan_to_num(answer.loss).clamp(-1, 1) / (4 * _CHECKS) - answer.correct

        return run, judge


def _other_classes(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the classes other than the label, (B, C - 1), by score, the highest first."""
    is_label = F.one_hot(labels, scores.shape[1]).bool()
    return scores.masked_fill(is_label, -torch.inf).argsort(dim=1, descending=True)[:, :-1]
