"""What an evaluation runs: a protocol or attack, expanded into jobs, and their budget.

A `Job` is one attack on one target. A protocol's baselines (noise, one-draw FGSM and PGD) run on every image
that is not broken unperturbed, so that they can be compared with each other; in a worst-case protocol every
further attack runs only on images that no earlier one has broken.
"""

from __future__ import annotations

from dataclasses import dataclass

from carso_cli.attacks.registry import (
    ATTACKS,
    DEFENCE_ONLY,
    DETERMINISTIC_ONLY,
    FROM_TRANSFERS,
    PROTOCOLS,
    TRANSFERS,
    Budget,
    check_name,
)
from carso_cli.errors import UsageError
from carso_cli.recipe.schema import Recipe

TARGETS = ("classifier", "defence")
BLACK_BOX = ("square",)
BASELINES = ("noise", "fgsm", "pgd")
"""Weak attacks that every protocol runs on the defence, for comparison."""
UNPERTURBED = "none"
GIVEN = "given"
"""Examples made elsewhere, scored like an attack's."""
_UNSEEN = (UNPERTURBED, "noise", GIVEN, *BLACK_BOX)
"""Attacks without a gradient: no view makes a difference to them, except to Square's loss."""
UNMEASURED_DRAWS = 4
"""EoT samples per gradient where a recipe gives no number and none is measured."""

LABELS = {
    "adaptive": "worst case over white-box, surrogate and black-box attacks",
    "published": "as published: the paper's budget and view, by our procedure; gradients may be unusable",
    "authors": "as its authors ran it: the library's randAA and one draw; gradients may be unusable",
    "quick": "upper bound: a few minutes of attack, not a result to report",
}


@dataclass(frozen=True)
class Job:
    """One attack on one target.

    Args:
        target: `classifier` or `defence`.
        attack: One of `carso_cli.attacks.registry.ATTACKS`.
        view: Output view that is attacked; `surrogate` where the attack builds a surrogate of its own, None
            where there is no view.
        waits_for: Keys of the jobs whose broken images are not attacked again.
    """

    target: str
    attack: str
    view: str | None = None
    waits_for: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name in records: `defence/pgd-eot/exact`."""
        return "/".join(part for part in (self.target, self.attack, self.view) if part)

    @property
    def is_white_box(self) -> bool:
        """Whether it follows gradients of the target alone, and owes nothing to a surrogate."""
        return self.attack not in (*_UNSEEN, *TRANSFERS, FROM_TRANSFERS)


@dataclass(frozen=True)
class Plan:
    """The jobs of an evaluation, in order.

    Args:
        attack: Protocol or attack, as on the command line.
        label: What kind of number comes out.
        view: View of the defence that is attacked.
        jobs: What to run.
    """

    attack: str
    label: str
    view: str
    jobs: tuple[Job, ...]

    @property
    def is_protocol(self) -> bool:
        """Whether several attacks are combined."""
        return self.attack in PROTOCOLS

    @property
    def _headline(self) -> str | None:
        return PROTOCOLS[self.attack].headline if self.is_protocol else None

    @property
    def follows_authors(self) -> bool:
        """Whether nothing is selected, and one draw scores each example, as in the authors' script."""
        return self._headline is not None

    @property
    def version(self) -> int:
        """Version of the protocol; 1 for a single attack."""
        return PROTOCOLS[self.attack].version if self.is_protocol else 1

    @property
    def targets(self) -> tuple[str, ...]:
        """Which of classifier and defence are attacked."""
        return tuple(target for target in TARGETS if self.jobs_on(target))

    @property
    def headline_target(self) -> str:
        """The target of the number to quote: the defence, where it is attacked."""
        # `TARGETS` lists the defence last.
        return self.targets[-1]

    @property
    def strongest(self) -> Job | None:
        """The first white-box attack on the headline target that is no baseline, if any."""
        white_box = [job for job in self.jobs_on(self.headline_target) if job.is_white_box]
        # Baselines come first in the plan, and their few draws would make a weak yardstick.
        main = [job for job in white_box if job.attack not in BASELINES]
        return next(iter(main or white_box), None)

    def jobs_on(self, target: str) -> list[Job]:
        """Return the jobs on one target, in order."""
        return [job for job in self.jobs if job.target == target]

    def decisive_jobs(self, target: str) -> list[Job]:
        """Return the jobs whose worst case is a target's result; a single attack is its own."""
        jobs = self.jobs_on(target)
        if self.follows_authors and (own := [job for job in jobs if job.attack == self._headline]):
            return own
        # Of a single attack there are no selection draws, so it may not be mixed with the unperturbed images.
        return jobs if self.is_protocol else jobs[-1:]


def plan_evaluation(attack: str, *, target: str | None = None, view: str | None = None) -> Plan:
    """Expand a protocol or attack into jobs.

    Args:
        attack: Name of a protocol or attack.
        target: `classifier` or `defence`; both, where the attack fits both, when None.
        view: View of the defence to attack; the protocol's, or `exact`, when None.

    Raises:
        UsageError: If the name is unknown, or the attack does not fit the target.
    """
    check_name(attack)
    if target is not None and target not in TARGETS:
        raise UsageError(f"unknown target '{target}'; use classifier or defence")
    protocol = PROTOCOLS.get(attack)
    seen = view or (protocol.view if protocol else "exact")
    names = {
        "classifier": protocol.classifier if protocol else (attack,) * (attack not in DEFENCE_ONLY),
        "defence": protocol.defence if protocol else (attack,) * (attack not in DETERMINISTIC_ONLY),
    }
    chosen = [one for one in TARGETS if target in (None, one) and names[one]]
    if not chosen:
        other = "rand-aa on the defence" if target == "defence" else "--target defence"
        raise UsageError(f"attack '{attack}' does not fit the target '{target}'", hint=f"use {other}")
    jobs = [job for one in chosen for job in _jobs_on(one, names[one], seen, attack)]
    label = LABELS.get(attack, f"one attack: {attack}; an upper bound on the accuracy under attack")
    if protocol and protocol.version > 1:
        label += f", version {protocol.version}"
    return Plan(attack, label, seen, tuple(jobs))


def _jobs_on(target: str, names: tuple[str, ...], view: str, attack: str) -> list[Job]:
    jobs = [Job(target, UNPERTURBED)]
    is_protocol = attack in PROTOCOLS
    # A single attack selects nothing, so it needs no second set of draws to say what may be left out.
    clean = (jobs[0].key,) if is_protocol and attack != "authors" else ()
    every_image = is_protocol and attack in ("published", "authors")
    # The paper gives AutoAttack alone for the classifier; `quick` keeps its time.
    compared = (target == "defence" and attack != "authors") or attack == "adaptive"
    baselines = BASELINES if is_protocol and compared else ()
    before: tuple[str, ...] = clean
    # Without repeats: a baseline may be one of the protocol's own attacks too.
    for name in dict.fromkeys((*baselines, *names)):
        if name == UNPERTURBED:
            continue
        is_main = name in names
        jobs.append(Job(target, name, _view_of(name, target, view), before if is_main else clean))
        # The paper runs every attack on every image.
        if is_main and is_protocol and not every_image:
            before = (*before, jobs[-1].key)
    return jobs


def _view_of(attack: str, target: str, view: str) -> str | None:
    if target == "classifier" or attack == "noise":
        return None
    # This surrogate is a view of the defence, so its records name that view.
    if attack == "transfer-log-probability":
        return "log-probability"
    return "surrogate" if attack in TRANSFERS else view


def plan_budget(
    recipe: Recipe, plan: Plan, *, eps: float, norm: str, eot_draws: int = UNMEASURED_DRAWS
) -> Budget:
    """Return the budget of a plan's attacks.

    Fixed step sizes belong to the recipe's eps: under another eps they are scaled with it, under another
    norm they become 2.5 eps over the number of steps. Only `adaptive` and single attacks restart. `eot_draws`
    holds where the recipe gives no number.
    """
    section, threat = recipe.evaluation, recipe.threat

    def step(size: float, steps: int) -> float:
        # Scaled, so that the same number of steps crosses a larger ball as often as the recipe's.
        return size * (eps / threat.eps) if norm == threat.norm else 2.5 * eps / steps

    return Budget(
        pgd_steps=section.pgd_steps,
        pgd_step_size=step(section.pgd_step_size, section.pgd_steps),
        apgd_steps=section.apgd_steps,
        eot_draws=section.eot_draws or eot_draws,
        pgd_eot_steps=section.pgd_eot_steps,
        pgd_eot_step_size=step(section.pgd_eot_step_size, section.pgd_eot_steps),
        square_queries=section.square_queries,
        restarts=section.restarts if plan.attack in ("adaptive", *ATTACKS) else 1,
    )
