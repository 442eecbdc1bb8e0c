"""Whether the number of an audit can be trusted: what the attacks followed, and whether more would find more.

The central check is `faithful-gradient`. An attack that nothing stops ends at the worst case of the function
that it follows. So some source must decide as the model does, at the clean images and where its attack ended,
and its gradient must be right at both (`carso_cli.attacks.gradient_check`). The other checks ask whether
anything else did better: sources that decide otherwise, a black box, twice the steps, a ball in which any
image can become any other. Each is a mean over images with a paired interval; a check that could not be run
says so, and is not counted as passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carso_cli.attacks.gradient_check import GradientCheck, check_gradient
from carso_cli.attacks.gradient_sources import GRAFT, LAYER, OUTPUT, STRAIGHT_THROUGH, GradientSource
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.evaluation.attack_batch import Batch, Setting, perturb, select_worst
from carso_cli.evaluation.probes import Facts
from carso_cli.evaluation.protocols import BLACK_BOX, Job
from carso_cli.evaluation.rerun_checks import LARGE_EPS, mean_cosine
from carso_cli.evaluation.sanity_checks import (
    Check,
    Evidence,
    at_least,
    at_most,
    chance_check,
    gain_check,
    in_ball_check,
    not_run,
)
from carso_cli.runs.intervals import tolerance
from carso_cli.runs.summary import worst_case
from carso_cli.runtime.seed import all_seeded

FAITHFUL = (OUTPUT, LAYER, GRAFT, STRAIGHT_THROUGH)
"""Kinds of source whose forward pass is the model's own."""
TARGETED = "apgd-targeted"

_MATCHES, _DESCENDS, _LASTS, _PREDICTS, _NONZERO, _DECIDES = 0.87, 0.75, 0.75, 0.87, 0.97, 0.97
"""Least shares of images: of 32, four, eight, eight, four, none and none may miss."""
_COSINE = 0.5
_GAIN = 0.02


@dataclass(frozen=True, eq=False)
class _EndPoint:
    """Where the attack on one source ended, on a few images."""

    check: GradientCheck
    decides: float
    """Share of these examples on which the source's largest score is the model's decision."""
    nan: float
    """Share of these examples to which the model answers NaN."""
    varies: float
    """Share of these examples whose decision changes with the seed."""


def audit_checks(
    setting: Setting,
    evidence: Evidence,
    facts: Facts,
    sources: Mapping[str, GradientSource],
    at_start: Mapping[str, GradientCheck],
    positions: Sequence[int],
) -> list[Check]:
    """Return every check of an audit.

    Args:
        setting: Model, images, threat and budget.
        evidence: What the attacks stored.
        facts: What the probes found.
        sources: The gradient sources by name.
        at_start: The check of each source's gradient at the unperturbed images.
        positions: The images that gradients are checked on.
    """
    batch = setting.batch(list(positions))
    followed = [job for job in evidence.jobs if job.attack == TARGETED and job.view]
    ends = {str(job.view): _end_point(setting, job, sources, batch) for job in followed}
    healthy = [
        job
        for job in followed
        if sources[str(job.view)].kind in FAITHFUL
        and ends[str(job.view)].decides >= _DECIDES
        and is_right(at_start[str(job.view)])
        and is_right(ends[str(job.view)].check)
    ]
    return [
        *facts.checks,
        *_answers_at_ends([*ends.values()], facts.random),
        at_least(
            "repeatable",
            float(facts.seedable),
            1.0,
            "whether fixed seeds give the same answer again; without that no gradient can be checked",
        ),
        in_ball_check(evidence),
        at_least(
            "faithful-gradient",
            float(len(healthy)),
            1.0,
            "gradient sources that decide as the model does and whose gradient is right, at the images and "
            f"where the attack ended; {_told(at_start, ends)}",
        ),
        *_gains(evidence, healthy),
        *_reruns(setting, evidence, healthy or followed, batch, positions),
    ]


def _answers_at_ends(ends: Sequence[_EndPoint], random: bool) -> list[Check]:
    """Return whether the model answers on attacked images, and the same whatever the seed."""
    nan, varies = (max((getattr(end, name) for end in ends), default=0.0) for name in ("nan", "varies"))
    told = "largest share of attacked images {} after the attack by one source"
    return [
        at_most("finite-answers", nan, 0.0, told.format("to which the model answers NaN")),
        not_run("deterministic", "the model is random")
        if random
        else at_most(
            "deterministic",
            varies,
            0.0,
            told.format("on which a model that seemed deterministic decides otherwise under other seeds"),
        ),
    ]


def _gains(evidence: Evidence, healthy: Sequence[Job]) -> list[Check]:
    """Return whether anything takes away more than the attacks on sources whose gradient is right."""
    names = {job.view for job in healthy}
    black_box = evidence.named(BLACK_BOX)
    same = [job for job in evidence.jobs if job.view in names and job not in healthy]
    own = [job for job in evidence.white_box if job.view in names]
    others = [job for job in evidence.white_box if job.view not in names]
    gain = "accuracy that {} take away beyond {}; a gain means that {}"
    return [
        gain_check(
            evidence,
            "black-box",
            evidence.white_box,
            black_box,
            gain.format("black-box attacks", "the others", "their gradients are masked"),
        ),
        gain_check(
            evidence,
            "other-attacks",
            healthy,
            same,
            gain.format("other attacks by the same gradients", TARGETED, "the slope leads nowhere"),
        ),
        gain_check(
            evidence,
            "other-sources",
            own,
            others,
            gain.format("attacks on a changed model", "those on its own gradients", "these mislead"),
        ),
    ]


def pixel_radius(threat: ThreatModel, images: Tensor) -> float:
    """Return the change of one pixel that the radius amounts to where all pixels change alike."""
    eps = float(threat.eps)
    return eps if threat.norm == "linf" else eps / float(images[0].numel()) ** 0.5


def _end_point(setting: Setting, job: Job, sources: Mapping[str, GradientSource], batch: Batch) -> _EndPoint:
    """Attack a few images by way of one source, and look at the gradient where that ends."""
    source = sources[str(job.view)]
    (examples,) = perturb(setting, job, batch, "end point").values()
    radius = pixel_radius(setting.threat, examples)
    check = check_gradient(source, examples, batch.labels, eps=radius, seed=setting.seed)

    @torch.no_grad()
    def scores(function: GradientSource, seed: int) -> Tensor:
        with all_seeded(seed):
            return function(examples)

    answer = scores(sources[OUTPUT], setting.seed)
    decisions = answer.argmax(dim=1)
    again = [scores(sources[OUTPUT], setting.seed + number).argmax(dim=1) for number in range(1, 4)]
    return _EndPoint(
        check,
        decides=float((decisions == scores(source, setting.seed).argmax(dim=1)).float().mean()),
        nan=float(answer.isnan().any(dim=1).float().mean()),
        varies=float((torch.stack(again) != decisions).any(dim=0).float().mean()),
    )


def is_right(check: GradientCheck) -> bool:
    """Say whether a gradient was right at nearly all images where it was checked."""
    return (
        check.finite == 1.0
        and check.nonzero >= _NONZERO
        # Where rounding hides the slope of most images, as in bfloat16, the larger steps have to tell.
        and (check.matches >= _MATCHES or 4 * check.judged < check.images)
        and check.descends >= _DESCENDS
        and check.lasts >= _LASTS
        and (check.predicts >= _PREDICTS or 4 * check.foretold < check.images)
    )


def _told(at_start: Mapping[str, GradientCheck], ends: Mapping[str, _EndPoint]) -> str:
    """Return what was measured of each source, in words."""
    parts = []
    for name, start in at_start.items():
        if not start.path:
            parts.append(f"{name}: no gradient")
        elif name not in ends:
            parts.append(f"{name}: nonzero {start.nonzero:.2f}, not attacked")
        else:
            end = ends[name].check
            parts.append(
                f"{name}: nonzero {start.nonzero:.2f} and {end.nonzero:.2f}, right slope {start.matches:.2f} "
                f"and {end.matches:.2f}, downhill {start.descends:.2f} and {end.descends:.2f}, lasting "
                f"{start.lasts:.2f} and {end.lasts:.2f}, pixel by pixel {start.predicts:.2f} and "
                f"{end.predicts:.2f}, same decision {ends[name].decides:.2f}"
            )
    return "; ".join(parts)


def _reruns(
    setting: Setting, evidence: Evidence, followed: Sequence[Job], batch: Batch, positions: Sequence[int]
) -> list[Check]:
    """Attack a few images again: with twice the steps, in the largest ball, and by other samples."""
    names = ("twice-the-steps", "large-eps-attack", "eot-adequacy")
    if not followed:
        return [not_run(name, "no source has a gradient") for name in names]
    job, budget = followed[0], setting.budget

    def accuracies(changed: Setting, block: str) -> list[float]:
        report = select_worst(changed, job, perturb(changed, job, batch, block), batch).report
        return [correct / report.draws for correct in report.correct.tolist()]

    twice = accuracies(replace(setting, budget=replace(budget, apgd_steps=2 * budget.apgd_steps)), "twice")
    worst = worst_case(evidence.of(evidence.jobs))
    before = {record.index: record.accuracy for record in worst}
    base = [before[index] for index in batch.indices]
    if setting.models.target(job, 0, 0).stochastic:
        drops = [old - new for old, new in zip(base, twice, strict=True)]
    else:
        drops = [old - min(old, new) for old, new in zip(base, twice, strict=True)]
    pixels = batch.images[0].numel()
    largest = LARGE_EPS * (pixels**0.5 if setting.threat.norm == "l2" else 1.0)
    wide = accuracies(replace(setting, threat=replace(setting.threat, eps=largest)), "largest")
    return [
        at_most(
            "twice-the-steps",
            sum(drops) / len(drops),
            tolerance(drops, _GAIN),
            f"accuracy that {job.attack} takes away with twice its steps and another seed, on {len(drops)} "
            "images",
        ),
        chance_check(
            "large-eps-attack",
            wide,
            setting.models.target(job, 0, 0)(batch.images[:1]).shape[1],
            f"accuracy under {job.attack} at eps {largest:.4g}, where any image can become any other",
        ),
        _adequacy(setting, job, batch),
    ]


def _adequacy(setting: Setting, job: Job, batch: Batch) -> Check:
    targets = [setting.models.target(job, setting.seed, f"adequacy {number}") for number in range(2)]
    if not targets[0].stochastic:
        return not_run("eot-adequacy", "the model is deterministic")
    samples = setting.budget.eot_draws
    cosine = mean_cosine(targets, batch.images, batch.labels, samples)
    meaning = f"mean cosine between two gradients, each a mean over {samples} samples; low means too few"
    return at_least("eot-adequacy", cosine, _COSINE, meaning)
