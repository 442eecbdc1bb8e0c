"""PGD with Expectation over Transformation, the attack for random purification.

Title: "Robust Evaluation of Diffusion-Based Adversarial Purification" (Lee and Kim, 2023),
https://arxiv.org/abs/2303.09051; EoT after Athalye et al. (2018), https://arxiv.org/abs/1802.00420.
Distance: linf, l2, with one radius per image if wanted.
Published setting (Table 14): 200 steps of 0.007, 20 EoT samples, cross-entropy.

    attack = PGDEoT(ThreatModel("linf", 8 / 255), steps=200, eot_samples=20, step_size=0.007, seed=0)
    perturbed = attack(DefenceTarget(defence, "exact", 4096, generator), images, labels)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from carso_cli.attacks.attack import Attack, BestPoint, require_finite
from carso_cli.attacks.losses import cross_entropy
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
    """

    steps: int
    eot_samples: int
    step_size: float
    random_start: bool = False
    restarts: int = 1
    keep_best: bool = True

    @property
    def name(self) -> str:
        """`pgd-eot`, `pgd-eot-random-start`, or `authors-pgd-eot` without the best point."""
        if not self.keep_best:
            return "authors-pgd-eot"
        return "pgd-eot-random-start" if self.random_start else "pgd-eot"

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `Attack`."""
        best = BestPoint(images)
        for restart in range(self.restarts if target.stochastic or self.random_start else 1):
            current = images
            if self.random_start:
                current = self.threat.random_start(images, generator(self.seed, self.name, "start", restart))
            # Every step draws K new samples: kept ones would be fooled by chance and not in expectation.
            for step in range(self.steps):
                answer = target.loss_and_gradient(current, labels, cross_entropy, self.eot_samples)
                if self.recorder is not None:
                    self.recorder.record(step, answer.gradient, answer)
                # Free, as the loss here is known; a fixed step may well overshoot its best point.
                best.offer(current, answer.rank)
                moved = current + self.step_size * self.threat.ascent_direction(answer.gradient)
                current = self.threat.project(moved, images)
            if not self.keep_best:
                return require_finite(current, self.name)
            # The last step's end has not been evaluated yet.
            last = target.expected_loss(current, labels, cross_entropy, self.eot_samples)
            best.offer(current, last.rank)
        return require_finite(best.images, self.name)
