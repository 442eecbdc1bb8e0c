"""What an evaluation would cost, from one measured attack step and one measured forward pass.

A job's work is counted in draws of its target: gradients (one draw forward and back) and forward passes. The
prediction is an upper bound, since images that fail with certainty leave the queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.registry import TRANSFERS, Budget
from carso_cli.evaluation.attack_batch import Setting
from carso_cli.evaluation.protocols import UNPERTURBED, Job
from carso_cli.evaluation.rerun_checks import Rerun, plan_reruns
from carso_cli.evaluation.setup import Evaluation
from carso_cli.runtime.timing import seconds_of

_IMAGES = 8
_TARGET_CLASSES = 9


@dataclass(frozen=True)
class Work:
    """Draws of the target per image.

    Args:
        gradients: Forward and back.
        forwards: Forward only.
        on_classifier: Whether the bare classifier is what is asked, whoever the target is.
    """

    gradients: float = 0.0
    forwards: float = 0.0
    on_classifier: bool = False


def attack_work(job: Job, budget: Budget, classes: int, n_samples: int) -> Work:
    """Return what a job asks per image, scoring left out.

    Args:
        job: The job.
        budget: Its attack's budget.
        classes: Number of classes C.
        n_samples: N; an attack on single samples costs a share of one draw.
    """
    stochastic = job.target == "defence"
    draws = budget.eot_draws if stochastic else 1
    apgd = float((budget.apgd_steps + 1) * draws * budget.restarts)
    if job.attack == "transfer-classifier":
        return Work(gradients=(budget.apgd_steps + 1) * budget.restarts, on_classifier=True)
    if job.attack == "transfer-single-sample":
        return Work(gradients=apgd / n_samples)
    if job.attack in ("apgd-ce", "apgd-dlr", *TRANSFERS):
        return Work(gradients=apgd)
    if job.attack == "square":
        return Work(forwards=budget.square_queries * draws)
    if job.attack == "aa":
        targeted = budget.apgd_steps * min(_TARGET_CLASSES, classes - 1)
        return Work(gradients=budget.apgd_steps + 3 * targeted, forwards=budget.square_queries)
    gradients = {
        UNPERTURBED: 0.0,
        "noise": 0.0,
        "fgsm": 1.0,
        "pgd": float(budget.pgd_steps),
        "pgd-eot": float(budget.pgd_eot_steps * draws),
        "pgd-eot-random-start": float(budget.pgd_eot_steps * draws * budget.restarts),
        "rand-aa": 2 * apgd,
        "fab": float(budget.apgd_steps * classes * budget.restarts),
    }
    return Work(gradients=gradients[job.attack])


def estimate_cost(evaluation: Evaluation) -> dict[str, Any]:
    """Predict the time of an evaluation.

    Returns:
        `seconds` in all; `jobs`: `job` and `seconds` of each, for `n_images` images; `checks`: `check` and
        `seconds` of each attack that is run again on a few of them.
    """
    setting, plan = evaluation.setting, evaluation.plan
    # One block's worth would be most exact; a few images keep the measurement short.
    few = range(min(_IMAGES, len(setting.images)))
    speeds = {target: _speed(evaluation, target, few) for target in {*plan.targets, "classifier"}}
    jobs = [
        {"job": job.key, "seconds": _seconds_each(setting, job, speeds) * len(setting.images)}
        for job in plan.jobs
    ]
    checks = [
        {"check": rerun.name, "seconds": _rerun_seconds(rerun, speeds)}
        for rerun in plan_reruns(setting, plan)
    ]
    return {
        "seconds": sum(one["seconds"] for one in (*jobs, *checks)),
        "n_images": len(setting.images),
        "jobs": jobs,
        "checks": checks,
    }


def _seconds_each(setting: Setting, job: Job, speeds: Mapping[str, tuple[float, float]]) -> float:
    """Return the seconds of a job per image, scoring included."""
    defence = setting.models.defence
    classes, n_samples = len(setting.images.classes), 1 if defence is None else defence.n_samples
    work = attack_work(job, setting.budget, classes, n_samples)
    gradient, forward = speeds["classifier" if work.on_classifier else job.target]
    scoring = (
        speeds[job.target][1]
        * (3 if setting.selects else 1)
        * (setting.draws if job.target == "defence" else 1)
    )
    parts = 2 if job.attack == "rand-aa" else 1
    return work.gradients * gradient + work.forwards * forward + scoring * parts


def _rerun_seconds(rerun: Rerun, speeds: Mapping[str, tuple[float, float]]) -> float:
    if rerun.name == "eot-adequacy":
        draws = rerun.setting.budget.eot_draws if rerun.job.target == "defence" else 0
        each = 2 * draws * speeds[rerun.job.target][0]
    else:
        each = _seconds_each(rerun.setting, rerun.job, speeds)
    return each * len(rerun.positions())


def _speed(evaluation: Evaluation, name: str, positions: range) -> tuple[float, float]:
    """Return the seconds of a gradient and of a forward pass, per image and draw."""
    setting = evaluation.setting
    images, labels, _ = setting.pixels(positions)
    target = setting.models.target(Job(name, "pgd-eot", evaluation.plan.view), setting.seed, "cost")
    draws = setting.budget.eot_draws if target.stochastic else 1
    units = len(images) * draws
    device = setting.models.device
    gradient = seconds_of(lambda: target.loss_and_gradient(images, labels, cross_entropy, draws), device)
    forward = seconds_of(lambda: target.expected_loss(images, labels, cross_entropy, draws), device)
    return gradient / units, forward / units
