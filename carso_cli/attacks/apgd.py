"""Auto-PGD, with Expectation over Transformation.

Title: "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks"
(Croce and Hein, 2020), Section 3 and Algorithm 1, https://arxiv.org/abs/2003.01690.
Distance: linf, l2, with one radius per image if wanted.
Published setting: 100 steps, first step size 2 eps, momentum 0.75; 20 draws in its version for random
defences. Loss: cross-entropy, or the difference of logits ratio.
Shapes: images (B, channels, H, W) in [0, 1], labels (B,).

    attack = APGD(ThreatModel("linf", 8 / 255), loss="ce", steps=100, draws=20, restarts=1, seed=0)
    perturbed = attack(target, images, labels)

On a deterministic model it takes the very steps of the authors' implementation. On a random one that
implementation compares losses of a single draw; here they are means over all draws of the step.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from carso_cli.attacks.attack import BestPoint, require_finite
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.losses import Loss, cross_entropy, dlr
from carso_cli.attacks.target import AttackTarget, LossGradient
from carso_cli.attacks.threat_model import ThreatModel, per_image
from carso_cli.runtime.seed import generator

LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr}

_MOMENTUM = 0.75
_RISING_SHARE = 0.75
"""Steps since the last checkpoint that must have raised the loss, rho in the article."""


@dataclass(frozen=True, eq=False)
class APGD:
    """Gradient ascent with momentum that halves its step, and goes back to its best point, when it stalls.

    Args:
        threat: Norm and radius (or radii).
        loss: `ce` or `dlr`.
        steps: Steps of each restart, from 1; one gradient more is taken at the start.
        draws: K, draws per gradient; a deterministic target needs 1.
        restarts: Random starts; the point of largest loss over all is returned.
        seed: Seed of the starts.
        recorder: Counts unusable gradients.
    """

    threat: ThreatModel
    _: KW_ONLY
    loss: str
    steps: int
    draws: int = 1
    restarts: int = 1
    seed: int = 0
    recorder: GradientRecorder | None = None

    @property
    def name(self) -> str:
        """`apgd-ce` or `apgd-dlr`."""
        return f"apgd-{self.loss}"

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `carso_cli.attacks.attack.Attack`."""
        starts = [
            self.threat.random_start(images, generator(self.seed, self.name, "start", restart))
            for restart in range(self.restarts)
        ]
        best = BestPoint(starts[0])
        for start in starts:
            best.offer(*self.run_from(start, target, images, labels))
        return require_finite(best.images, self.name)

    def run_from(
        self, start: Tensor, target: AttackTarget, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run once from `start`, (B, channels, H, W) in the ball.

        Returns:
            The points of largest loss, (B, channels, H, W), and their losses, (B,).
        """
        best = BestPoint(start)
        state = _State(current=start.clone(), previous=start.clone(), best_gradient=torch.zeros_like(start))
        gradient = self._look(0, state, best, target, labels).gradient
        schedule = _StepSchedule(self.steps, 2.0 * self.threat.radii(images), best.loss)
        for step in range(1, self.steps + 1):
            self._move(state, gradient, schedule.step_size, images, momentum=_MOMENTUM if step > 1 else 1.0)
            answer = self._look(step, state, best, target, labels)
            gradient = answer.gradient
            stalled = schedule.advance(answer.loss, best.loss)
            state.current = state.current.clone()
            state.current[stalled] = best.images[stalled]
            gradient[stalled] = state.best_gradient[stalled]
        return best.images, best.loss

    def _look(
        self, step: int, state: _State, best: BestPoint, target: AttackTarget, labels: Tensor
    ) -> LossGradient:
        answer = target.loss_and_gradient(state.current, labels, LOSSES[self.loss], self.draws)
        if self.recorder is not None:
            self.recorder.record(step, answer.gradient, loss=answer.loss, saturated=answer.saturated)
        better = best.offer(state.current, answer.rank)
        state.best_gradient[better] = answer.gradient[better]
        return answer

    def _move(
        self, state: _State, gradient: Tensor, step_size: Tensor, images: Tensor, *, momentum: float
    ) -> None:
        """Take one step: towards the projected gradient step, and on along the last move."""
        current, drift = state.current, state.current - state.previous
        direction = self.threat.ascent_direction(gradient)
        ahead = self.threat.project(current + per_image(step_size, current) * direction, images)
        blended = current + momentum * (ahead - current) + (1.0 - momentum) * drift
        state.previous, state.current = current, self.threat.project(blended, images)


@dataclass
class _State:
    current: Tensor
    previous: Tensor
    best_gradient: Tensor


class _StepSchedule:
    """When to halve the step of which image (conditions 1 and 2 of the article's Section 3.2)."""

    def __init__(self, steps: int, step_size: Tensor, loss: Tensor) -> None:
        self.step_size = step_size.clone()
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
        """Take in the (B,) loss after a step; return the mask of images that stall, their step halved."""
        self._rises += (loss > self._last_loss).to(loss.dtype)
        self._last_loss = loss
        self._since += 1
        if self._since < self._period:
            return torch.zeros_like(self._halved_at_checkpoint)
        unimproved = ~self._halved_at_checkpoint & (self._best_at_checkpoint >= best_loss)
        stalled = (self._rises <= _RISING_SHARE * self._since) | unimproved
        self.step_size[stalled] /= 2.0
        self._halved_at_checkpoint = stalled
        self._best_at_checkpoint = best_loss.clone()
        self._rises.zero_()
        self._since = 0
        self._period = max(self._period - self._shrink, self._shortest)
        return stalled
