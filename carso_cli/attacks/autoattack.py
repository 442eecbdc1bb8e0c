"""AutoAttack's standard ensemble and its parts, for deterministic models; pyautoattack's implementation.

Titles and links: "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
Attacks" (Croce and Hein, 2020), https://arxiv.org/abs/2003.01690; "Minimally Distorted Adversarial Examples
with a Fast Adaptive Boundary Attack" (the same), https://arxiv.org/abs/1907.02044; "Square Attack: a
query-efficient black-box adversarial attack via random search" (Andriushchenko et al., 2020),
https://arxiv.org/abs/1912.00049.
Distance: linf, l2; APGD and FAB take one radius per image, unless targeted.
Published setting (standard version): APGD on cross-entropy, targeted APGD on DLR, targeted FAB, 100 steps
each, up to 9 target classes; Square with 5000 queries; each on the images that are not fooled yet.

    attack = AutoAttack(ThreatModel("linf", 8 / 255), steps=100, queries=5000)
    perturbed = attack(ClassifierTarget(classifier), images, labels)

Where an image is not fooled the library returns it unchanged; here its point of largest margin is returned,
except by the targeted attacks. `apgd` and `square` hold our own versions, for random models.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from carso_cli.attacks.attack import Attack, BestPoint, require_finite
from carso_cli.attacks.library_model import LOGGER, LibraryModel, warnings_to
from carso_cli.attacks.losses import margin, require_dlr_classes
from carso_cli.attacks.target import AttackTarget
from carso_cli.attacks.threat_model import per_image
from carso_cli.errors import UsageError
from carso_cli.runtime.seed import derive_seed, seeded
from carso_cli.runtime.third_party import prepare

_TARGET_CLASSES = 9


class LibraryAttack(Attack):
    """What the library's attacks have in common; the recorder keeps the library's warnings too."""

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `candidates` for what it raises."""
        *_, last = self.candidates(target, images, labels).values()
        return last

    def candidates(self, target: AttackTarget, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the examples by name of the attack, or of its part; see `Attack`.

        Raises:
            UsageError: If the target is random; if each image has its own radius, where the attack takes but
                one; under `dlr` if the target has fewer than three classes.
        """
        # The library takes one sample per step: its draw would decide which point seems the best.
        if target.stochastic:
            raise UsageError(
                f"attack '{self.name}' is for deterministic models, and this one draws latents",
                hint="use rand-aa, pgd-eot or square against the defence",
            )
        prepare()
        # Without labels: the library calls with the images not fooled yet, which labels of all would not fit.
        model = LibraryModel(target, recorder=self.recorder)
        with warnings_to(self.recorder), seeded(self.seed, self.name):
            # The library calls `.view` on images, which must be contiguous.
            found = self.parts(model, images.contiguous(), labels, derive_seed(self.seed, self.name))
        return {name: require_finite(examples, name) for name, examples in found.items()}

    def parts(self, model: LibraryModel, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
        """Return the examples by name; an attack of several parts has one entry for each."""
        return {self.name: self.perturb(model, images, labels, seed)}

    @abstractmethod
    def perturb(self, model: LibraryModel, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Return the examples; `images` (b, channels, H, W) may be any part of those of the call."""

    def settings(self, images: Tensor, seed: int) -> dict[str, Any]:
        """Return the arguments that all of the library's classes share."""
        eps = self.threat.eps
        return {
            # FAB asks for the radius only to place its random starts; the others need one for all images.
            "eps": float(self.threat.radii(images).max()) if isinstance(eps, Tensor) else eps,
            "norm": {"linf": "Linf", "l2": "L2"}[self.threat.norm],
            "seed": seed,
            "verbose": False,
            # The loops below restart by themselves, to offer the points of every restart and not the last.
            "n_restarts": 1,
            "device": images.device,
        }

    def offer(
        self, best: BestPoint, model: LibraryModel, found: Tensor, images: Tensor, labels: Tensor
    ) -> None:
        """Project what the library found into the ball, and offer it with its margin."""
        inside = self.threat.project(found, images)
        # By margin, as points from different losses are compared; after projection, which may move them.
        best.offer(inside, margin(model(inside), labels))

    def require_one_radius(self) -> None:
        """Raise `UsageError` if each image has its own radius."""
        eps = self.threat.eps
        if isinstance(eps, Tensor) and eps.ndim:
            raise UsageError(f"attack '{self.name}' takes one eps for all images, not {len(eps)} of them")


@dataclass(frozen=True, eq=False, kw_only=True)
class LibraryAPGD(LibraryAttack):
    """APGD on cross-entropy (`ce`) or the difference of logits ratio (`dlr`).

    Args:
        loss: `ce` or `dlr`.
        steps: Steps of each restart.
        restarts: Random starts.
        targeted: Raise the targeted DLR loss instead, class by class; images not fooled stay unchanged.
    """

    loss: str
    steps: int
    restarts: int = 1
    targeted: bool = False

    @property
    def name(self) -> str:
        """`apgd-ce`, `apgd-dlr`, or `apgd-t` where it is targeted."""
        return "apgd-t" if self.targeted else f"apgd-{self.loss}"

    def perturb(self, model: LibraryModel, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Run it; see `LibraryAttack.perturb`. Returns the fooling or best-loss point, by larger margin."""
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

        settings = self.settings(images, seed) | {"n_iter": self.steps, "logger": LOGGER}
        if self.targeted:
            targeted = APGDAttack_targeted(model, n_target_classes=_target_classes(model, images), **settings)
            found: Tensor = targeted.perturb(images, labels)
            return self.threat.project(found, images)
        if self.loss == "dlr":
            require_dlr_classes(_classes(model, images))
        # The library multiplies eps into images, so (B, 1, 1, 1) gives each image its own radius.
        if isinstance(self.threat.eps, Tensor):
            settings["eps"] = per_image(self.threat.radii(images), images)
        attack = APGDAttack(model, loss=self.loss, **settings)
        attack.init_hyperparam(images)
        best = BestPoint(images)
        for _ in range(self.restarts):
            # The point of largest loss need not fool, the last fooling point need not be the best.
            best_loss, _, _, last_fooling = attack.attack_single_run(images, labels)
            self.offer(best, model, best_loss, images, labels)
            self.offer(best, model, last_fooling, images, labels)
        return best.images


@dataclass(frozen=True, eq=False, kw_only=True)
class FAB(LibraryAttack):
    """FAB: the nearest point of another class, drawn back to the ball's surface where it lies outside.

    Args:
        steps: Steps of each restart.
        restarts: Starts: the image itself, then random points.
        targeted: Go towards one class after another; images not fooled stay unchanged.
    """

    steps: int
    restarts: int = 1
    targeted: bool = False

    @property
    def name(self) -> str:
        """`fab`, or `fab-t` where it is targeted."""
        return "fab-t" if self.targeted else "fab"

    def perturb(self, model: LibraryModel, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Run it; see `LibraryAttack.perturb`."""
        from pyautoattack.fab_pt import FABAttack_PT

        attack = FABAttack_PT(model, n_iter=self.steps, **self.settings(images, seed))
        if self.targeted:
            attack.targeted = True
            attack.n_target_classes = _target_classes(model, images)
            found: Tensor = attack.perturb(images, labels)
            return self.threat.project(found, images)
        best = BestPoint(images)
        self.offer(best, model, images, images, labels)
        # FAB leaves images unchanged that are wrong already or whose boundary it misses: one gradient step of
        # the whole radius is offered beside its own points.
        uphill = model.target.loss_and_gradient(images, labels, margin, 1).gradient
        reach = per_image(self.threat.radii(images), images)
        self.offer(best, model, images + reach * self.threat.ascent_direction(uphill), images, labels)
        for restart in range(self.restarts):
            # Not `perturb`: it discards what lies beyond eps, which drawn back may still fool the model.
            nearest_other = attack.attack_single_run(images, labels, use_rand_start=restart > 0)
            # Projected here and in `offer`: under l2 the second projection may change the last bit.
            self.offer(best, model, self.threat.project(nearest_other, images), images, labels)
        return best.images


@dataclass(frozen=True, eq=False, kw_only=True)
class Square(LibraryAttack):
    """Square: random search over square patches, black box.

    Args:
        queries: Queries of each restart.
        restarts: Random starts.
    """

    name: ClassVar[str] = "square"
    queries: int
    restarts: int = 1

    def perturb(self, model: LibraryModel, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Run it; see `LibraryAttack.perturb`."""
        from pyautoattack.square import SquareAttack

        self.require_one_radius()
        settings = self.settings(images, seed)
        # The settings of the standard ensemble: schedule in queries, not rescaled to their number.
        attack = SquareAttack(model, n_queries=self.queries, p_init=0.8, resc_schedule=False, **settings)
        attack.init_hyperparam(images)
        best = BestPoint(images)
        self.offer(best, model, images, images, labels)
        for _ in range(self.restarts):
            # The run returns (queries used, points).
            self.offer(best, model, attack.attack_single_run(images, labels)[1], images, labels)
        return best.images


@dataclass(frozen=True, eq=False, kw_only=True)
class AutoAttack(LibraryAttack):
    """The standard ensemble: each attack on the images that are not fooled yet.

    An image that the model gets wrong unperturbed is returned as it is. With fewer than four classes the
    targeted losses are undefined: untargeted APGD-DLR (from three classes) and FAB take their place.

    Args:
        steps: Steps of APGD and FAB.
        queries: Queries of Square.
    """

    name: ClassVar[str] = "aa"
    steps: int
    queries: int

    def perturb(self, model: LibraryModel, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Run the parts; see `LibraryAttack.perturb`."""
        *_, last = self.parts(model, images, labels, seed).values()
        return last

    def parts(self, model: LibraryModel, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
        """Return what is found after each part: an image's first wrong example names what fooled it."""
        self.require_one_radius()
        result = images.clone()
        found_after: dict[str, Tensor] = {}
        logits = model(result)
        correct = logits.argmax(dim=1) == labels
        for number, part in enumerate(self._parts(logits.shape[1])):
            chosen = correct.nonzero()[:, 0]
            if not len(chosen):
                break
            if self.recorder is not None:
                self.recorder.part = part.name
            # `perturb` and not a call: parts share one model, one seed and one log of warnings.
            found = part.perturb(model, images[chosen], labels[chosen], seed)
            fooled = model(found).argmax(dim=1) != labels[chosen]
            # The first attack's best-loss points stay where nothing fools the model.
            kept = fooled | (number == 0)
            result[chosen[kept]] = found[kept]
            correct[chosen[fooled]] = False
            # The library alone has cut the points of its targeted attacks: rounding may leave the ball.
            found_after[part.name] = self.threat.project(result, images)
        return found_after or {self.name: self.threat.project(result, images)}

    def _parts(self, classes: int) -> list[LibraryAttack]:
        targeted = classes >= 4
        apgd_dlr = LibraryAPGD(self.threat, loss="dlr", steps=self.steps, targeted=targeted)
        return [
            LibraryAPGD(self.threat, loss="ce", steps=self.steps),
            *([apgd_dlr] if classes >= 3 else []),
            FAB(self.threat, steps=self.steps, targeted=targeted),
            Square(self.threat, queries=self.queries),
        ]


def _classes(model: LibraryModel, images: Tensor) -> int:
    return model(images[:1]).shape[1]


def _target_classes(model: LibraryModel, images: Tensor) -> int:
    # The library counts down from the second largest logit: C classes hold C - 1 targets.
    return min(_TARGET_CLASSES, _classes(model, images) - 1)
