from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from carso_cli.attacks.registry import ATTACKS, PROTOCOLS, TRANSFERS, build_attack
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.errors import UsageError
from carso_cli.evaluation.preflight import attack_work
from carso_cli.evaluation.protocols import Job, plan_budget, plan_evaluation


def test_adaptive_attacks_everything_and_queues() -> None:
    plan = plan_evaluation("adaptive")
    defence = [job.attack for job in plan.jobs_on("defence")]
    assert defence == ["none", "noise", "fgsm", "pgd", *PROTOCOLS["adaptive"].defence]
    classifier = [job.attack for job in plan.jobs_on("classifier")]
    assert classifier == ["none", "noise", "fgsm", "pgd", *PROTOCOLS["adaptive"].classifier]
    # "Minus classifier" is fair only where both are attacked by the same set.
    only = {"aa", "rand-aa", *TRANSFERS}
    assert set(classifier) - only == set(defence) - only
    assert plan.version == 3
    assert plan.label.endswith("version 3")
    by_name = {job.attack: job for job in plan.jobs_on("defence")}
    assert by_name["pgd"].waits_for == ("defence/none",)
    assert by_name["pgd-eot"].waits_for == (
        "defence/none",
        "defence/rand-aa/exact",
        "defence/apgd-targeted/exact",
    )
    assert "defence/pgd/exact" not in by_name["square"].waits_for
    assert by_name["transfer-log-probability"].view == "log-probability"
    assert by_name["transfer-logit-mean"].view == "surrogate"
    assert plan.strongest == by_name["rand-aa"]


def test_published_attacks_the_released_view_and_does_not_queue() -> None:
    plan = plan_evaluation("published")
    assert plan.view == "released"
    jobs = {job.attack: job for job in plan.jobs_on("defence")}
    assert {jobs[name].view for name in ("rand-aa", "pgd-eot")} == {"released"}
    assert jobs["pgd-eot"].waits_for == ("defence/none",)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_runs_alone_where_it_fits(name: str, toys: ModuleType) -> None:
    plan = plan_evaluation(name)
    recipe = toys.small_recipe()
    budget = plan_budget(recipe, plan, eps=0.1, norm="linf")
    for job in plan.jobs:
        build_attack(job.attack, ThreatModel("linf", 0.1), budget, stochastic=job.target == "defence", seed=0)
        work = attack_work(job, budget, classes=10, n_samples=8)
        assert (work.gradients + work.forwards > 0) == (job.attack not in ("none", "noise"))
        assert job.waits_for == ()
    assert plan.decisive_jobs(plan.headline_target)[-1].attack == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attack": "pgd-eto"}, "unknown attack or protocol 'pgd-eto'; did you mean 'pgd-eot'"),
        ({"attack": "aa", "target": "defence"}, "attack 'aa' does not fit the target 'defence'"),
        ({"attack": "transfer-classifier", "target": "classifier"}, "does not fit the target 'classifier'"),
        ({"attack": "pgd", "target": "purifier"}, "unknown target 'purifier'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_evaluation(**arguments)


def test_steps_scale_with_eps_and_follow_the_norm(toys: ModuleType) -> None:
    recipe, plan = toys.small_recipe(), plan_evaluation("pgd-eot")
    assert plan_budget(recipe, plan, eps=0.1, norm="linf").pgd_eot_step_size == pytest.approx(0.04)
    assert plan_budget(recipe, plan, eps=0.3, norm="linf").pgd_eot_step_size == pytest.approx(0.12)
    assert plan_budget(recipe, plan, eps=0.6, norm="l2").pgd_eot_step_size == pytest.approx(2.5 * 0.6 / 6)


@pytest.mark.parametrize(
    ("attack", "restarts"), [("adaptive", 3), ("pgd-eot", 3), ("published", 1), ("quick", 1)]
)
def test_only_adaptive_and_single_attacks_restart(attack: str, restarts: int, toys: ModuleType) -> None:
    recipe = toys.small_recipe("evaluation.restarts=3")
    assert plan_budget(recipe, plan_evaluation(attack), eps=0.1, norm="linf").restarts == restarts


def test_work_counts_the_draws_of_the_attack(toys: ModuleType) -> None:
    plan = plan_evaluation("adaptive")
    budget = plan_budget(toys.small_recipe(), plan, eps=0.1, norm="linf")

    def work(target: str, attack: str) -> tuple[float, float]:
        found = attack_work(Job(target, attack), budget, classes=4, n_samples=8)
        return found.gradients, found.forwards

    # 8 APGD steps and one gradient at the start, 2 draws; 6 PGD+EoT steps; 40 queries.
    assert work("defence", "rand-aa") == (2 * 9 * 2, 0)
    assert work("defence", "pgd-eot") == (6 * 2, 0)
    assert work("classifier", "pgd-eot") == (6, 0)
    assert work("defence", "square") == (0, 80)
    assert work("defence", "transfer-single-sample") == (9 * 2 / 8, 0)
    assert work("classifier", "aa") == (8 + 3 * 8 * 3, 40)
