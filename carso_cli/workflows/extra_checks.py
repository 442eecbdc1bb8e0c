"""Trust checks that attack a few images again: more steps, more eps, other draws.

They run on `IMAGES` images spread evenly over those evaluated, whatever the recipe says, with the plan's
first main attack on its view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.registry import Budget
from carso_cli.attacks.target import AttackTarget
from carso_cli.reporter import Reporter
from carso_cli.runs.intervals import tolerance
from carso_cli.workflows.evaluation_jobs import Setting, perturb, pick
from carso_cli.workflows.evaluation_plan import Job, Plan
from carso_cli.workflows.trust_checks import Check, Evidence, at_least, at_most, chance_check, not_run

IMAGES = 32
LARGE_EPS = 0.95
"""In pixel units (Table 3); under l2, times the square root of the number of pixels."""
NAMES = ("twice-the-steps", "eot-adequacy", "falls-with-eps", "large-eps-attack", "large-eps-noise")
_STEPS_MATTER = 0.005
_ADEQUATE_COSINE = 0.5


def skipped_checks(reason: str) -> list[Check]:
    """Return every check of this module as not run."""
    return [not_run(name, reason) for name in NAMES]


def extra_checks(
    setting: Setting, plan: Plan, evidence: Evidence, classes: int, reporter: Reporter
) -> list[Check]:
    """Run every check of this module.

    Args:
        setting: Models, images, threat and budget of the evaluation.
        plan: Its jobs.
        evidence: What it stored.
        classes: Number of classes C.
        reporter: Where progress goes.
    """
    job = plan.strongest
    if job is None:
        return skipped_checks("the plan holds no white-box attack")
    positions = spread(len(setting.images), IMAGES)
    base = _stored(evidence, job, setting, positions)
    aimed = Job(job.target, "apgd-ce", job.view)
    large = _large_eps(setting)
    with reporter.progress("trust checks", 5, "runs") as progress:
        twice = _accuracies(replace(setting, budget=_doubled(setting.budget)), job, positions)
        progress.advance()
        adequacy = _eot_adequacy(setting, job, positions)
        progress.advance()
        wider = _accuracies(_at(setting, 2.0 * float(setting.threat.eps)), aimed, positions)
        progress.advance()
        widest = _accuracies(_at(setting, large), aimed, positions)
        progress.advance()
        noise = _accuracies(_at(setting, large), Job(job.target, "noise"), positions)
        progress.advance()
    return [
        _twice_the_steps(base, twice, job),
        adequacy,
        _falls_with_eps([base, wider, widest]),
        chance_check(
            "large-eps-attack",
            widest,
            classes,
            f"accuracy under apgd-ce at eps {large:.4g}, where any image can become any other",
        ),
        Check(
            "large-eps-noise",
            sum(noise) / len(noise),
            None,
            None,
            f"for comparison: accuracy under random noise at eps {large:.4g}, where nobody aims",
        ),
    ]


def spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` positions spread evenly over `range(count)`."""
    taken = min(count, wanted)
    return [place * count // taken for place in range(taken)]


def _stored(evidence: Evidence, job: Job, setting: Setting, positions: Sequence[int]) -> list[float]:
    by_index = {record.index: record.accuracy for record in evidence.records[job.key]}
    return [by_index[index] for index in setting.images.indices[list(positions)].tolist()]


def _accuracies(setting: Setting, job: Job, positions: Sequence[int]) -> list[float]:
    """Attack some images; return the share of report draws that each survives."""
    images, labels, indices = setting.pixels(positions)
    scorer = setting.subject.scorer(job, setting.seed, setting.draws)
    found = pick(setting, scorer, perturb(setting, job, images, labels, "check"), images, labels, indices)
    return [correct / found.report.draws for correct in found.report.correct.tolist()]


def _twice_the_steps(base: Sequence[float], twice: Sequence[float], job: Job) -> Check:
    drops = [before - after for before, after in zip(base, twice, strict=True)]
    return at_most(
        "twice-the-steps",
        sum(drops) / len(drops),
        tolerance(drops, _STEPS_MATTER),
        f"accuracy that {job.attack} takes away with twice its steps, on {len(drops)} images; the budget "
        "is too small by that much",
    )


def _doubled(budget: Budget) -> Budget:
    return replace(
        budget,
        pgd_steps=2 * budget.pgd_steps,
        apgd_steps=2 * budget.apgd_steps,
        pgd_eot_steps=2 * budget.pgd_eot_steps,
    )


def _eot_adequacy(setting: Setting, job: Job, positions: Sequence[int]) -> Check:
    images, labels, _ = setting.pixels(positions)
    draws = setting.budget.eot_draws
    targets = [setting.subject.target(job, setting.seed, f"cosine {number}") for number in range(2)]
    if not targets[0].stochastic:
        return not_run("eot-adequacy", "the target is deterministic")
    value = mean_cosine(targets, images, labels, draws)
    meaning = f"mean cosine between two gradients, each averaged over {draws} draws; low means too few draws"
    return at_least("eot-adequacy", value, _ADEQUATE_COSINE, meaning)


def mean_cosine(targets: Sequence[AttackTarget], images: Tensor, labels: Tensor, draws: int) -> float:
    """Return the mean cosine between two targets' gradients; an unusable gradient counts as 0."""
    first, second = (
        target.loss_and_gradient(images, labels, cross_entropy, draws).gradient.double().flatten(1)
        for target in targets
    )
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=1, eps=1e-30)
    return float(torch.nan_to_num(cosine, nan=0.0, posinf=0.0, neginf=0.0).mean())


def _falls_with_eps(accuracies: Sequence[Sequence[float]]) -> Check:
    rises = [
        [after - before for before, after in zip(smaller, larger, strict=True)]
        for smaller, larger in pairwise(accuracies)
    ]
    scored = [(sum(rise) / len(rise), tolerance(rise, 0.01)) for rise in rises]
    value, threshold = max(scored, key=lambda pair: pair[0] - pair[1])
    meaning = "largest rise of accuracy from a smaller eps to a larger one, among eps, 2 eps and the largest"
    return at_most("falls-with-eps", value, threshold, meaning)


def _large_eps(setting: Setting) -> float:
    pixels = setting.images.images[0].numel()
    return LARGE_EPS * (pixels**0.5 if setting.threat.norm == "l2" else 1.0)


def _at(setting: Setting, eps: float) -> Setting:
    return replace(setting, threat=replace(setting.threat, eps=eps))
