"""From an attack's name and a budget to the attack.

    attack = build_attack("pgd-eot", ThreatModel("linf", 8 / 255), budget, stochastic=True, seed=0)

`stochastic` says whether the model under attack is random: the same name then stands for the version
with Expectation over Transformation (`apgd-ce`, `apgd-dlr`, `square`), or for an attack on frozen latents
(`fab`). `carso_cli.attacks.names` lists the names without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from carso_cli.attacks import surrogates as transfer
from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.attack import Attack
from carso_cli.attacks.autoattack import AutoAttack
from carso_cli.attacks.autoattack_parts import FAB, LibraryAPGD, Square
from carso_cli.attacks.fgsm import FGSM
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.names import ATTACKS, DEFENCE_ONLY, DETERMINISTIC_ONLY
from carso_cli.attacks.noise import NoPerturbation, RandomNoise
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.attacks.rand_autoattack import RandAutoAttack
from carso_cli.attacks.square import SquareEoT
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.errors import UsageError, nearest


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much an attack may compute; the names are those of a recipe's `evaluation` section.

    Args:
        pgd_steps: Steps of `pgd`.
        pgd_step_size: Step of `pgd`, in the norm's units.
        apgd_steps: Steps of APGD and FAB.
        eot_draws: K, draws per gradient or query of a random model.
        pgd_eot_steps: Steps of `pgd-eot`.
        pgd_eot_step_size: Step of `pgd-eot`, in the norm's units.
        square_queries: Queries of Square.
        restarts: Random starts, where an attack has any.
    """

    pgd_steps: int
    pgd_step_size: float
    apgd_steps: int
    eot_draws: int
    pgd_eot_steps: int
    pgd_eot_step_size: float
    square_queries: int
    restarts: int


class _Rest(TypedDict):
    """What almost every attack takes as it comes."""

    seed: int
    recorder: GradientRecorder | None


@dataclass(frozen=True, eq=False)
class _Order:
    threat: ThreatModel
    budget: Budget
    stochastic: bool
    rest: _Rest


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
        name: One of `carso_cli.attacks.names.ATTACKS`.
        threat: Norm and radius (or radii).
        budget: Steps, draws, queries.
        stochastic: Whether the model under attack is random.
        seed: Seed of everything random in the attack.
        recorder: Counts unusable gradients as the attack runs.

    Raises:
        UsageError: If the name is unknown, or the attack does not fit the model.
    """
    if name not in _BUILDERS:
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
    return _BUILDERS[name](_Order(threat, budget, stochastic, {"seed": seed, "recorder": recorder}))


def _pgd(order: _Order) -> Attack:
    return PGD(
        order.threat,
        steps=order.budget.pgd_steps,
        step_size=order.budget.pgd_step_size,
        keep_best=True,
        **order.rest,
    )


def _pgd_eot(order: _Order, *, random_start: bool) -> Attack:
    return PGDEoT(
        order.threat,
        steps=order.budget.pgd_eot_steps,
        draws=order.budget.eot_draws,
        step_size=order.budget.pgd_eot_step_size,
        random_start=random_start,
        restarts=order.budget.restarts if random_start else 1,
        **order.rest,
    )


def _apgd(order: _Order, loss: str) -> Attack:
    if not order.stochastic:
        return LibraryAPGD(
            order.threat,
            loss=loss,
            steps=order.budget.apgd_steps,
            restarts=order.budget.restarts,
            **order.rest,
        )
    return APGD(
        order.threat,
        loss=loss,
        steps=order.budget.apgd_steps,
        draws=order.budget.eot_draws,
        restarts=order.budget.restarts,
        **order.rest,
    )


def _fab(order: _Order) -> Attack:
    attack = FAB(order.threat, steps=order.budget.apgd_steps, restarts=order.budget.restarts, **order.rest)
    return transfer.Transfer("fab", transfer.frozen, attack) if order.stochastic else attack


def _square(order: _Order) -> Attack:
    queries = order.budget.square_queries
    if order.stochastic:
        return SquareEoT(order.threat, queries=queries, draws=order.budget.eot_draws, seed=order.rest["seed"])
    return Square(order.threat, queries=queries, restarts=order.budget.restarts, **order.rest)


def _auto_attack(order: _Order) -> Attack:
    return AutoAttack(
        order.threat, steps=order.budget.apgd_steps, queries=order.budget.square_queries, **order.rest
    )


def _rand_aa(order: _Order) -> Attack:
    return RandAutoAttack(
        order.threat,
        steps=order.budget.apgd_steps,
        draws=order.budget.eot_draws,
        restarts=order.budget.restarts,
        **order.rest,
    )


def _transfer(name: str, surrogate: transfer.Surrogate) -> Callable[[_Order], Attack]:
    return lambda order: transfer.Transfer(name, surrogate, _apgd(order, "ce"))


_SURROGATES: dict[str, transfer.Surrogate] = {
    "transfer-logit-mean": transfer.logit_mean,
    "transfer-probability-mean": transfer.probability_mean,
    "transfer-single-sample": transfer.single_sample,
    "transfer-log-probability": transfer.log_probability,
    "transfer-straight-through": transfer.straight_through,
    "transfer-classifier": transfer.bare_classifier,
}

_BUILDERS: dict[str, Callable[[_Order], Attack]] = {
    "none": lambda order: NoPerturbation(),
    "noise": lambda order: RandomNoise(order.threat, seed=order.rest["seed"]),
    "fgsm": lambda order: FGSM(order.threat, recorder=order.rest["recorder"]),
    "pgd": _pgd,
    "pgd-eot": lambda order: _pgd_eot(order, random_start=False),
    "pgd-eot-random-start": lambda order: _pgd_eot(order, random_start=True),
    "apgd-ce": lambda order: _apgd(order, "ce"),
    "apgd-dlr": lambda order: _apgd(order, "dlr"),
    "fab": _fab,
    "square": _square,
    "aa": _auto_attack,
    "rand-aa": _rand_aa,
    **{name: _transfer(name, surrogate) for name, surrogate in _SURROGATES.items()},
}
