"""PGD with Expectation over Transformation, the attack for random purification.

Title: "Robust Evaluation of Diffusion-Based Adversarial Purification" (Lee and Kim, 2023),
https://arxiv.org/abs/2303.09051; EoT after Athalye et al. (2018), https://arxiv.org/abs/1802.00420.
Distance: linf, l2, with one radius per image if wanted.
Published setting (Table 14): 200 steps of 0.007, 20 draws, cross-entropy.
Shapes: images (B, channels, H, W) in [0, 1], labels (B,).

    attack = PGDEoT(ThreatModel("linf", 8 / 255), steps=200, draws=20, step_size=0.007, seed=0)
    perturbed = attack(DefenceTarget(defence, "exact", 4096, generator), images, labels)
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from carso_cli.attacks.attack import BestPoint, require_finite
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.target import AttackTarget
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.runtime.seed import generator


@dataclass(frozen=True, eq=False)
class PGDEoT:
    """Projected ascent along the gradient of the mean loss over fresh draws at every step.

    Args:
        threat: Norm and radius (or radii).
        steps: Number of steps, from 1.
        draws: K, draws per gradient.
        step_size: In the norm's units, pixels under linf.
        random_start: Start from a random point of the ball rather than from the image.
        restarts: Runs, each with its own start and draws; the point of largest mean loss is returned.
            Where nothing is random they would be the same, so one is made.
        seed: Seed of the starts.
        recorder: Counts unusable gradients.
    """

    threat: ThreatModel
    _: KW_ONLY
    steps: int
    draws: int
    step_size: float
    random_start: bool = False
    restarts: int = 1
    seed: int = 0
    recorder: GradientRecorder | None = None

    @property
    def name(self) -> str:
        """`pgd-eot`, or `pgd-eot-random-start`."""
        return "pgd-eot-random-start" if self.random_start else "pgd-eot"

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `carso_cli.attacks.attack.Attack`."""
        best = BestPoint(images)
        restarts = self.restarts if target.stochastic or self.random_start else 1
        for restart in range(restarts):
            start = images
            if self.random_start:
                start = self.threat.random_start(images, generator(self.seed, self.name, "start", restart))
            self._ascend(start, best, target, images, labels)
        return require_finite(best.images, self.name)

    def _ascend(
        self, start: Tensor, best: BestPoint, target: AttackTarget, images: Tensor, labels: Tensor
    ) -> None:
        current = start
        for step in range(self.steps):
            answer = target.loss_and_gradient(current, labels, cross_entropy, self.draws)
            if self.recorder is not None:
                self.recorder.record(step, answer.gradient, loss=answer.loss, saturated=answer.saturated)
            best.offer(current, answer.rank)
            moved = current + self.step_size * self.threat.ascent_direction(answer.gradient)
            current = self.threat.project(moved, images)
        best.offer(current, target.expected_loss(current, labels, cross_entropy, self.draws).rank)
