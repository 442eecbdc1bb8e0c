"""The attacks by name, their budget, and the protocols that combine them; importing it loads no torch.

`ATTACKS` is the one table of attacks: name -> factory. A factory imports its attack when it is called.

    attack = build_attack("pgd-eot", ThreatModel("linf", 8 / 255), budget, stochastic=True, seed=0)

`stochastic` says whether the model under attack is random. A name then stands for the version with
Expectation over Transformation (`apgd-ce`, `apgd-dlr`, `square`), or for an attack on frozen latents (`fab`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from carso_cli.errors import UsageError, nearest

if TYPE_CHECKING:
    from carso_cli.attacks.attack import Attack
    from carso_cli.attacks.gradient_health import GradientRecorder
    from carso_cli.attacks.threat_model import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much an attack may compute; the names are those of a recipe's `evaluation` section."""

    pgd_steps: int
    pgd_step_size: float  # in the norm's units, as below
    apgd_steps: int  # of FAB too
    eot_draws: int  # K, EoT samples per gradient or query of a random model
    pgd_eot_steps: int
    pgd_eot_step_size: float
    square_queries: int
    restarts: int  # random starts, where an attack has any


@dataclass(frozen=True, eq=False)
class _Request:
    """What `build_attack` was asked for."""

    threat: ThreatModel
    budget: Budget
    stochastic: bool
    seed: int
    recorder: GradientRecorder | None

    def make(self, path: str, **arguments: Any) -> Attack:  # noqa: ANN401  (each attack has its own)
        """Import `module:Class` of this package; return its attack, with seed and recorder."""
        # Imported here and not above, as every attack imports torch.
        kind = resolve_name(f"carso_cli.attacks.{path}")
        attack: Attack = kind(self.threat, **arguments, seed=self.seed, recorder=self.recorder)
        return attack


def _pgd(request: _Request) -> Attack:
    steps, step_size = request.budget.pgd_steps, request.budget.pgd_step_size
    # A user's PGD keeps its best point; training calls the class itself and takes the last.
    return request.make("pgd:PGD", steps=steps, step_size=step_size, keep_best=True)


def _pgd_eot(request: _Request, *, random_start: bool, keep_best: bool = True) -> Attack:
    return request.make(
        "pgd_eot:PGDEoT",
        steps=request.budget.pgd_eot_steps,
        step_size=request.budget.pgd_eot_step_size,
        eot_samples=request.budget.eot_draws,
        random_start=random_start,
        keep_best=keep_best,
        # From the image itself there is no start to vary; the published attack is one run (Table 14).
        restarts=request.budget.restarts if random_start else 1,
    )


def _pgd_eot_margin(request: _Request) -> Attack:
    # Two surrogates that see what the defence's own gradients may miss; a classifier has none.
    surrogates = ("transfer-classifier", "transfer-straight-through") if request.stochastic else ()
    return request.make(
        "pgd_eot:PGDEoT",
        steps=request.budget.pgd_eot_steps,
        step_size=request.budget.pgd_eot_step_size,
        eot_samples=request.budget.eot_draws,
        random_start=True,
        restarts=request.budget.restarts,
        margin=True,
        starts=tuple(
            # Without the recorder: these are not the gradients of the target.
            _transfer(replace(request, recorder=None), surrogate=surrogate)
            for surrogate in surrogates
        ),
    )


def _apgd(request: _Request, *, loss: str) -> Attack:
    steps, restarts = request.budget.apgd_steps, request.budget.restarts
    if not request.stochastic:
        return request.make("autoattack:LibraryAPGD", loss=loss, steps=steps, restarts=restarts)
    eot_samples = request.budget.eot_draws
    return request.make("apgd:APGD", loss=loss, steps=steps, restarts=restarts, eot_samples=eot_samples)


def _apgd_t(request: _Request) -> Attack:
    return request.make("autoattack:LibraryAPGD", loss="dlr", steps=request.budget.apgd_steps, targeted=True)


def _fab_t(request: _Request) -> Attack:
    return request.make("autoattack:FAB", steps=request.budget.apgd_steps, targeted=True)


def _targeted(request: _Request) -> Attack:
    steps, eot_samples = request.budget.apgd_steps, request.budget.eot_draws
    return request.make("targeted_apgd:TargetedAPGD", steps=steps, eot_samples=eot_samples)


def _rand_aa(request: _Request) -> Attack:
    steps, restarts = request.budget.apgd_steps, request.budget.restarts
    eot_samples = request.budget.eot_draws
    path = "rand_autoattack:RandAutoAttack"
    return request.make(path, steps=steps, restarts=restarts, eot_samples=eot_samples)


def _authors_rand_aa(request: _Request) -> Attack:
    steps, eot_samples = request.budget.apgd_steps, request.budget.eot_draws
    return request.make("authors:AuthorsRandAA", steps=steps, eot_samples=eot_samples)


def _fab(request: _Request) -> Attack:
    steps, restarts = request.budget.apgd_steps, request.budget.restarts
    attack = request.make("autoattack:FAB", steps=steps, restarts=restarts)
    if not request.stochastic:
        return attack
    # FAB walks to a decision boundary, which under new latents would move at every step.
    return request.make("surrogates:Transfer", surrogate="fab", attack=attack)


def _square(request: _Request) -> Attack:
    queries, restarts = request.budget.square_queries, request.budget.restarts
    if not request.stochastic:
        return request.make("autoattack:Square", queries=queries, restarts=restarts)
    return request.make("square:SquareEoT", queries=queries, eot_samples=request.budget.eot_draws)


def _aa(request: _Request) -> Attack:
    steps, queries = request.budget.apgd_steps, request.budget.square_queries
    return request.make("autoattack:AutoAttack", steps=steps, queries=queries)


def _transfer(request: _Request, *, surrogate: str) -> Attack:
    # `stochastic` picks the version: on the random defence this is APGD with EoT, surrogate or not.
    attack = _apgd(request, loss="ce")
    return request.make("surrogates:Transfer", surrogate=surrogate, attack=attack)


BASELINES = ("none", "noise")
TRANSFERS = (
    "transfer-logit-mean",
    "transfer-probability-mean",
    "transfer-single-sample",
    "transfer-log-probability",
    "transfer-straight-through",
    "transfer-classifier",
)
FROM_TRANSFERS = "pgd-eot-margin"
"""Attack by the target's own gradients that starts from transferred examples."""
ATTACKS: dict[str, Callable[[_Request], Attack]] = {
    "none": lambda request: request.make("noise:NoPerturbation"),
    "noise": lambda request: request.make("noise:RandomNoise"),
    "fgsm": lambda request: request.make("fgsm:FGSM"),
    "pgd": _pgd,
    "apgd-ce": partial(_apgd, loss="ce"),
    "apgd-dlr": partial(_apgd, loss="dlr"),
    "apgd-targeted": _targeted,
    "apgd-t": _apgd_t,
    "fab": _fab,
    "fab-t": _fab_t,
    "square": _square,
    "aa": _aa,
    "rand-aa": _rand_aa,
    "pgd-eot": partial(_pgd_eot, random_start=False),
    "pgd-eot-random-start": partial(_pgd_eot, random_start=True),
    "authors-rand-aa": _authors_rand_aa,
    "authors-pgd-eot": partial(_pgd_eot, random_start=False, keep_best=False),
    FROM_TRANSFERS: _pgd_eot_margin,
    **{name: partial(_transfer, surrogate=name) for name in TRANSFERS},
}
DESCRIPTIONS = {
    "none": "unperturbed images",
    "noise": "random noise of the same size, a baseline",
    "fgsm": "one step along the sign of the gradient",
    "pgd": "projected gradient descent, its best step kept",
    "apgd-ce": "Auto-PGD on the cross-entropy; with EoT on a random model",
    "apgd-dlr": "Auto-PGD on the difference of logits ratio; with EoT on a random model",
    "apgd-targeted": "Auto-PGD towards each of nine other classes; of a random model the chance of an error",
    "apgd-t": "AutoAttack's: Auto-PGD on the targeted difference of logits ratio",
    "fab": "the nearest decision boundary; on frozen latents of a random model",
    "fab-t": "AutoAttack's: the nearest boundary of each of nine other classes",
    "square": "random search without gradients",
    "aa": "AutoAttack, standard: APGD-CE, targeted APGD, targeted FAB, Square",
    "rand-aa": "AutoAttack for random models: APGD-CE and APGD-DLR with EoT",
    "pgd-eot": "PGD with gradients averaged over samples of a random model (EoT)",
    "pgd-eot-random-start": "the same from random starts",
    "pgd-eot-margin": "PGD with EoT on the margin, shrinking steps; from random and transferred starts",
    "authors-rand-aa": "the library's own randomised AutoAttack, as the authors ran it",
    "authors-pgd-eot": "PGD with EoT, its last point kept, as the authors ran it",
    "transfer-logit-mean": "made against the mean of the samples' logits",
    "transfer-probability-mean": "made against the mean of the samples' probabilities",
    "transfer-single-sample": "made against one sample per image",
    "transfer-log-probability": "made against the log-probability view",
    "transfer-straight-through": "made with the purifier's gradient replaced by the identity",
    "transfer-classifier": "made against the bare classifier",
}
"""What each attack does, in a few words."""
DETERMINISTIC_ONLY = ("aa", "apgd-t", "fab-t")
"""AutoAttack and its targeted parts need a model without randomness; `rand-aa` takes their place."""
DEFENCE_ONLY = TRANSFERS
"""Attacks that have no meaning against a bare classifier."""


def build_attack(
    name: str,
    threat: ThreatModel,
    budget: Budget,
    *,
    stochastic: bool,
    seed: int,
    recorder: GradientRecorder | None = None,
) -> Attack:
    """Build an attack by name.

    Args:
        name: A key of `ATTACKS`.
        threat: Norm and radius (or radii).
        budget: Steps, EoT samples, queries.
        stochastic: Whether the model under attack is random.
        seed: Seed of everything random in the attack.
        recorder: Counts unusable gradients as the attack runs.

    Raises:
        UsageError: If the name is unknown, or the attack does not fit the model.
    """
    if name not in ATTACKS:
        raise UsageError(
            f"unknown attack '{name}'. {nearest(name, ATTACKS)}".rstrip(),
            hint=f"attacks: {', '.join(ATTACKS)}",
        )
    if stochastic and name in DETERMINISTIC_ONLY:
        raise UsageError(
            f"attack '{name}' is for deterministic models, and the defence is random",
            hint="use rand-aa instead",
        )
    if not stochastic and name in DEFENCE_ONLY:
        raise UsageError(f"attack '{name}' transfers to the defence; the target is a bare classifier")
    return ATTACKS[name](_Request(threat, budget, stochastic, seed, recorder))


@dataclass(frozen=True)
class Protocol:
    """A set of attacks; the worst case over them, image by image, is the result.

    Args:
        name: Name on the command line.
        classifier: Attacks on the bare classifier.
        defence: Attacks on the defence.
        view: View of the defence that is attacked, where an attack does not choose its own.
        headline: Attack on the defence whose own figure is the result, counted on one draw as the authors'
            script does; None for the worst case over all attacks, selected and scored on several draws.
        version: Raised when its attacks change, so that no older result is taken for one of the new set.
    """

    name: str
    classifier: tuple[str, ...]
    defence: tuple[str, ...]
    view: str
    headline: str | None = None
    version: int = 1


_WHITE_BOX = ("apgd-targeted", "pgd-eot", "pgd-eot-random-start")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # The lowest accuracy over white-box, surrogate and black-box attacks. The same on both targets:
        # AutoAttack's version for deterministic or for random models; where there is a purifier, surrogates.
        Protocol(
            "adaptive",
            classifier=("aa", *_WHITE_BOX, FROM_TRANSFERS, "square"),
            defence=("rand-aa", *_WHITE_BOX, *TRANSFERS, FROM_TRANSFERS, "square"),
            view="exact",
            version=3,
        ),
        # The paper's budget (Section 5.1) on the view that its authors released, by our procedure.
        Protocol("published", classifier=("aa",), defence=("rand-aa", "pgd-eot"), view="released"),
        # The same by the authors' procedure: the library's own randAA, the last point of PGD+EoT, one draw.
        Protocol(
            "authors",
            classifier=("aa",),
            defence=("authors-rand-aa", "authors-pgd-eot"),
            view="released",
            headline="authors-rand-aa",
        ),
        # Minutes instead of hours: an upper bound, not a result to report.
        Protocol("quick", classifier=("pgd",), defence=("pgd-eot", "transfer-classifier"), view="exact"),
    )
}


def is_upper_bound(name: str) -> bool:
    """Return whether a protocol or attack gives an upper bound only: `quick`, or one attack alone."""
    return name not in ("none", *PROTOCOLS) or name == "quick"


def check_name(name: str) -> str:
    """Return `name` if it is an attack or a protocol.

    Raises:
        UsageError: If it is neither; the message gives the nearest known names.
    """
    known = (*PROTOCOLS, *ATTACKS)
    if name not in known:
        raise UsageError(
            f"unknown attack or protocol '{name}'; {nearest(name, known)}".rstrip("; "),
            hint=f"protocols: {', '.join(PROTOCOLS)}; attacks: {', '.join(ATTACKS)}",
        )
    return name
