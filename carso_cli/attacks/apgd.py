"""Auto-PGD, with Expectation over Transformation.

Title: "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks"
(Croce and Hein, 2020), Section 3 and Algorithm 1, https://arxiv.org/abs/2003.01690.
Distance: linf, l2, with one radius per image if wanted.
Published setting: 100 steps, first step size 2 eps, momentum 0.75; 20 EoT samples in its version for random
defences. Loss: cross-entropy, or the difference of logits ratio.

    attack = APGD(ThreatModel("linf", 8 / 255), loss="ce", steps=100, eot_samples=20, restarts=1, seed=0)
    perturbed = attack(target, images, labels)

On a deterministic model it takes exactly the steps of the authors' implementation. On a random one that
implementation compares losses of a single sample; here they are means over all samples of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carso_cli.attacks.attack import Attack, BestPoint, Queue, require_finite
from carso_cli.attacks.losses import Loss, cross_entropy, dlr, targeted_margin
from carso_cli.attacks.target import AttackTarget
from carso_cli.attacks.threat_model import per_image
from carso_cli.runtime.seed import generator

LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "targeted": targeted_margin}

_MOMENTUM = 0.75
# Share of the steps since the last checkpoint that must have raised the loss, rho in the article.
_RISING_SHARE = 0.75


@dataclass(frozen=True, eq=False, kw_only=True)
class APGD(Attack):
    """Gradient ascent with momentum; where it stalls, its step is halved and it restarts from its best point.

    Args:
        loss: `ce`, `dlr`, or `targeted` for `run_from` alone.
        steps: Steps of each restart, from 1; one gradient more is taken at the start.
        eot_samples: K, samples of the model per gradient; a deterministic target needs 1.
        restarts: Random starts; the point of largest loss over all is returned.
    """

    loss: str
    steps: int
    eot_samples: int = 1
    restarts: int = 1

    @property
    def name(self) -> str:
        """`apgd-ce` or `apgd-dlr`."""
        return f"apgd-{self.loss}"

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `Attack`."""
        starts = [
            self.threat.random_start(images, generator(self.seed, self.name, "start", restart))
            for restart in range(self.restarts)
        ]
        best = BestPoint(starts[0])
        # The best of several noisy means looks better than it is; only new draws may score the winner.
        for start in starts:
            best.offer(*self.run_from(start, target, images, labels))
        return require_finite(best.images, self.name)

    def run_from(
        self, start: Tensor, target: AttackTarget, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run once from `start`, (B, channels, H, W) in the ball; labels are what the loss takes.

        Returns:
            The points of largest loss, (B, channels, H, W), and their losses, (B,).
        """
        best, queue = (
            BestPoint(start),
            Queue(target, labels, LOSSES[self.loss], self.eot_samples, self.recorder),
        )
        schedule: _StepSchedule | None = None
        current = previous = start
        gradient = best_gradient = torch.zeros_like(start)
        # Turn 0 takes no step: it measures loss and gradient at the start, as the schedule needs them.
        for step in range(self.steps + 1):
            if schedule is not None:
                step_size = per_image(schedule.step_size, current)
                ahead = current + step_size * self.threat.ascent_direction(gradient)
                ahead, drift = self.threat.project(ahead, images), current - previous
                # Algorithm 1: the first step has no earlier move to carry on with.
                momentum = _MOMENTUM if step > 1 else 1.0
                # The blend of two points of the ball may lie outside it, so it is projected a second time.
                blended = current + momentum * (ahead - current) + (1.0 - momentum) * drift
                previous, current = current, self.threat.project(blended, images)
            if not len(queue.rows):
                break
            answer = queue.loss_and_gradient(current, saturates=self.loss == "ce")
            better = per_image(best.offer(current, answer.rank), current)
            best_gradient = torch.where(better, answer.gradient, best_gradient)
            # The raw gradient is kept: the threat model turns it into a direction, and reads NaN as zero.
            gradient = answer.gradient
            if schedule is None:
                schedule = _StepSchedule(self.steps, 2.0 * self.threat.radii(images), best.loss)
            else:
                stalled = per_image(schedule.advance(answer.loss, best.loss), current)
                # `previous` stays, as in the authors' code: the next drift is the way back to the best point.
                current = torch.where(stalled, best.images, current)
                gradient = torch.where(stalled, best_gradient, gradient)
        return best.images, best.loss


class _StepSchedule:
    """The step size of each image, halved by conditions 1 and 2 of the article's Section 3.2."""

    def __init__(self, steps: int, step_size: Tensor, loss: Tensor) -> None:
        self.step_size = step_size.clone()
        # Section 3.2: the first period is 22% of the steps; each is 3% shorter than the last, down to 6%.
        self._shrink = max(int(0.03 * steps), 1)
        self._shortest = max(int(0.06 * steps), 1)
        self._period = max(int(0.22 * steps), 1)
        self._since = 0
        # As in the authors' code: the first step counts as rising when its loss is positive, and nothing
        # counts as unimproved before the second checkpoint.
        self._last_loss = torch.zeros_like(loss)
        self._rises = torch.zeros_like(loss)
        self._best_at_checkpoint = loss.clone()
        self._halved_at_checkpoint = torch.ones_like(loss, dtype=torch.bool)

    def advance(self, loss: Tensor, best_loss: Tensor) -> Tensor:
        """Note the (B,) loss after a step; return the mask of images that stall, whose step is now halved."""
        self._rises += (loss > self._last_loss).to(loss.dtype)
        self._last_loss = loss
        self._since += 1
        # Only a checkpoint may halve: a share of rises over a step or two would be noise.
        if self._since < self._period:
            return torch.zeros_like(self._halved_at_checkpoint)
        # Condition 2: the step was not halved last time, and the best loss has not moved since.
        unimproved = ~self._halved_at_checkpoint & (self._best_at_checkpoint >= best_loss)
        # Condition 1 counts losses that rose from one step to the next, not rises above the best.
        stalled = (self._rises <= _RISING_SHARE * self._since) | unimproved
        self.step_size[stalled] /= 2.0
        self._halved_at_checkpoint = stalled
        # A copy, since `BestPoint` writes its losses in place.
        self._best_at_checkpoint = best_loss.clone()
        self._rises.zero_()
        self._since = 0
        self._period = max(self._period - self._shrink, self._shortest)
        return stalled
