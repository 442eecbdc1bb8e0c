"""PGD with Expectation over Transformation, the attack for random purification.

Title: "Robust Evaluation of Diffusion-Based Adversarial Purification" (Lee and Kim, 2023),
https://arxiv.org/abs/2303.09051; EoT after Athalye et al. (2018), https://arxiv.org/abs/1802.00420.
Distance: linf, l2, with one radius per image if wanted.
Published setting (Table 14): 200 steps of 0.007, 20 EoT samples, cross-entropy. With `margin` it is an
attack of our own: a loss that does not saturate, steps that shrink, a start from transferred examples.

    attack = PGDEoT(ThreatModel("linf", 8 / 255), steps=200, eot_samples=20, step_size=0.007, seed=0)
    perturbed = attack(DefenceTarget(defence, "exact", 4096, generator), images, labels)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from carso_cli.attacks.attack import Attack, BestPoint, Queue, require_finite
from carso_cli.attacks.losses import Loss, cross_entropy, margin
from carso_cli.attacks.target import AttackTarget
from carso_cli.runtime.seed import generator


@dataclass(frozen=True, eq=False, kw_only=True)
class PGDEoT(Attack):
    """Projected ascent along the gradient of the mean loss over new samples of the model at every step.

    Args:
        steps: Number of steps, from 1.
        eot_samples: K, samples of the model per gradient.
        step_size: In the norm's units, pixels under linf.
        random_start: Start from a random point of the ball rather than from the image.
        restarts: Runs, each with its own start and samples; the point of largest mean loss is returned.
            Where nothing is random they would be the same, so one is made.
        keep_best: Return the best point; otherwise the last one, as the method's authors do.
        margin: Raise the margin instead of cross-entropy, by steps that fall from twice `step_size` to zero.
        starts: Attacks whose examples are one start more: of each image the one of largest mean loss.
    """

    steps: int
    eot_samples: int
    step_size: float
    random_start: bool = False
    restarts: int = 1
    keep_best: bool = True
    margin: bool = False
    starts: tuple[Attack, ...] = ()

    @property
    def name(self) -> str:
        """`pgd-eot`, `-random-start`, `-margin`; `authors-pgd-eot` where the last point is returned."""
        if not self.keep_best:
            return "authors-pgd-eot"
        if self.margin:
            return "pgd-eot-margin"
        return "pgd-eot-random-start" if self.random_start else "pgd-eot"

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `Attack`."""
        best = BestPoint(images)
        loss: Loss = margin if self.margin else cross_entropy
        for current in self._starts(target, images, labels, loss):
            # The authors' procedure, which returns the last point, takes every step.
            queue = Queue(target, labels, loss, self.eot_samples, self.recorder, leaves=self.keep_best)
            # Every step draws K new samples: kept ones would be fooled by chance and not in expectation.
            for step in range(self.steps):
                if not len(queue.rows):
                    break
                answer = queue.loss_and_gradient(current, saturates=not self.margin)
                # Free, as the loss here is known; a fixed step may well overshoot its best point.
                best.offer(current, answer.rank)
                size = self.step_size * (2.0 * (1.0 - step / self.steps) if self.margin else 1.0)
                moved = current + size * self.threat.ascent_direction(answer.gradient)
                current = self.threat.project(moved, images)
            if not self.keep_best:
                return require_finite(current, self.name)
            # The last step's end has not been evaluated yet.
            last = target.expected_loss(current, labels, loss, self.eot_samples)
            best.offer(current, last.rank)
        return require_finite(best.images, self.name)

    def _starts(self, target: AttackTarget, images: Tensor, labels: Tensor, loss: Loss) -> Iterator[Tensor]:
        """Yield the start of each run, (B, channels, H, W)."""
        for restart in range(self.restarts if target.stochastic or self.random_start else 1):
            source = generator(self.seed, self.name, "start", restart)
            yield self.threat.random_start(images, source) if self.random_start else images
        if self.starts:
            best = BestPoint(images)
            for attack in self.starts:
                found = attack(target, images, labels)
                best.offer(found, target.expected_loss(found, labels, loss, self.eot_samples).rank)
            yield best.images
