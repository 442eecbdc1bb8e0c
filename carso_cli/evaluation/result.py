"""The summary of an evaluation: what `--json` prints and `summary.json` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carso_cli.errors import StateError
from carso_cli.evaluation.protocols import Plan
from carso_cli.evaluation.sanity_checks import Check, Evidence, failed
from carso_cli.io.json_files import read_json
from carso_cli.runs.records import SCHEMA, attacks_exact_view_of
from carso_cli.runs.summary import attack_row, headline


def summarise(
    plan: Plan,
    evidence: Evidence,
    checks: Sequence[Check],
    *,
    recipe: str,
    run: str,
    settings: Mapping[str, Any],
    check_seconds: float,
    exact: dict[str, Any] | None,
) -> dict[str, Any]:
    """Draw the summary from records.

    Args:
        plan: The jobs that ran.
        evidence: What they stored.
        checks: Trust checks.
        recipe: Name of the recipe.
        run: Run folder.
        settings: What the evaluation stored before it began.
        check_seconds: Time that the checks took.
        exact: Headline of the exact view beside a result on another view; see `exact_counterpart`.

    Returns:
        `schema`, `recipe`, `run`, `attack`, `label`, `n_images`, `classifier` (`clean` and `attacked` with
        intervals, or None), `results` (a row per job), `headline`, `exact`, `checks`, `failed`, `settings`,
        `seconds`. Accuracies are in [0, 1]; what is unknown is None.
    """
    rows = []
    for job in plan.jobs:
        health = dict(evidence.health[job.key])
        health.pop("steps")
        seconds, messages = health.pop("seconds"), health.pop("messages")
        rows.append(
            {
                **attack_row(evidence.records[job.key]),
                "gradients": health,
                "seconds": round(seconds, 3),
                "messages": messages,
            }
        )
    described = [check.as_dict() for check in checks]
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "run": run,
        "attack": plan.attack,
        "label": plan.label,
        "n_images": rows[0]["n_images"],
        "classifier": _classifier(plan, evidence),
        "results": rows,
        "headline": headline(evidence.of(plan.headline_jobs), plan.attack),
        "exact": exact,
        "checks": described,
        "failed": failed(described),
        "settings": dict(settings),
        "seconds": round(sum(row["seconds"] for row in rows) + check_seconds, 3),
    }


def _classifier(plan: Plan, evidence: Evidence) -> dict[str, Any] | None:
    jobs = plan.jobs_on("classifier")
    if not jobs:
        return None
    clean, attacked = (
        attack_row(evidence.records[jobs[0].key]),
        headline(evidence.of(plan.decisive_jobs("classifier")), plan.attack),
    )
    return {
        "clean": clean["accuracy"],
        "clean_ci95": clean["ci95"],
        "attacked": attacked["accuracy"],
        "attacked_ci95": attacked["ci95"],
    }


def exact_counterpart(parent: Path, plan: Plan, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what must be shown beside a result that did not attack the exact view.

    Args:
        parent: The run's evaluation folder.
        plan: The plan of the result.
        identity: Its identity.

    Returns:
        None for results on the exact view or on the bare classifier; else `accuracy` and `ci95` of the
        adaptive protocol on the same models, images and eps, with `note`; both None where it was not run.
    """
    if plan.view == "exact" or plan.headline_target == "classifier":
        return None
    for path in sorted(parent.glob("*/summary.json")):
        try:
            stored = read_json(path)
            if attacks_exact_view_of(stored["settings"]["identity"], identity):
                found = stored["headline"]
                note = f"the adaptive protocol on the exact view, from {path.parent.name}"
                return {"accuracy": found["accuracy"], "ci95": found["ci95"], "note": note}
        except (StateError, KeyError, TypeError):
            continue
    note = (
        "not run: the exact view was not attacked on these images; run carso evaluate with --attack adaptive"
    )
    return {"accuracy": None, "ci95": None, "note": note}
