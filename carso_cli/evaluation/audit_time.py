"""How long an audit will take, from the time of one gradient and a short attack on a few images.

The time of an attack depends on how many images are left: those that one target class breaks leave the queue.
So a pilot attack of a few steps finds the share that withstands, and the time of a gradient is measured on a
few images and on a whole block.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.smoothing import SMOOTHING_SAMPLES
from carso_cli.evaluation.attack_batch import perturb, select_worst
from carso_cli.evaluation.audit_checks import TARGETED
from carso_cli.evaluation.audit_setup import BUDGETS, CHECKED, Prepared
from carso_cli.evaluation.protocols import Job
from carso_cli.evaluation.rerun_checks import spread

_FEW, _PILOT_IMAGES, _PILOT_STEPS = 8, 16, 5
_OVERHEAD = 1.3
"""What steps, scores and files add to the time of gradients."""
_CHECK_CALLS = 40
"""Calls on 32 images that a check of gradients amounts to, as gradients."""


def predict_audit(prepared: Prepared) -> list[dict[str, Any]]:
    """Return the attacks and the checks, each with its `job` and `seconds`."""
    setting, size, plan = prepared.setting, BUDGETS[prepared.budget], prepared.plan
    count, clean, targets = len(setting.images), prepared.facts.clean_accuracy, prepared.facts.classes - 1
    if plan.strongest is None:
        return [{"job": "square on output", "seconds": size.queries * _seconds_of_call(prepared)(count)}]
    gradient, left = _seconds_of_gradient(prepared, plan.strongest), _share_left(prepared, plan.strongest)
    # The first target class meets all images that are right, the others those that it left.
    first = gradient(clean * count) + (min(targets, 9) - 1) * gradient(left * count)
    again = gradient(left * count)
    steps = {"apgd-ce": 1.0, "apgd-t": min(targets, 9), "fab-t": 3 * min(targets, 9), "fab": 3, "apgd-dlr": 1}
    found: list[dict[str, Any]] = []
    for job in plan.jobs:
        times = SMOOTHING_SAMPLES + 1 if str(job.view).startswith("smoothed") else 1
        if job.attack == TARGETED:
            seen = any(one["job"].startswith(TARGETED) for one in found)
            seconds = size.steps * (min(targets, 9) * again if seen else first)
        elif job.attack == "square":
            seconds = size.queries / 2 * again
        else:
            seconds = size.steps * steps.get(job.attack, 0.0) * again
        found.append({"job": f"{job.attack} on {job.view or 'the model'}", "seconds": times * seconds})
    few = min(CHECKED, count)
    attack = size.steps * (gradient(clean * few) + (min(targets, 9) - 1) * gradient(left * few))
    followed = sum(job.attack == TARGETED for job in plan.jobs)
    found.append(
        {"job": "checks", "seconds": (followed + 2.5) * attack + followed * _CHECK_CALLS * gradient(few)}
    )
    return [{**one, "seconds": _OVERHEAD * one["seconds"]} for one in found]


def _seconds_of_call(prepared: Prepared) -> Callable[[float], float]:
    def seconds(images: float) -> float:
        return images / _FEW * timed

    batch = prepared.setting.batch(range(min(_FEW, len(prepared.setting.images))))
    target = prepared.setting.models.target(prepared.plan.jobs[0], prepared.setting.seed, "estimate")
    target(batch.images)
    started = time.perf_counter()
    target(batch.images)
    timed = time.perf_counter() - started
    return seconds


def _seconds_of_gradient(prepared: Prepared, job: Job) -> Callable[[float], float]:
    """Return the seconds of one gradient on a number of images, block by block."""
    setting, most = prepared.setting, min(BUDGETS[prepared.budget].batch_size, len(prepared.setting.images))
    target = setting.models.target(job, setting.seed, "estimate")

    def measured(images: int) -> float:
        batch = setting.batch(range(images))
        took = []
        for _ in range(3):
            started = time.perf_counter()
            target.loss_and_gradient(batch.images, batch.labels, cross_entropy, setting.budget.eot_draws)
            took.append(time.perf_counter() - started)
        return min(took)

    few = min(_FEW, most)
    small, large = measured(few), measured(most)
    slope = max(large - small, 0.0) / max(most - few, 1)

    def seconds(images: float) -> float:
        blocks = max(images / most, 1.0) if images else 0.0
        return blocks * max(small + slope * (min(images, most) - few), small / 2)

    return seconds


def _share_left(prepared: Prepared, job: Job) -> float:
    """Return the share of images that withstand a short attack."""
    setting = prepared.setting
    batch = setting.batch(spread(len(setting.images), _PILOT_IMAGES))
    draws = min(setting.budget.eot_draws, 2)
    short = replace(setting, budget=replace(setting.budget, apgd_steps=_PILOT_STEPS, eot_draws=draws))
    report = select_worst(short, job, perturb(short, job, batch, "pilot"), batch).report
    # An image of a random model stays in the queue while any draw is right.
    return float((report.correct > 0).float().mean())
