"""From records to results: accuracy per attack, worst case per image, gradient health.

Everything here follows from what an evaluation stored, so a summary can be made again from its folder.

- `attack_row`: one row of a result table;
- `decisive`, `worst_case`: the records that count, and of these the strongest attack's on each image;
- `headline`: the number to quote;
- `broken_first`: which job broke how many images first;
- `describe_upper_bound`: the verdict on a number that only bounds the robust accuracy;
- `job_health`: the gradients that an attack saw, over all blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from carso_cli.attacks.registry import PROTOCOLS
from carso_cli.runs.intervals import wilson
from carso_cli.runs.records import Record

HEADLINE_MEANING = (
    "mean over fresh report draws of the worst attack of each image; which attack is the worst was decided "
    "on other draws, so the choice does not flatter the attacker"
)
AUTHORS_MEANING = (
    "share of the images that are right in one fresh draw after randAA, as the authors' script counts; other "
    "attacks have figures of their own"
)
SHARES = ("nan", "inf", "zero", "unusable", "saturated")


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """Return the accuracy of records, its 95% interval, and a stricter and a laxer reading of the same draws.

    The accuracy is the mean over images of the share of report draws that are right; `worst_of_draws` counts
    images that are right in all of them, `majority` those that are right by majority vote.
    """
    count = len(records)
    total = sum(record.accuracy for record in records)
    return {
        "accuracy": total / count,
        # `total` need not be whole: each image counts by its share of right draws.
        "ci95": list(wilson(total, count)),
        "worst_of_draws": sum(record.correct == record.draws for record in records) / count,
        "majority": sum(record.majority_correct for record in records) / count,
        "n_images": count,
    }


def describe_upper_bound(checks: Sequence[Mapping[str, Any]]) -> str:
    """Return the verdict on the number of a few attacks, none of whose stored checks failed."""
    # What was measured for comparison alone has a value and no verdict.
    not_run = sum(check["passed"] is None and check["value"] is None for check in checks)
    return f"upper bound: no check failed, {not_run} not run"


def attack_row(records: Sequence[Record]) -> dict[str, Any]:
    """Return the result of one job: target, attack, settings and accuracy.

    Images that an earlier attack has broken count with that attack's result; `attacked` is the number that
    this one was run on.
    """
    first = records[0]
    settings = ("target", "attack", "view", "aggregation", "n_samples", "eps", "norm")
    return {
        **{name: getattr(first, name) for name in settings},
        **figures(records),
        "draws": first.draws,
        "attacked": sum(not record.skipped for record in records),
    }


def decisive(records: Sequence[Record], attack: str) -> list[Record]:
    """Return the records whose worst case is the result on a target.

    Args:
        records: All records of an evaluation on the target.
        attack: What was evaluated: of a protocol every job counts, of a single attack only its own, since
            without selection draws nothing may be chosen between it and the unperturbed images. A protocol
            may name the one whose figure is its result.
    """
    protocol = PROTOCOLS.get(attack)
    own = protocol.headline if protocol else attack
    return [record for record in records if record.attack == own] or list(records)


def worst_case(records: Iterable[Record]) -> list[Record]:
    """Return, for each image in order of appearance, the record of its worst attack.

    The worst is decided by `correct_selection`, then by the lower margin, never by the report draws.
    """
    by_image: dict[int, list[Record]] = {}
    for record in records:
        by_image.setdefault(record.index, []).append(record)
    # Of equals the first, which is that of the earlier job.
    return [min(group, key=_severity) for group in by_image.values()]


def _severity(record: Record) -> tuple[float, float]:
    """Sort key on the selection draws: smaller is worse for the defence."""
    # Without a margin it comes after all that have one.
    margin = float("inf") if record.margin is None else record.margin
    decided = record.correct if record.correct_selection is None else record.correct_selection
    # The selection set has R draws, as the report set has.
    return decided / record.draws, margin


def headline(records: Sequence[Record], attack: str) -> dict[str, Any]:
    """Return the worst case over all records, with the number of images on which each attack was worst."""
    worst = worst_case(records)
    # The attack that broke the image is counted, not one that skipped it.
    picked = Counter(record.skipped_by or record.job for record in worst)
    return {
        "attack": attack,
        "target": worst[0].target,
        **figures(worst),
        "picked": dict(picked.most_common()),
        "meaning": AUTHORS_MEANING if getattr(PROTOCOLS.get(attack), "headline", None) else HEADLINE_MEANING,
    }


def broken_first(records: Mapping[str, Sequence[Record]]) -> dict[str, int]:
    """Return how many images each job was the first to break, the most first; jobs are in order."""
    # An image keeps the name of the job that broke it, whichever jobs skipped it afterwards.
    found = Counter(
        next((record.job for record in group if record.broken), "")
        for group in zip(*records.values(), strict=True)
    )
    return {job: count for job, count in found.most_common() if job}


def job_health(lines: Sequence[Mapping[str, Any]], job: str) -> dict[str, Any]:
    """Return the health of one job's gradients over all blocks, overall and per step.

    Args:
        lines: `EvaluationFolder.read_health`.
        job: Key of the job.

    Returns:
        `gradients` (their number), the shares of `SHARES` and `loss` (null where unknown), `steps` (the same
        per step), `parts` (the same for each part of the attack, by name), `seconds` and `messages` of the
        library.
    """
    blocks = [line for line in lines if line["job"] == job]
    steps: dict[int, list[Mapping[str, Any]]] = {}
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for block in blocks:
        for number, step in enumerate(block["steps"]):
            steps.setdefault(number, []).append(step)
            # Files of earlier versions name no parts.
            parts.setdefault(step.get("part", ""), []).append(step)
    return {
        **_weighted_mean([step for group in steps.values() for step in group]),
        "steps": [_weighted_mean(steps[number]) for number in sorted(steps)],
        "parts": {part: _weighted_mean(group) for part, group in parts.items()},
        "seconds": sum(block["seconds"] for block in blocks),
        "messages": sorted({message for block in blocks for message in block["messages"]}),
    }


def _weighted_mean(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of shares and loss, weighted by the number of gradients of each part."""
    means: dict[str, Any] = {"gradients": sum(part["gradients"] for part in parts)}
    for name in (*SHARES, "loss"):
        # Unknown parts are left out: counted as 0 they would pass for healthy.
        known = [(part[name], part["gradients"]) for part in parts if part[name] is not None]
        # By gradients, since the last block has fewer images.
        weight = sum(count for _, count in known)
        means[name] = sum(value * count for value, count in known) / weight if weight else None
    return means
