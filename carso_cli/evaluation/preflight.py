"""What an evaluation would cost, from one measured attack step and one measured forward pass.

A job's work is counted in draws of its target: gradients (one draw forward and back) and forward passes. The
prediction is an upper bound, since images that an attack breaks leave the queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.registry import TRANSFERS, Budget
from carso_cli.distributed.launch import launch
from carso_cli.evaluation.attack_batch import Setting
from carso_cli.evaluation.protocols import UNPERTURBED, Job
from carso_cli.evaluation.rerun_checks import plan_reruns
from carso_cli.evaluation.setup import Evaluation
from carso_cli.runtime.timing import images_to_time, seconds_of

_TARGET_CLASSES = 9


class Work(NamedTuple):
    """Draws of the target per image: gradients (forward and back), and forward passes alone."""

    gradients: float = 0.0
    forwards: float = 0.0


def attack_work(job: Job, budget: Budget, classes: int, n_samples: int) -> Work:
    """Return what a job asks per image, scoring left out, of a model with C classes and N samples."""
    # A classifier has nothing to draw: one sample says everything.
    on_defence = job.target == "defence"
    draws = budget.eot_draws if on_defence else 1
    # One gradient more than steps, taken at the start.
    apgd = float((budget.apgd_steps + 1) * draws * budget.restarts)
    targeted = budget.apgd_steps * min(_TARGET_CLASSES, classes - 1)
    work = {
        UNPERTURBED: Work(),
        "noise": Work(),
        "fgsm": Work(1.0),
        "pgd": Work(float(budget.pgd_steps)),
        "pgd-eot": Work(float(budget.pgd_eot_steps * draws)),
        "pgd-eot-random-start": Work(float(budget.pgd_eot_steps * draws * budget.restarts)),
        # One run more, from the best of two surrogates' examples, one of which costs as much as the target.
        "pgd-eot-margin": Work(
            float(budget.pgd_eot_steps * draws * (budget.restarts + on_defence)) + apgd * on_defence
        ),
        "apgd-ce": Work(apgd),
        "apgd-dlr": Work(apgd),
        # From the unperturbed image towards each target; restarts mean nothing to it.
        "apgd-targeted": Work(float((budget.apgd_steps + 1) * draws * min(_TARGET_CLASSES, classes - 1))),
        "rand-aa": Work(2 * apgd),
        "authors-rand-aa": Work(2 * apgd / budget.restarts),
        "authors-pgd-eot": Work(float(budget.pgd_eot_steps * draws)),
        # APGD-CE, then, towards every target class, APGD (one gradient a step) and FAB (two at most).
        "aa": Work(budget.apgd_steps + 3 * targeted, budget.square_queries),
        "apgd-t": Work(float(targeted)),
        "fab-t": Work(2.0 * targeted),
        # Untargeted FAB asks for the gradient of every logit at every step.
        "fab": Work(float(budget.apgd_steps * classes * budget.restarts)),
        "square": Work(forwards=budget.square_queries * draws),
        **{name: Work(apgd) for name in TRANSFERS},
        # One sample costs a share of a draw.
        "transfer-single-sample": Work(apgd / n_samples),
        # On the bare classifier, which has nothing to draw.
        "transfer-classifier": Work(apgd / draws),
    }
    return work[job.attack]


def estimate_cost(evaluation: Evaluation, *, draws: int | None = None) -> dict[str, Any]:
    """Predict the time of an evaluation.

    Args:
        evaluation: What `prepare_evaluation` has resolved.
        draws: Draws in a measured step; the budget's when None.

    Returns:
        `seconds` in all; `jobs`: `job` and `seconds` of each, for `n_images` images; `checks`: `check` and
        `seconds` of each attack that is run again on a few of them.
    """
    setting, plan = evaluation.setting, evaluation.plan
    # The classifier always, since a surrogate attack on the defence may run on it alone.
    speeds = {target: _speed(evaluation, target, draws) for target in {*plan.targets, "classifier"}}
    # Blocks are shared out, and a process measures alone.
    share = len(setting.images) / launch().size
    jobs: list[dict[str, Any]] = [
        {"job": job.key, "seconds": _seconds_each(setting, job, speeds) * share} for job in plan.jobs
    ]
    checks: list[dict[str, Any]] = []
    for rerun in plan_reruns(setting, plan):
        if rerun.name == "eot-adequacy":
            draws = setting.budget.eot_draws if rerun.job.target == "defence" else 0
            # Two gradients of K draws each are compared; a deterministic target is not asked.
            each = 2 * draws * speeds[rerun.job.target][0]
        else:
            each = _seconds_each(rerun.setting, rerun.job, speeds)
        checks.append({"check": rerun.name, "seconds": each * len(rerun.positions())})
    seconds = sum(one["seconds"] for one in (*jobs, *checks))
    return {"seconds": seconds, "n_images": len(setting.images), "jobs": jobs, "checks": checks}


def _seconds_each(setting: Setting, job: Job, speeds: Mapping[str, tuple[float, float]]) -> float:
    """Return the seconds of a job per image, scoring included."""
    defence = setting.models.defence
    n_samples = 1 if defence is None else defence.n_samples
    work = attack_work(job, setting.budget, len(setting.images.classes), n_samples)
    # The attack runs on one model and its examples are scored on another.
    gradient, forward = speeds["classifier" if job.attack == "transfer-classifier" else job.target]
    # Selection, confirmation and report draws; of a classifier one says everything.
    sets = (3 if setting.selects else 1) * (2 if job.attack == "rand-aa" else 1)
    scoring = speeds[job.target][1] * sets * (setting.draws if job.target == "defence" else 1)
    return work.gradients * gradient + work.forwards * forward + scoring


def _speed(evaluation: Evaluation, name: str, draws: int | None) -> tuple[float, float]:
    """Return the seconds of a gradient and of a forward pass, per image and draw."""
    setting = evaluation.setting
    # One block's worth would be most exact; a few images keep the measurement short.
    images, labels, _ = setting.batch(range(min(images_to_time(setting.models.device), len(setting.images))))
    target = setting.models.target(Job(name, "pgd-eot", evaluation.plan.view), setting.seed, "cost")
    draws = (draws or setting.budget.eot_draws) if target.stochastic else 1
    units = len(images) * draws
    device = setting.models.device
    gradient = seconds_of(lambda: target.loss_and_gradient(images, labels, cross_entropy, draws), device)
    forward = seconds_of(lambda: target.expected_loss(images, labels, cross_entropy, draws), device)
    return gradient / units, forward / units
