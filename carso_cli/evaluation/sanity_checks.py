"""Sanity checks of an evaluation's number, from what its attacks met and did.

A check has a name, a value, a threshold, a verdict and one sentence of meaning; a check that was not run
says so and has no verdict. The checks here are drawn from stored records and gradient health and cost
nothing; those of `rerun_checks` attack a few images again.

Raised when (Explanation): gradients are NaN, infinite or zero, or outputs saturated, under every attack (all
stood still); a stronger attack, a surrogate or a black box does better than a white box (its gradients
mislead); no attack lowers the label's lead (nothing was attacked); the attacked view decides otherwise than
the defence. A check that compares accuracies says how many images must differ before it can fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite, log1p
from statistics import fmean
from typing import Any

from carso_cli.attacks.registry import FROM_TRANSFERS, TRANSFERS
from carso_cli.evaluation.protocols import BLACK_BOX, UNPERTURBED, Job, Plan
from carso_cli.runs.intervals import resolution, tolerance, wilson
from carso_cli.runs.records import Record
from carso_cli.runs.summary import worst_case

CHAIN = ("none", "noise", "fgsm", "pgd", "pgd-eot")
"""Attacks of growing strength on a deterministic model."""
RANDOM_CHAIN = ("none", "noise", "pgd-eot")
"""The same on a random one."""
_CHANCE_DIFFERENCE = 0.01
_SURROGATE_GAIN = 0.02
_RISES = 2.0
_MOST = 1000.0
"""Largest multiple that is shown."""
_STILL = 0.05


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
        # The attack that starts from transferred examples stands for itself only where there is no other.
        return [job for job in self.jobs if job.is_white_box] or self.named([FROM_TRANSFERS])

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
        _gradients_followed(evidence),
        *_gradients(evidence),
        _loss_rises(evidence),
        _examples_moved(evidence),
        _attack_order(evidence),
        gain_check(evidence, "black-box", evidence.white_box, evidence.named(BLACK_BOX), black_box),
        *_classifier_black_box(evidence, black_box),
        gain_check(evidence, "surrogates", evidence.white_box, _transfers(evidence), surrogates),
    ]


def _transfers(evidence: Evidence) -> list[Job]:
    # Alone, or on a classifier, the attack that starts from transferred examples has no surrogate beside it.
    jobs = evidence.named(TRANSFERS)
    return [*jobs, *evidence.named([FROM_TRANSFERS])] if jobs else []


def _classifier_black_box(evidence: Evidence, meaning: str) -> list[Check]:
    """Return the same check of the classifier that a defence is compared with."""
    jobs = evidence.plan.jobs_on("classifier")
    if not jobs or evidence.plan.headline_target == "classifier":
        return []
    own = [job for job in jobs if job.is_white_box]
    added = [job for job in jobs if job.attack in BLACK_BOX]
    return [gain_check(evidence, "classifier-black-box", own, added, f"of the classifier alone: {meaning}")]


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


@dataclass(frozen=True, eq=False)
class _Yardstick:
    """The white-box attack whose gradients were the most usable, on which the number rests."""

    job: Job
    name: str
    health: Mapping[str, Any]


def _yardstick(evidence: Evidence) -> _Yardstick | None:
    """Return the attack, or part of one, with the fewest unusable gradients; None where none asked for any.

    The best and not the worst: an attack that its own loss stopped, such as cross-entropy on huge logits,
    takes nothing from a number that another attack found.
    """
    found = [
        _Yardstick(job, f"{job.key} ({part})" if part else job.key, health)
        for job in evidence.aimed
        for part, health in evidence.health[job.key]["parts"].items()
        # A job whose images were all skipped recorded no gradient.
        if health["gradients"]
    ]

    def unusable(one: _Yardstick) -> float:
        # NaN and infinity are counted apart, so their shares may be added. Unknown saturation is the worst.
        shares = (one.health[kind] for kind in ("nan", "inf", "zero", "saturated"))
        return sum(1.0 if share is None else share for share in shares)

    return min(found, key=unusable, default=None)


def _gradients_followed(evidence: Evidence) -> Check:
    name = "gradients-followed"
    if all(job.attack == UNPERTURBED for job in evidence.jobs):
        return not_run(name, "nothing was attacked")
    if evidence.white_box and all(record.skipped for record in evidence.of(evidence.white_box)):
        return not_run(name, "no image was left to attack")
    asking = [job for job in evidence.white_box if evidence.health[job.key]["gradients"]]
    meaning = (
        "attacks that followed the target's own gradients; without one the number is an upper bound only"
    )
    return at_least(name, float(len(asking)), 1.0, meaning)


def _gradients(evidence: Evidence) -> list[Check]:
    best = _yardstick(evidence)
    saturated = "share of draws whose output gives the label probability 1 in float32, or is not finite"
    wanted = (
        ("nan-gradients", ("nan", "inf"), 0.0, "share of attack steps whose gradient is NaN or infinite"),
        (
            "zero-gradients",
            ("zero",),
            0.02,
            "share of attack steps whose gradient is exactly zero on an image that is still right",
        ),
        ("saturated-outputs", ("saturated",), 0.1, saturated),
    )

    def check(name: str, kinds: Sequence[str], threshold: float, meaning: str) -> Check:
        if best is None:
            return not_run(name, "no attack here asks the target for gradients")
        shares = [best.health[kind] for kind in kinds]
        if None in shares:
            return not_run(name, f"{best.name} does not tell")
        return at_most(name, sum(shares), threshold, f"{meaning}; the best attack, {best.name}, is shown")

    return [check(*one) for one in wanted]


def _falls(evidence: Evidence, job: Job) -> list[float]:
    """Return by how much the label's lead fell on each image that a job's gradients attacked."""
    # Of AutoAttack's parts one follows no gradients.
    records = [r for r in evidence.records[job.key] if not r.skipped and r.part not in BLACK_BOX]
    # A lead that is not finite is stored as None; it counts as still, not as moved.
    pairs = [(r.clean_margin, r.margin) for r in records]
    return [
        before - after
        if before is not None and after is not None and isfinite(before) and isfinite(after)
        else 0.0
        for before, after in pairs
    ]


def _loss_rises(evidence: Evidence) -> Check:
    name = "loss-rises"
    meaning = (
        "mean fall of the label's lead under attack, as a multiple of what random noise of that size "
        "changes; near 0 means that nothing was attacked"
    )
    noise = [fall for job in evidence.named(["noise"]) for fall in _falls(evidence, job)]
    found = [(fmean(falls), job.key) for job in evidence.aimed if (falls := _falls(evidence, job))]
    if not noise or not found:
        return not_run(name, "no attack by gradients ran beside random noise")
    # By noise, which has the scale of the logits: a share of the loss means another thing where logits are
    # tiny, and explodes where the loss is near 0.
    value, key = max(found)
    size = fmean(fall * fall for fall in noise) ** 0.5
    multiple = value / size if size > 0 else _MOST * (value > 0)
    return at_least(name, min(multiple, _MOST), _RISES, f"{meaning}; the best attack, {key}, is shown")


def _examples_moved(evidence: Evidence) -> Check:
    name = "examples-moved"
    found = []
    for job in evidence.aimed:
        if falls := _falls(evidence, job):
            count = len(falls)
            # Fails where the 95% interval of the share lies above what is allowed.
            fewest = next((k for k in range(count + 1) if wilson(k, count)[0] > _STILL), count)
            still = sum(fall <= 0 for fall in falls)
            found.append((still - fewest, still / count, (fewest - 1) / count, fewest, count, job.key))
    if not found:
        return not_run(name, "no attack followed the target's gradients")
    _, value, allowed, fewest, count, key = min(found)
    meaning = (
        f"share of attacked images whose margin did not fall; the best attack, {key}, is shown; fails from "
        f"{fewest} of {count} images"
    )
    return at_most(name, value, allowed, meaning)


def _attack_order(evidence: Evidence) -> Check:
    # On one target only: an attack's name stands for one job there.
    records = {job.attack: evidence.records[job.key] for job in evidence.jobs}
    # One draw of a random model may lead anywhere: nothing orders FGSM and PGD there.
    ordered = RANDOM_CHAIN if evidence.plan.headline_target == "defence" else CHAIN
    chain = [attack for attack in ordered if attack in records]
    rises, fewest = [], []
    for weaker, stronger in pairwise(chain):
        # Only where both ran: a skipped image counts with the result of another attack.
        before = {record.index: record.accuracy for record in records[weaker] if not record.skipped}
        attacked = [r for r in records[stronger] if not r.skipped and r.index in before]
        if changes := [record.accuracy - before[record.index] for record in attacked]:
            # Each pair has a tolerance of its own, as the number of images that both attacked differs.
            rises.append((sum(changes) / len(changes), tolerance(changes, _CHANCE_DIFFERENCE)))
            fewest.append(f"{resolution(len(changes), _CHANCE_DIFFERENCE)} of {len(changes)}")
    if not rises:
        return not_run("attack-order", "fewer than two attacks of growing strength ran on the same images")
    meaning = (
        f"largest rise of accuracy from one attack to a stronger one along {' >= '.join(chain)}; fails from "
        f"{', '.join(fewest)} images"
    )
    return at_most("attack-order", *least_within(rises), meaning)


def least_within(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the pair of value and tolerance whose value exceeds its tolerance most."""
    # Not the largest value: a small one may exceed its own tolerance by more.
    return max(pairs, key=lambda pair: pair[0] - pair[1])


def gain_check(
    evidence: Evidence, name: str, own: Sequence[Job], added: Sequence[Job], meaning: str
) -> Check:
    """Return a check that some jobs take away nothing beyond others; not run without either.

    What AutoAttack's black-box part finds counts with `added`. On a deterministic model no draw decides who
    gains: one image more than the allowed share is too many.
    """
    if not own or not (added or any(job.attack == "aa" for job in own)):
        return not_run(name, "this evaluation has no such attack beside a white-box one")
    # The unperturbed images count with both, so that a clean error is nobody's gain.
    # The worst is chosen on selection draws, so the difference on report draws may even be negative.
    target = own[0].target
    base = evidence.of([evidence.plan.jobs_on(target)[0], *own])
    after = {record.index: record.accuracy for record in worst_case([*base, *evidence.of(added)])}
    alone = worst_case([record for record in base if record.part not in BLACK_BOX])
    gains = [record.accuracy - after[record.index] for record in alone]
    certain = evidence.plan.attack == "audit" and all(record.draws == 1 for record in base)
    allowed = _SURROGATE_GAIN + 1.0 / len(gains) if certain else tolerance(gains, _SURROGATE_GAIN)
    fewest = int(allowed * len(gains)) + 1 if certain else resolution(len(gains), _SURROGATE_GAIN)
    return at_most(
        name,
        sum(gains) / len(gains),
        allowed,
        f"{meaning}; fails from {fewest} of {len(gains)} images",
    )


def chance_check(name: str, accuracies: Sequence[float], classes: int, meaning: str) -> Check:
    """Return a check that the mean of accuracies in [0, 1] is below chance, the paper's criterion (5.2)."""
    value, chance = sum(accuracies) / len(accuracies), 1.0 / classes
    return Check(name, value, chance, value < chance, meaning, "below")


def failed(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the checks that failed."""
    return [check["name"] for check in checks if check["passed"] is False]
