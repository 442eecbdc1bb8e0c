"""Whether an evaluation's number can be trusted: checks on what its attacks met and did.

A check has a name, a value, a threshold, a verdict and one sentence of meaning; a check that was not run
says so and has no verdict. These are drawn from stored records and gradient health and cost nothing;
`extra_checks` holds those that attack a few images again.

Raised when (Explanation): gradients are NaN, infinite or zero, or outputs saturated (the attack stood
still); a stronger attack, a surrogate or a black box does better than a white box (its gradients mislead);
the loss does not rise (nothing was attacked); the attacked view decides otherwise than the defence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite, log1p
from typing import Any

from carso_cli.attacks.registry import TRANSFERS
from carso_cli.evaluation.protocols import BLACK_BOX, Job, Plan
from carso_cli.runs.intervals import tolerance
from carso_cli.runs.records import Record
from carso_cli.runs.summary import worst_case

CHAIN = ("none", "noise", "fgsm", "pgd", "pgd-eot")
"""Attacks of growing strength."""
_CHANCE_DIFFERENCE = 0.01
_SURROGATE_GAIN = 0.02
_FLAT = 0.02
_WITH_DLR = ("rand-aa", "apgd-dlr", "aa")


@dataclass(frozen=True)
class Check:
    """One check; `passed` is None where it was not run or is shown for comparison only."""

    name: str
    value: float | None
    threshold: float | None
    passed: bool | None
    meaning: str
    bound: str | None = None
    """How the value must stand to the threshold: `at most` or `at least`."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def at_most(name: str, value: float | None, threshold: float, meaning: str) -> Check:
    """Return a check that passes while the value is known and not above the threshold."""
    return Check(name, value, threshold, value is not None and value <= threshold, meaning, "at most")


def at_least(name: str, value: float | None, threshold: float, meaning: str) -> Check:
    """Return a check that passes when the value is known and not below the threshold."""
    return Check(name, value, threshold, value is not None and value >= threshold, meaning, "at least")


def not_run(name: str, reason: str) -> Check:
    """Return a check without a verdict."""
    return Check(name, None, None, None, f"not run: {reason}")


@dataclass(frozen=True)
class Evidence:
    """What an evaluation stored.

    Args:
        plan: Its jobs.
        records: Records by job key.
        health: `carso_cli.runs.summary.job_health` by job key.
    """

    plan: Plan
    records: Mapping[str, Sequence[Record]]
    health: Mapping[str, Mapping[str, Any]]

    @property
    def white_box(self) -> list[Job]:
        """Jobs on the headline target that follow its own gradients."""
        return [job for job in self.plan.jobs_on(self.plan.headline_target) if job.is_white_box]

    @property
    def aimed(self) -> list[Job]:
        """The white-box jobs of several steps; plain PGD only where there is no stronger one."""
        jobs = [job for job in self.white_box if job.attack != "fgsm"]
        return [job for job in jobs if job.attack != "pgd"] or jobs

    def of(self, jobs: Sequence[Job]) -> list[Record]:
        """Return all records of some jobs."""
        return [record for job in jobs for record in self.records[job.key]]


def stored_checks(evidence: Evidence) -> list[Check]:
    """Return every check that the stored records allow."""
    return [
        _in_ball(evidence),
        _rule_agreement(evidence),
        _logit_lead(evidence),
        *_gradients(evidence),
        _loss_rises(evidence),
        _examples_moved(evidence),
        _attack_order(evidence),
        _surrogates(
            evidence,
            "black-box",
            BLACK_BOX,
            "accuracy that a black-box attack takes away beyond the white-box ones; a gain means that their "
            "gradients are masked",
        ),
        _surrogates(
            evidence,
            "surrogates",
            TRANSFERS,
            "accuracy that attacks on stand-ins take away beyond the white-box ones; a gain means that the "
            "attacked view misleads",
        ),
    ]


def _in_ball(evidence: Evidence) -> Check:
    meaning = (
        "largest change of an example as a share of eps; every example is measured again after its attack"
    )
    shares = [
        record.distance / record.eps
        for records in evidence.records.values()
        for record in records
        if record.eps > 0 and not record.skipped
    ]
    return (
        at_most("in-ball", max(shares), 1.001, meaning)
        if shares
        else not_run("in-ball", "nothing was perturbed")
    )


def _rule_agreement(evidence: Evidence) -> Check:
    jobs = evidence.plan.jobs_on("defence")
    if not jobs:
        return not_run("rule-agreement", "a bare classifier has one view")
    records = [record for record in evidence.of(jobs) if not record.skipped]
    share = sum(record.disagreements for record in records) / sum(record.draws for record in records)
    return at_most(
        "rule-agreement",
        share,
        0.0,
        "share of scored draws in which the exact view's largest class is not the defence's own decision",
    )


def _logit_lead(evidence: Evidence) -> Check:
    clean = evidence.records[evidence.plan.jobs_on(evidence.plan.headline_target)[0].key]
    leads = [record.margin for record in clean if record.margin is not None and isfinite(record.margin)]
    if not leads:
        return not_run("logit-lead", "no image has finite logits")
    meaning = (
        "mean lead of the label's logit over the next on unperturbed images, for comparison: from "
        f"{min(leads):.3g} to {max(leads):.3g}"
    )
    if clean[0].aggregation == "doubly-exponential":
        # float32 loses 1 - P where the sums of exponentials are 17 apart.
        bound = log1p(17.0 / (clean[0].n_samples or 1))
        meaning += f"; log(P / (1 - P)) saturates where they lead others near 0 by about {bound:.2g}"
    return Check("logit-lead", sum(leads) / len(leads), None, None, meaning)


def _gradients(evidence: Evidence) -> list[Check]:
    def seen(job: Job, name: str) -> Mapping[str, Any]:
        """Return the health that a check looks at: of all steps, or of the first."""
        health = evidence.health[job.key]
        # The DLR loss is constant, and rightly so, where the label has fallen to the third place.
        return health["steps"][0] if name == "zero-gradients" and job.attack in _WITH_DLR else health

    def worst(name: str, shares: tuple[str, ...], threshold: float, meaning: str) -> Check:
        """Return the check of the white-box job with the largest sum of some shares."""
        found = [
            (sum(seen(job, name)[share] or 0.0 for share in shares), job.key)
            for job in evidence.white_box
            if evidence.health[job.key]["gradients"]
        ]
        if not found:
            return not_run(name, "no attack here asks the target for gradients")
        value, job = max(found)
        return at_most(name, value, threshold, f"{meaning}; the worst attack, {job}, is shown")

    return [
        worst(
            "nan-gradients", ("nan", "inf"), 0.0, "share of attack steps whose gradient is NaN or infinite"
        ),
        worst("zero-gradients", ("zero",), 0.02, "share of attack steps whose gradient is exactly zero"),
        worst(
            "saturated-outputs",
            ("saturated",),
            0.1,
            "share of draws whose output gives the label probability 1 in float32, or is not finite",
        ),
    ]


def _loss_rises(evidence: Evidence) -> Check:
    meaning = (
        "smallest rise of an attack's mean loss, as a share of its first; flat means nothing was attacked"
    )
    rises: list[float] = []
    silent = False
    for job in evidence.aimed:
        steps = evidence.health[job.key]["steps"]
        # Libraries that keep the labels to themselves show neither loss nor saturation.
        if len(steps) < 2 or all(step["saturated"] is None for step in steps):
            continue
        losses = [step["loss"] for step in steps]
        later = [loss for loss in losses[1:] if loss is not None]
        if losses[0] is None or not later:
            silent = True
        else:
            rises.append((max(later) - losses[0]) / max(abs(losses[0]), 1e-6))
    if silent:
        return at_least("loss-rises", None, _FLAT, f"{meaning}; here the loss is not even finite")
    if not rises:
        return not_run("loss-rises", "no attack here shows its loss at several steps")
    return at_least("loss-rises", min(rises), _FLAT, meaning)


def _examples_moved(evidence: Evidence) -> Check:
    name = "examples-moved"
    shares = []
    for job in evidence.aimed:
        attacked = [record for record in evidence.records[job.key] if not record.skipped]
        still = [
            record
            for record in attacked
            if record.margin is None or record.clean_margin is None or record.margin >= record.clean_margin
        ]
        if attacked:
            shares.append((len(still) / len(attacked), job.key))
    if not shares:
        return not_run(name, "no attack followed the target's gradients")
    value, job_key = max(shares)
    meaning = f"share of attacked images whose margin did not fall; the worst attack, {job_key}, is shown"
    return at_most(name, value, 0.05, meaning)


def _attack_order(evidence: Evidence) -> Check:
    name = "attack-order"
    own = {job.attack: job for job in evidence.plan.jobs_on(evidence.plan.headline_target)}
    chain = [attack for attack in CHAIN if attack in own]
    steps = [
        found
        for weaker, stronger in pairwise(chain)
        if (found := _rise(evidence.records[own[weaker].key], evidence.records[own[stronger].key]))
    ]
    if not steps:
        return not_run(name, "fewer than two attacks of growing strength ran on the same images")
    value, threshold = max(steps, key=lambda step: step[0] - step[1])
    meaning = f"largest rise of accuracy from one attack to a stronger one along {' >= '.join(chain)}"
    return at_most(name, value, threshold, meaning)


def _rise(weaker: Sequence[Record], stronger: Sequence[Record]) -> tuple[float, float] | None:
    """Return how much higher the stronger attack's accuracy is where both ran, and what chance allows."""
    before = {record.index: record.accuracy for record in weaker if not record.skipped}
    changes = [r.accuracy - before[r.index] for r in stronger if not r.skipped and r.index in before]
    return (sum(changes) / len(changes), tolerance(changes, _CHANCE_DIFFERENCE)) if changes else None


def _surrogates(evidence: Evidence, name: str, attacks: Sequence[str], meaning: str) -> Check:
    own = evidence.plan.jobs_on(evidence.plan.headline_target)
    added = [job for job in own if job.attack in attacks]
    if not added or not evidence.white_box:
        return not_run(name, "this evaluation has no such attack beside a white-box one")
    base = [own[0], *evidence.white_box]
    gains = _paired(worst_case(evidence.of(base)), worst_case(evidence.of([*base, *added])))
    return at_most(name, sum(gains) / len(gains), tolerance(gains, _SURROGATE_GAIN), meaning)


def _paired(before: Sequence[Record], after: Sequence[Record]) -> list[float]:
    lower = {record.index: record.accuracy for record in after}
    return [record.accuracy - lower[record.index] for record in before]


def chance_check(name: str, records: Sequence[float], classes: int, meaning: str) -> Check:
    """Return a check that a mean accuracy is at chance, within two standard errors of guessing.

    Args:
        name: Name of the check.
        records: Accuracy of each image, in [0, 1].
        classes: Number of classes.
        meaning: What it means.
    """
    chance = 1.0 / classes
    slack = 2.0 * (chance * (1.0 - chance) / len(records)) ** 0.5
    return at_most(name, sum(records) / len(records), chance + slack, meaning)


def failed(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the checks that failed."""
    return [check["name"] for check in checks if check["passed"] is False]
