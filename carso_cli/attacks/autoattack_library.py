"""The only home of pyautoattack: one attack a method, on a deterministic target.

`LibraryAttack` opens the library on a target, as a `LibrarySession`; `auto_attack` and
`auto_attack_parts` turn its methods into attacks. Where an image is not fooled the library returns it
unchanged; here its point of largest margin is returned, except by the targeted attacks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from carso_cli.attacks.attack import BestPoint, require_finite
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.library_model import LibraryModel
from carso_cli.attacks.losses import margin, require_dlr_classes
from carso_cli.attacks.target import AttackTarget
from carso_cli.attacks.threat_model import ThreatModel, per_image
from carso_cli.errors import UsageError
from carso_cli.runtime.seed import derive_seed, seeded
from carso_cli.runtime.third_party import prepare

_NORMS = {"linf": "Linf", "l2": "L2"}
_TARGET_CLASSES = 9


@dataclass(frozen=True, eq=False)
class LibrarySession:
    """The library on one target; every method maps (b, channels, H, W) images to examples of that shape.

    The images may be any part of those that the session was opened for, unless each has its own radius.
    """

    model: LibraryModel
    threat: ThreatModel
    seed: int

    def apgd(self, images: Tensor, labels: Tensor, *, loss: str, steps: int, restarts: int) -> Tensor:
        """Run APGD on `ce` or `dlr`; return the fooling or the best-loss point, by larger margin."""
        from pyautoattack.autopgd_base import APGDAttack

        if loss == "dlr":
            require_dlr_classes(self._classes(images))
        radii: Any = self.threat.eps
        if isinstance(radii, Tensor):
            radii = per_image(self.threat.radii(images), images)
        attack = APGDAttack(
            self.model, n_iter=steps, loss=loss, **{**self._settings(images), "eps": radii}, logger=_logger()
        )
        attack.init_hyperparam(images)
        best = BestPoint(images)
        for _ in range(restarts):
            best_loss, _, _, last_fooling = attack.attack_single_run(images, labels)
            self._offer(best, best_loss, images, labels)
            self._offer(best, last_fooling, images, labels)
        return best.images

    def targeted_apgd(self, images: Tensor, labels: Tensor, *, steps: int) -> Tensor:
        """Run APGD on the targeted DLR loss, class by class; images it does not fool come back unchanged."""
        from pyautoattack.autopgd_base import APGDAttack_targeted

        attack = APGDAttack_targeted(
            self.model,
            n_iter=steps,
            n_target_classes=self._target_classes(images),
            **self._settings(images),
            logger=_logger(),
        )
        found: Tensor = attack.perturb(images, labels)
        return found

    def fab(self, images: Tensor, labels: Tensor, *, steps: int, restarts: int) -> Tensor:
        """Run FAB; points beyond the ball are drawn back to its surface, where the margin is large.

        FAB leaves images alone that are wrong already or whose boundary it misses: one gradient step of the
        whole radius is offered beside its own points.
        """
        attack = self._fab(images, steps)
        best = BestPoint(images)
        self._offer(best, images, images, labels)
        uphill = self.model.target.loss_and_gradient(images, labels, margin, 1).gradient
        reach = per_image(self.threat.radii(images), images)
        self._offer(best, images + reach * self.threat.ascent_direction(uphill), images, labels)
        for restart in range(restarts):
            nearest_other = attack.attack_single_run(images, labels, use_rand_start=restart > 0)
            self._offer(best, self.threat.project(nearest_other, images), images, labels)
        return best.images

    def targeted_fab(self, images: Tensor, labels: Tensor, *, steps: int) -> Tensor:
        """Run FAB towards one class after another; images it does not fool come back unchanged."""
        attack = self._fab(images, steps)
        attack.targeted = True
        attack.n_target_classes = self._target_classes(images)
        found: Tensor = attack.perturb(images, labels)
        return found

    def square(self, images: Tensor, labels: Tensor, *, queries: int, restarts: int) -> Tensor:
        """Run Square; return the point of largest margin."""
        from pyautoattack.square import SquareAttack

        attack = SquareAttack(
            self.model, n_queries=queries, p_init=0.8, resc_schedule=False, **self._settings(images)
        )
        attack.init_hyperparam(images)
        best = BestPoint(images)
        self._offer(best, images, images, labels)
        for _ in range(restarts):
            self._offer(best, attack.attack_single_run(images, labels)[1], images, labels)
        return best.images

    def _fab(self, images: Tensor, steps: int) -> Any:  # noqa: ANN401  (the library is untyped)
        from pyautoattack.fab_pt import FABAttack_PT

        return FABAttack_PT(self.model, n_iter=steps, **self._settings(images))

    def _settings(self, images: Tensor) -> dict[str, Any]:
        # FAB asks for the radius only to place its random starts; the others need one for all images.
        largest = (
            float(self.threat.radii(images).max()) if isinstance(self.threat.eps, Tensor) else self.threat.eps
        )
        return {
            "eps": largest,
            "norm": _NORMS[self.threat.norm],
            "seed": self.seed,
            "verbose": False,
            "n_restarts": 1,
            "device": images.device,
        }

    def _target_classes(self, images: Tensor) -> int:
        return min(_TARGET_CLASSES, self._classes(images) - 1)

    def _classes(self, images: Tensor) -> int:
        return self.model(images[:1]).shape[1]

    def _offer(self, best: BestPoint, found: Tensor, images: Tensor, labels: Tensor) -> None:
        inside = self.threat.project(found, images)
        best.offer(inside, margin(self.model(inside), labels))


@dataclass(frozen=True, eq=False)
class LibraryAttack:
    """What the library's attacks have in common.

    Args:
        threat: Norm and radius (or radii).
        seed: Seed of everything random.
        recorder: Counts unusable gradients and keeps the library's warnings.
    """

    threat: ThreatModel
    _: KW_ONLY
    seed: int = 0
    recorder: GradientRecorder | None = None

    @property
    def name(self) -> str:
        """Name on the command line and in results."""
        raise NotImplementedError

    def perturb(self, session: LibrarySession, images: Tensor, labels: Tensor) -> Tensor:
        """Return the examples; images come contiguous, as the library needs them."""
        raise NotImplementedError

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `carso_cli.attacks.attack.Attack`.

        Raises:
            UsageError: If the target is random.
        """
        if target.stochastic:
            raise UsageError(
                f"attack '{self.name}' is for deterministic models, and this one draws latents",
                hint="use rand-aa, pgd-eot or square against the defence",
            )
        prepare()
        model = LibraryModel(target, recorder=self.recorder)
        session = LibrarySession(model, self.threat, derive_seed(self.seed, self.name))
        with _recorded(self.recorder), seeded(self.seed, self.name):
            return require_finite(self.perturb(session, images.contiguous(), labels), self.name)


@contextmanager
def _recorded(recorder: GradientRecorder | None) -> Iterator[None]:
    """Send the library's warnings to the recorder instead of the terminal."""
    logger, handler = _logger(), _Recording(recorder)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def one_radius(threat: ThreatModel, name: str) -> None:
    """Refuse a radius per image.

    Raises:
        UsageError: If there is one.
    """
    if isinstance(threat.eps, Tensor) and threat.eps.ndim:
        raise UsageError(f"attack '{name}' takes one eps for all images, not {len(threat.eps)} of them")


class _Recording(logging.Handler):
    def __init__(self, recorder: GradientRecorder | None) -> None:
        super().__init__(level=logging.WARNING)
        self.recorder = recorder

    def emit(self, record: logging.LogRecord) -> None:
        if self.recorder is not None:
            self.recorder.note(record.getMessage())


def _logger() -> logging.Logger:
    return logging.getLogger("auto-attack")
