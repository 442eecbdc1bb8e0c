"""Sanity checks of an evaluation's number, from what its attacks met and did.

A check has a name, a value, a threshold, a verdict and one sentence of meaning; a check that was not run
says so and has no verdict. The checks here are drawn from stored records and gradient health and cost
nothing; those of `rerun_checks` attack a few images again.

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
_WITH_DLR = ("rand-aa", "authors-rand-aa", "apgd-dlr", "aa")


@dataclass(frozen=True)
class Check:
    """One check; `passed` is None where it was not run or is shown for comparison only."""

    name: str
    value: float | None
    threshold: float | None
    passed: bool | None
    meaning: str
    bound: str | None = None
    """How the value must stand to the threshold: `at most`, `below` or `at least`."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def at_most(name: str, value: float | None, threshold: float, meaning: str) -> Check:
    """Return a check that passes while the value is known and not above the threshold."""
    # What is unknown fails: a check that could not see must not pass.
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
    def jobs(self) -> list[Job]:
        """Jobs on the headline target; the first is the unperturbed one."""
        return self.plan.jobs_on(self.plan.headline_target)

    @property
    def white_box(self) -> list[Job]:
        """Jobs on the headline target that follow its own gradients."""
        return [job for job in self.jobs if job.is_white_box]

    def named(self, attacks: Sequence[str]) -> list[Job]:
        """Return the jobs on the headline target whose attack is among some."""
        return [job for job in self.jobs if job.attack in attacks]

    @property
    def aimed(self) -> list[Job]:
        """The white-box jobs of several steps; plain PGD only where there is no stronger one."""
        # One step has no trajectory, and may overshoot: FGSM says nothing of whether losses rise.
        jobs = [job for job in self.white_box if job.attack != "fgsm"]
        return [job for job in jobs if job.attack != "pgd"] or jobs

    def of(self, jobs: Sequence[Job]) -> list[Record]:
        """Return all records of some jobs."""
        return [record for job in jobs for record in self.records[job.key]]


def stored_checks(evidence: Evidence) -> list[Check]:
    """Return every check that the stored records allow."""
    gain = "accuracy that {} beyond the white-box ones; a gain means that {}"
    black_box = gain.format("a black-box attack takes away", "their gradients are masked")
    surrogates = gain.format("attacks on surrogates take away", "the attacked view misleads")
    return [
        in_ball_check(evidence),
        _rule_agreement(evidence),
        _logit_lead(evidence),
        *_gradients(evidence),
        _loss_rises(evidence),
        _examples_moved(evidence),
        _attack_order(evidence),
        gain_check(evidence, "black-box", evidence.white_box, evidence.named(BLACK_BOX), black_box),
        gain_check(evidence, "surrogates", evidence.white_box, evidence.named(TRANSFERS), surrogates),
    ]


def in_ball_check(evidence: Evidence) -> Check:
    """Return a check that no example is farther from its image than eps."""
    records = (record for records in evidence.records.values() for record in records)
    shares = [record.distance / record.eps for record in records if record.eps > 0 and not record.skipped]
    if not shares:
        return not_run("in-ball", "nothing was perturbed")
    meaning = (
        "largest change of an example as a share of eps; every example is measured again after its attack"
    )
    # Room for float32: an eps such as 8/255 is rounded, and so is the change of each pixel.
    return at_most("in-ball", max(shares), 1.001, meaning)


def _rule_agreement(evidence: Evidence) -> Check:
    records = [r for r in evidence.of(evidence.plan.jobs_on("defence")) if not r.skipped]
    if not records:
        return not_run("rule-agreement", "a bare classifier has one view")
    share = sum(record.disagreements for record in records) / sum(record.draws for record in records)
    meaning = (
        "share of scored draws in which the exact view's largest class is not the defence's own decision"
    )
    # None at all: attacking the exact view is fair only as it is the same decision.
    return at_most("rule-agreement", share, 0.0, meaning)


def _logit_lead(evidence: Evidence) -> Check:
    clean = evidence.records[evidence.jobs[0].key]
    leads = [record.margin for record in clean if record.margin is not None and isfinite(record.margin)]
    if not leads:
        return not_run("logit-lead", "no image has finite logits")
    meaning = (
        "mean lead of the label's logit over the next on unperturbed images, for comparison: from "
        f"{min(leads):.3g} to {max(leads):.3g}"
    )
    if clean[0].aggregation == "doubly-exponential":
        # float32 loses 1 - P where the sums of exponentials are 17 apart.
        # With a lead m over logits near 0, N exp(m) - N = 17 gives m = log(1 + 17 / N).
        bound = log1p(17.0 / (clean[0].n_samples or 1))
        meaning += f"; log(P / (1 - P)) saturates where they lead others near 0 by about {bound:.2g}"
    return Check("logit-lead", sum(leads) / len(leads), None, None, meaning)


def _gradients(evidence: Evidence) -> list[Check]:
    def share(job: Job, name: str, kinds: Sequence[str]) -> float:
        health = evidence.health[job.key]
        # The DLR loss is constant once the label has fallen to the third place: only the first step counts.
        if name == "zero-gradients" and job.attack in _WITH_DLR:
            health = health["steps"][0]
        # NaN and infinity are counted apart, so their shares may be added.
        return sum(health[kind] or 0.0 for kind in kinds)

    def worst(name: str, kinds: Sequence[str], threshold: float, meaning: str) -> Check:
        # A job whose images were all skipped recorded no gradient.
        asking = [job for job in evidence.white_box if evidence.health[job.key]["gradients"]]
        if not asking:
            return not_run(name, "no attack here asks the target for gradients")
        # The worst attack and not the mean: one that stood still would hide among others that moved.
        value, key = max((share(job, name, kinds), job.key) for job in asking)
        return at_most(name, value, threshold, f"{meaning}; the worst attack, {key}, is shown")

    saturated = "share of draws whose output gives the label probability 1 in float32, or is not finite"
    return [
        worst(
            "nan-gradients", ("nan", "inf"), 0.0, "share of attack steps whose gradient is NaN or infinite"
        ),
        worst("zero-gradients", ("zero",), 0.02, "share of attack steps whose gradient is exactly zero"),
        worst("saturated-outputs", ("saturated",), 0.1, saturated),
    ]


def _loss_rises(evidence: Evidence) -> Check:
    name = "loss-rises"
    meaning = (
        "smallest rise of an attack's mean loss, as a share of its first; flat means nothing was attacked"
    )
    rises: list[float] = []
    for job in evidence.aimed:
        steps = evidence.health[job.key]["steps"]
        # Library attacks do not pass their labels on, so neither loss nor saturation is known.
        if len(steps) < 2 or all(step["saturated"] is None for step in steps):
            continue
        # The largest loss on the way, since an attack returns its best point and not its last.
        first, *later = (step["loss"] for step in steps)
        known = [loss for loss in later if loss is not None]
        if first is None or not known:
            return at_least(name, None, _FLAT, f"{meaning}; here the loss is not even finite")
        rises.append((max(known) - first) / max(abs(first), 1e-6))
    if not rises:
        return not_run(name, "no attack here shows its loss at several steps")
    return at_least(name, min(rises), _FLAT, meaning)


def _examples_moved(evidence: Evidence) -> Check:
    def is_still(record: Record) -> bool:
        margins = (record.margin, record.clean_margin)
        # A margin that was not finite is stored as None; it counts as still, not as moved.
        return margins[0] is None or margins[1] is None or margins[0] >= margins[1]

    shares = []
    for job in evidence.aimed:
        still = [is_still(record) for record in evidence.records[job.key] if not record.skipped]
        if still:
            shares.append((sum(still) / len(still), job.key))
    if not shares:
        return not_run("examples-moved", "no attack followed the target's gradients")
    value, key = max(shares)
    meaning = f"share of attacked images whose margin did not fall; the worst attack, {key}, is shown"
    return at_most("examples-moved", value, 0.05, meaning)


def _attack_order(evidence: Evidence) -> Check:
    # On one target only: an attack's name stands for one job there.
    records = {job.attack: evidence.records[job.key] for job in evidence.jobs}
    chain = [attack for attack in CHAIN if attack in records]
    rises = []
    for weaker, stronger in pairwise(chain):
        # Only where both ran: a skipped image counts with the result of another attack.
        before = {record.index: record.accuracy for record in records[weaker] if not record.skipped}
        attacked = [r for r in records[stronger] if not r.skipped and r.index in before]
        if changes := [record.accuracy - before[record.index] for record in attacked]:
            # Each pair has a tolerance of its own, as the number of images that both attacked differs.
            rises.append((sum(changes) / len(changes), tolerance(changes, _CHANCE_DIFFERENCE)))
    if not rises:
        return not_run("attack-order", "fewer than two attacks of growing strength ran on the same images")
    meaning = f"largest rise of accuracy from one attack to a stronger one along {' >= '.join(chain)}"
    return at_most("attack-order", *least_within(rises), meaning)


def least_within(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the pair of value and tolerance whose value exceeds its tolerance most."""
    # Not the largest value: a small one may exceed its own tolerance by more.
    return max(pairs, key=lambda pair: pair[0] - pair[1])


def gain_check(
    evidence: Evidence, name: str, own: Sequence[Job], added: Sequence[Job], meaning: str
) -> Check:
    """Return a check that some jobs take away nothing beyond others; not run without either.

    On a deterministic model no draw decides who gains: one image more than the allowed share is too many.
    """
    if not own or not added:
        return not_run(name, "this evaluation has no such attack beside a white-box one")
    # The unperturbed images count with both, so that a clean error is nobody's gain.
    # The worst is chosen on selection draws, so the difference on report draws may even be negative.
    base = [evidence.jobs[0], *own]
    after = {record.index: record.accuracy for record in worst_case(evidence.of([*base, *added]))}
    gains = [record.accuracy - after[record.index] for record in worst_case(evidence.of(base))]
    certain = evidence.plan.attack == "audit" and all(record.draws == 1 for record in evidence.of(base))
    allowed = _SURROGATE_GAIN + 1.0 / len(gains) if certain else tolerance(gains, _SURROGATE_GAIN)
    return at_most(name, sum(gains) / len(gains), allowed, meaning)


def chance_check(name: str, accuracies: Sequence[float], classes: int, meaning: str) -> Check:
    """Return a check that the mean of accuracies in [0, 1] is below chance, the paper's criterion (5.2)."""
    value, chance = sum(accuracies) / len(accuracies), 1.0 / classes
    return Check(name, value, chance, value < chance, meaning, "below")


def failed(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the checks that failed."""
    return [check["name"] for check in checks if check["passed"] is False]
