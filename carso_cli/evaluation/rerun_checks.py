"""Trust checks that attack a few images again: more steps, more eps, other draws.

They run on `IMAGES` images spread evenly over those evaluated, whatever the recipe says, with the plan's
first main attack on its view.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.registry import Budget
from carso_cli.attacks.target import AttackTarget
from carso_cli.distributed.world import World
from carso_cli.evaluation.attack_batch import Setting, perturb, select_worst
from carso_cli.evaluation.protocols import Job, Plan
from carso_cli.evaluation.sanity_checks import Check, Evidence, at_least, at_most, chance_check, not_run
from carso_cli.runs.intervals import tolerance
from carso_cli.runs.records import EvaluationFolder
from carso_cli.runtime.reporter import Reporter

IMAGES = 32
LARGE_EPS = 0.95
"""In pixel units (Table 3); under l2, times the square root of the number of pixels."""
NAMES = ("twice-the-steps", "eot-adequacy", "falls-with-eps", "large-eps-attack", "large-eps-noise")
_THOROUGH = ("adaptive", "published")
"""Protocols that attack a few images again for their trust checks."""
_STEPS_MATTER = 0.005
_ADEQUATE_COSINE = 0.5


@dataclass(frozen=True, eq=False)
class Rerun:
    """Work on a few images that a check needs.

    Args:
        name: The check, one of `NAMES`.
        job: The attack; for `eot-adequacy` the one whose gradients are compared.
        setting: The evaluation's setting, with the budget or eps of this rerun.
    """

    name: str
    job: Job
    setting: Setting

    def positions(self) -> list[int]:
        """Return the positions of its images."""
        return spread(len(self.setting.images), IMAGES)

    def values(self) -> list[float]:
        """Run it.

        Returns:
            The share of report draws that each image survives; for `eot-adequacy` the mean cosine, or nothing
            where the target is deterministic.
        """
        if self.name == "eot-adequacy":
            return _cosines(self.setting, self.job, self.positions())
        return _accuracies(self.setting, self.job, self.positions())


def plan_reruns(setting: Setting, plan: Plan) -> list[Rerun]:
    """Return what the checks of this module will run, in the order of `NAMES`; nothing where none is run."""
    job = plan.strongest
    if plan.attack not in _THOROUGH or job is None:
        return []
    aimed, large = Job(job.target, "apgd-ce", job.view), _at(setting, _large_eps(setting))
    return [
        Rerun("twice-the-steps", job, replace(setting, budget=_doubled(setting.budget))),
        Rerun("eot-adequacy", job, setting),
        Rerun("falls-with-eps", aimed, _at(setting, 2.0 * float(setting.threat.eps))),
        Rerun("large-eps-attack", aimed, large),
        Rerun("large-eps-noise", Job(job.target, "noise"), large),
    ]


def rerun_checks(
    setting: Setting,
    plan: Plan,
    evidence: Evidence,
    folder: EvaluationFolder,
    world: World,
    reporter: Reporter,
) -> list[Check]:
    """Run every check of this module; what the folder holds already is not run again.

    Args:
        setting: Models, images, threat and budget of the evaluation.
        plan: Its jobs.
        evidence: What it stored.
        folder: Where each rerun is stored as it finishes.
        world: The processes that share the reruns.
        reporter: Where progress goes.
    """
    reruns = plan_reruns(setting, plan)
    if not reruns:
        reason = (
            "the plan holds no white-box attack"
            if plan.attack in _THOROUGH
            else "only the adaptive and published protocols attack images again to check themselves"
        )
        return [not_run(name, reason) for name in NAMES]
    found = _run_missing(reruns, folder, world, reporter)
    job, positions = reruns[0].job, reruns[0].positions()
    base = _stored(evidence, job, setting, positions)
    widest, noise = found["large-eps-attack"], found["large-eps-noise"]
    large = _large_eps(setting)
    return [
        _twice_the_steps(base, found["twice-the-steps"], job),
        _eot_adequacy(found["eot-adequacy"], setting.budget.eot_draws),
        _falls_with_eps([base, found["falls-with-eps"], widest]),
        chance_check(
            "large-eps-attack",
            widest,
            len(setting.images.classes),
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


def _run_missing(
    reruns: Sequence[Rerun], folder: EvaluationFolder, world: World, reporter: Reporter
) -> dict[str, list[float]]:
    """Run and store what is not stored; return all values by name."""
    images = len(reruns[0].positions())
    stored = world.on_main(lambda: folder.read_checks(images))
    found: dict[str, list[float]] = {name: line["values"] for name, line in stored.items()}
    missing = [rerun for rerun in reruns if rerun.name not in found]
    with reporter.progress("trust checks", len(reruns), "runs") as progress:
        if found:
            progress.advance(len(found))
        for rerun, (values, seconds) in world.map_sharded(missing, _timed):
            found[rerun.name] = values
            if world.is_main:
                folder.append_check(rerun.name, images, values, seconds)
            progress.advance()
    return found


def _timed(rerun: Rerun) -> tuple[list[float], float]:
    started = time.perf_counter()
    return rerun.values(), time.perf_counter() - started


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
    scorer = setting.models.scorer(job, setting.seed, setting.draws)
    found = select_worst(
        setting, scorer, perturb(setting, job, images, labels, "check"), images, labels, indices
    )
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


def _cosines(setting: Setting, job: Job, positions: Sequence[int]) -> list[float]:
    images, labels, _ = setting.pixels(positions)
    targets = [setting.models.target(job, setting.seed, f"cosine {number}") for number in range(2)]
    if not targets[0].stochastic:
        return []
    return [mean_cosine(targets, images, labels, setting.budget.eot_draws)]


def _eot_adequacy(cosines: Sequence[float], draws: int) -> Check:
    if not cosines:
        return not_run("eot-adequacy", "the target is deterministic")
    meaning = f"mean cosine between two gradients, each averaged over {draws} draws; low means too few draws"
    return at_least("eot-adequacy", cosines[0], _ADEQUATE_COSINE, meaning)


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
