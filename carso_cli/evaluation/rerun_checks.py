"""Sanity checks that attack a few images again: more steps, more eps, other draws.

They run on `IMAGES` images spread evenly over those evaluated, whatever the recipe says, with the plan's
first main attack on its view.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from carso_cli.attacks.losses import margin
from carso_cli.attacks.target import AttackTarget
from carso_cli.distributed.world import World
from carso_cli.evaluation.attack_batch import Setting, perturb, run_blocks, select_worst
from carso_cli.evaluation.protocols import Job, Plan
from carso_cli.evaluation.sanity_checks import (
    Check,
    Evidence,
    at_least,
    at_most,
    chance_check,
    least_within,
    not_run,
)
from carso_cli.runs.intervals import resolution, tolerance
from carso_cli.runs.records import EvaluationFolder, Record
from carso_cli.runs.summary import worst_case
from carso_cli.runtime.reporter import Reporter

IMAGES = 32
LARGE_EPS = 0.95
"""In pixel units (Table 3); under l2, times the square root of the number of pixels."""
NAMES = ("twice-the-steps", "eot-adequacy", "falls-with-eps", "large-eps-attack", "large-eps-noise")
_THOROUGH = ("adaptive", "published")
"""Protocols that attack a few images again for their sanity checks."""
_STEPS_MATTER = 0.005
_ADEQUATE_COSINE = 0.5
_AGREE = 0.8
"""Cosine of two mean gradients from which more samples of a random model change little."""


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
        setting, job = self.setting, self.job
        batch = setting.batch(self.positions())
        if self.name == "eot-adequacy":
            # Same weights, other latents: the gradients differ by the draws alone.
            targets = [setting.models.target(job, setting.seed, f"cosine {number}") for number in range(2)]
            if not targets[0].stochastic:
                return []
            return [mean_cosine(targets, batch.images, batch.labels, setting.budget.eot_draws)]
        # A block of its own name, so that attack and latents differ from those of the evaluation.
        report = select_worst(setting, job, perturb(setting, job, batch, "check"), batch).report
        return [correct / report.draws for correct in report.correct.tolist()]


def spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` positions spread evenly over `range(count)`."""
    taken = min(count, wanted)
    return [place * count // taken for place in range(taken)]


def mean_cosine(targets: Sequence[AttackTarget], images: Tensor, labels: Tensor, draws: int) -> float:
    """Return the mean cosine between two targets' gradients; an unusable gradient counts as 0."""
    first, second = (
        # In float64: squares of gradients below 1e-23 are zero in float32.
        # Of the margin: cross-entropy is flat where logits are huge.
        target.loss_and_gradient(images, labels, margin, draws).gradient.double().flatten(1)
        for target in targets
    )
    # Tiny, as the default of 1e-8 would shrink the cosine of faint gradients.
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=1, eps=1e-30)
    return float(torch.nan_to_num(cosine, nan=0.0, posinf=0.0, neginf=0.0).mean())


def adequate_draws(target: Callable[[str], AttackTarget], images: Tensor, labels: Tensor, most: int) -> int:
    """Return the smallest power of two of EoT samples whose mean gradients agree, at most `most`.

    Args:
        target: Makes the target with random numbers of its own for each name.
        images: (B, channels, H, W), a few.
        labels: (B,) int64.
        most: Where gradients never agree, this many.
    """
    samples = 1
    while samples < most:
        targets = [target(f"cosine {number}") for number in range(2)]
        if not targets[0].stochastic or mean_cosine(targets, images, labels, samples) >= _AGREE:
            return samples
        samples *= 2
    return most


def plan_reruns(setting: Setting, plan: Plan) -> list[Rerun]:
    """Return what the checks of this module will run, in the order of `NAMES`; nothing where none is run."""
    job, budget = plan.strongest, setting.budget
    if plan.attack not in _THOROUGH or job is None:
        return []
    twice = replace(
        budget,
        pgd_steps=2 * budget.pgd_steps,
        apgd_steps=2 * budget.apgd_steps,
        pgd_eot_steps=2 * budget.pgd_eot_steps,
    )
    twice_eps, large_eps = (
        replace(setting, threat=replace(setting.threat, eps=eps))
        # A larger eps keeps the step sizes of the budget; Auto-PGD, which sets its own, is run at both.
        for eps in (2.0 * float(setting.threat.eps), _large_eps(setting))
    )
    # On the plan's own view: the question is whether the attack used there could get through.
    # By the loss that huge logits do not stop, where the protocol has it.
    has_margin = any(one.attack == "apgd-targeted" for one in plan.jobs)
    aimed = Job(job.target, "apgd-targeted" if has_margin else "apgd-ce", job.view)
    return [
        Rerun("twice-the-steps", job, replace(setting, budget=twice)),
        Rerun("eot-adequacy", job, setting),
        Rerun("falls-with-eps", aimed, twice_eps),
        Rerun("large-eps-attack", aimed, large_eps),
        Rerun("large-eps-noise", Job(job.target, "noise"), large_eps),
    ]


def _large_eps(setting: Setting) -> float:
    # All entries, channels too: the l2 length of a change of 0.95 everywhere.
    pixels = setting.images.images[0].numel()
    return LARGE_EPS * (pixels**0.5 if setting.threat.norm == "l2" else 1.0)


def rerun_checks(
    setting: Setting, evidence: Evidence, folder: EvaluationFolder, world: World, reporter: Reporter
) -> list[Check]:
    """Run every check of this module; each is stored in the folder as it finishes, and not run again."""
    plan = evidence.plan
    reruns = {rerun.name: rerun for rerun in plan_reruns(setting, plan)}
    if not reruns:
        reason = (
            "the plan holds no white-box attack"
            if plan.attack in _THOROUGH
            else "only the adaptive and published protocols attack images again to check themselves"
        )
        return [not_run(name, reason) for name in NAMES]
    first = reruns[NAMES[0]]
    positions = first.positions()

    def timed(name: str) -> tuple[list[float], float]:
        started = time.perf_counter()
        return reruns[name].values(), time.perf_counter() - started

    lines = world.on_main(lambda: folder.read_checks(len(positions)))
    done = run_blocks(
        dict.fromkeys(reruns, 1),
        timed,
        world,
        reporter,
        "sanity checks",
        stored={name: (line["values"], line["seconds"]) for name, line in lines.items()},
        store=lambda name, result: folder.append_check(name, len(positions), *result),
        unit="runs",
    )
    # Records name positions in the full split, `positions` those in this image set.
    indices = setting.images.indices[positions].tolist()

    def accuracies(records: Sequence[Record]) -> list[float]:
        # The same images under the evaluation's own budget, so that differences are paired.
        by_image = {record.index: record.accuracy for record in records}
        return [by_image[index] for index in indices]

    base = accuracies(evidence.records[first.job.key])
    # Beyond the worst case: what another attack has found already is no sign of too small a budget.
    worst = accuracies(worst_case(evidence.of(plan.decisive_jobs(plan.headline_target))))
    twice, cosines, twice_eps, large_eps, noise = (done[name][0] for name in NAMES)
    eps = _large_eps(setting)
    aimed = (
        f"accuracy under {reruns[NAMES[3]].job.attack} at eps {eps:.4g}, where any image can become any other"
    )
    unaimed = f"for comparison: accuracy under random noise at eps {eps:.4g}, which aims at nothing"
    return [
        _twice_the_steps(worst, twice, first.job),
        _eot_adequacy(cosines, setting.budget.eot_draws),
        _falls_with_eps([base, twice_eps, large_eps]),
        chance_check("large-eps-attack", large_eps, len(setting.images.classes), aimed),
        Check("large-eps-noise", sum(noise) / len(noise), None, None, unaimed),
    ]


def _twice_the_steps(base: Sequence[float], twice: Sequence[float], job: Job) -> Check:
    drops = [before - after for before, after in zip(base, twice, strict=True)]
    meaning = (
        f"accuracy that {job.attack} takes away with twice its steps, beyond the worst case, on {len(drops)} "
        f"images; the budget is too small by that much; fails from {resolution(len(drops), _STEPS_MATTER)}"
    )
    return at_most("twice-the-steps", sum(drops) / len(drops), tolerance(drops, _STEPS_MATTER), meaning)


def _eot_adequacy(cosines: Sequence[float], draws: int) -> Check:
    if not cosines:
        return not_run("eot-adequacy", "the target is deterministic")
    meaning = f"mean cosine between two gradients, each averaged over {draws} draws; low means too few draws"
    return at_least("eot-adequacy", cosines[0], _ADEQUATE_COSINE, meaning)


def _falls_with_eps(accuracies: Sequence[Sequence[float]]) -> Check:
    rises = []
    # The larger ball holds the smaller one, so a rise says that the attack failed in the larger.
    for smaller, larger in pairwise(accuracies):
        rise = [after - before for before, after in zip(smaller, larger, strict=True)]
        rises.append((sum(rise) / len(rise), tolerance(rise, 0.01)))
    count = len(accuracies[0])
    meaning = (
        "largest rise of accuracy from a smaller eps to a larger one, among eps, 2 eps and the largest; "
        f"fails from {resolution(count, 0.01)} of {count} images"
    )
    return at_most("falls-with-eps", *least_within(rises), meaning)
