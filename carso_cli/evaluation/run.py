"""Measure clean and robust accuracy by any attack or protocol, resumably, with checks that it worked.

    result = evaluate(recipe, run="runs/digits", attack="pgd", reporter=reporter, limit=200)
    for row in result["results"]:
        row["target"], row["attack"], row["accuracy"], row["ci95"], row["n_images"]

gives classifier and defence, each under `none` (clean) and the attack, the defence on its exact view. Leave
out `attack` for the adaptive protocol. With `defence=` (and `classifier=`) given, those models are evaluated
instead of the run's, and `run` is only where records go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from carso_cli import __version__
from carso_cli.attacks.registry import is_upper_bound
from carso_cli.distributed.world import World, join
from carso_cli.errors import StateError, UsageError
from carso_cli.evaluation.attack_batch import Setting, attack_block, interruptible, run_blocks
from carso_cli.evaluation.protocols import Plan
from carso_cli.evaluation.rerun_checks import rerun_checks
from carso_cli.evaluation.result import EvaluationResult
from carso_cli.evaluation.sanity_checks import Check, Evidence, failed, stored_checks
from carso_cli.evaluation.setup import Evaluation, EvaluationOptions, prepare_evaluation
from carso_cli.evaluation.verdict import verdict_of
from carso_cli.io.json_files import ensure_folder, read_json, read_json_lines, write_json
from carso_cli.recipe.identity import recipe_hash
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.description import describe_environment
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.lock import locked
from carso_cli.runs.paper import beyond_the_paper, departures
from carso_cli.runs.records import (
    SCHEMA,
    EvaluationFolder,
    Record,
    exact_view_result,
    find_to_resume,
)
from carso_cli.runs.summary import attack_row, broken_first, headline, job_health
from carso_cli.runtime.reporter import Reporter, shown

_Block = tuple[list[Record], dict[str, Any]]


def evaluate(
    recipe: Recipe,
    *,
    run: str | Path,
    reporter: Reporter | None = None,
    resume: bool = False,
    force: bool = False,
    **options: Unpack[EvaluationOptions],
) -> EvaluationResult:
    """Evaluate a run, or models of your own.

    Args:
        recipe: The resolved recipe; a trained run keeps its own, but for threat and evaluation.
        run: Run folder; records go to its `evaluation/`.
        reporter: Where progress goes; shown on the terminal or in the notebook when None.
        resume: Resume from the last complete block, or return the stored result of a complete evaluation.
        force: Start over where one with the same settings is stored.
        options: Attack, target, images, budget, own models: see `EvaluationOptions`.

    Returns:
        The summary, as stored, in a dictionary with `to_frame()` and a view for notebooks: `schema`,
        `recipe`, `run`, `attack`, `label`, `n_images`, `classifier` (`clean` and `attacked`, with intervals,
        or None), `results` (a row per job), `headline`, `checks`, `failed`, `trusted`, `verdict` (see
        `verdict_of`; None and `upper bound: ` of `quick` and of one attack where no check failed),
        `broken_by` (`attack`, `view`, `images` that it was the first to break), `settings`, `seconds`; and,
        looked up at each call, `exact` (the result on the exact view, beside one on another). Accuracies are
        in [0, 1]; what is unknown is None.

    Raises:
        UsageError: If the attack does not fit the target, or a result with these settings is stored and
            neither `resume` nor `force` is given.
        StateError: If the run is not trained, or stored state belongs to another configuration.
        NumericsError: If an attack's example leaves the ball or the pixel range.
        InterruptedRun: On Ctrl-C; complete blocks are saved.
    """
    reporter = shown(reporter)
    evaluation = prepare_evaluation(recipe, run=Path(run), reporter=reporter, **options)
    return EvaluationResult(run_evaluation(evaluation, reporter=reporter, resume=resume, force=force))


def run_evaluation(
    evaluation: Evaluation, *, reporter: Reporter, resume: bool = False, force: bool = False
) -> dict[str, Any]:
    """Run what `prepare_evaluation` has resolved; see `evaluate`."""
    world = join(evaluation.setting.models.device)
    reporter, folder = world.reporter(reporter), evaluation.folder
    if world.restarted:
        # Whatever is unfinished is what these processes began before one of them died.
        resume, force = world.on_main(lambda: (folder.exists, force and folder.summary.is_file()))
    # Decided by one process: the others may see the folder before or after its first file.
    folder, stored = world.on_main(lambda: _find_folder(evaluation, resume=resume, force=force))
    if stored is not None:
        reporter.info(f"{folder.path} is complete; showing its stored result")
        return world.on_main(lambda: _with_exact_view(folder, stored))
    with (
        # Held to the end, summary included: two processes that append blocks would count images twice.
        world.main_holds(lambda: _claimed(evaluation, folder, force, reporter)),
        interruptible(folder.path),
    ):
        records = run_jobs(evaluation.plan, evaluation.setting, evaluation.blocks(), folder, world, reporter)
        # Read back from disk, as a resumed run measured only the blocks that were missing.
        health = world.on_main(folder.read_health)
        evidence = Evidence(evaluation.plan, records, {key: job_health(health, key) for key in records})
        checks = [
            *stored_checks(evidence),
            *rerun_checks(evaluation.setting, evidence, folder, world, reporter),
        ]
        summary = world.on_main(lambda: _store_summary(evaluation, folder, evidence, checks))
        return world.on_main(lambda: _with_exact_view(folder, summary))


def _with_exact_view(folder: EvaluationFolder, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary with what must be shown beside it, as it is stored now."""
    identity = summary["settings"]["identity"]
    return {**summary, "exact": exact_view_result(folder.path.parent, identity)}


def _find_folder(
    evaluation: Evaluation, *, resume: bool, force: bool
) -> tuple[EvaluationFolder, dict[str, Any] | None]:
    """Return where the evaluation is started or resumed, and its result where it is complete already."""
    folder = evaluation.folder
    if resume and not force:
        folder = find_to_resume(folder.path.parent, evaluation.identity, evaluation.recipe)
        if not folder.summary.is_file():
            return folder, None
        summary = read_json(folder.summary)
        # Refused and not converted: a field of another schema may have another meaning.
        if summary.get("schema") != SCHEMA:
            raise StateError(
                f"{folder.summary} has schema {summary.get('schema')}; this version reads {SCHEMA}",
                hint="--force evaluates again",
            )
        return folder, summary
    if folder.exists and not force:
        state = "holds the result of" if folder.summary.is_file() else "holds an unfinished run of"
        raise UsageError(
            f"{folder.path} {state} this very evaluation",
            hint="--resume completes it and shows its result; --force starts over",
        )
    return folder, None


@contextmanager
def _claimed(
    evaluation: Evaluation, folder: EvaluationFolder, force: bool, reporter: Reporter
) -> Iterator[None]:
    """Keep other processes out of the folder, and start the evaluation where there is none."""
    # Made before the lock is taken, which is a file in it; `exists` asks for the settings, not the folder.
    path = RunFolder(evaluation.run).inside("evaluation", folder.path.name)
    with locked(ensure_folder(path), reporter):
        if force or not folder.exists:
            recipe = evaluation.recipe
            # Also where only leftovers lie: without settings nothing says what they belong to.
            folder.discard()
            folder.start(
                {
                    "schema": SCHEMA,
                    "identity": evaluation.identity,
                    "label": evaluation.plan.label,
                    "recipe": recipe.name,
                    "recipe_hash": recipe_hash(recipe),
                    "values": recipe.model_dump(mode="json"),
                    "reproduces": recipe.reproduces,
                    "beyond_the_paper": beyond_the_paper(recipe.model_dump(mode="json")),
                    "differs": departures(
                        recipe.model_dump(mode="json"),
                        evaluation.identity,
                        # An imported purifier has no lines of training.
                        trained=RunFolder(evaluation.run).metrics.is_file(),
                    ),
                    "precision": recipe.precision,
                    "gradients": {
                        "precision": evaluation.gradient_precision,
                        "cosine": evaluation.gradient_cosine,
                    },
                    "jobs": [job.key for job in evaluation.plan.jobs],
                    "carso": __version__,
                    "environment": describe_environment(evaluation.setting.models.device),
                }
            )
        yield


def run_jobs(
    plan: Plan,
    setting: Setting,
    blocks: Sequence[range],
    folder: EvaluationFolder,
    world: World,
    reporter: Reporter,
) -> dict[str, list[Record]]:
    """Run every block that is not stored yet; return all records by job, in the order of the images."""
    jobs = plan.jobs
    sizes = {n: len(block) for n, block in enumerate(blocks)}
    planned = {(job.key, n): size for job in jobs for n, size in sizes.items()}
    # Before the first append: this drops what a kill left half written.
    stored = world.on_main(lambda: folder.read_blocks(planned, reporter))
    records: dict[str, dict[int, Record]] = {}

    def accuracy(done: Sequence[_Block]) -> float:
        shares = [record.accuracy for block, _ in done for record in block]
        return sum(shares) / len(shares)

    for job in jobs:
        # No health here: that of stored blocks is on disk already, and only new blocks are written.
        earlier: dict[int, _Block] = {n: (stored[job.key, n], {}) for n in sizes if (job.key, n) in stored}
        done = run_blocks(
            sizes,
            # `records` grows from job to job: it holds every earlier job in full when this one starts.
            partial(attack_block, setting, job, blocks, records),
            world,
            reporter,
            f"{job.target}: {job.attack}",
            stored=earlier,
            store=lambda _, block: folder.append_block(*block),
            accuracy=accuracy,
        )
        # Later jobs look up what was found about each image.
        records[job.key] = {record.index: record for block, _ in done.values() for record in block}
    return {key: list(found.values()) for key, found in records.items()}


def _store_summary(
    evaluation: Evaluation, folder: EvaluationFolder, evidence: Evidence, checks: Sequence[Check]
) -> dict[str, Any]:
    """Draw the summary from the records, and store it."""
    plan = evaluation.plan
    rows = []
    for job in plan.jobs:
        health = {
            key: value for key, value in evidence.health[job.key].items() if key not in ("steps", "parts")
        }
        seconds, messages = round(health.pop("seconds"), 3), health.pop("messages")
        row = attack_row(evidence.records[job.key])
        rows.append({**row, "gradients": health, "seconds": seconds, "messages": messages})
    described = [check.as_dict() for check in checks]
    trusted, verdict = verdict_of(checks, upper_bound=is_upper_bound(plan.attack))
    jobs = {job.key: job for job in evidence.jobs}
    check_seconds = sum(line["seconds"] for line in read_json_lines(folder.checks))
    summary = {
        "schema": SCHEMA,
        "recipe": evaluation.recipe.name,
        "run": str(evaluation.run),
        "attack": plan.attack,
        "label": plan.label,
        "n_images": rows[0]["n_images"],
        "classifier": _classifier_result(plan, evidence),
        "results": rows,
        "headline": headline(evidence.of(plan.decisive_jobs(plan.headline_target)), plan.attack),
        "checks": described,
        "failed": failed(described),
        "trusted": trusted,
        "verdict": verdict,
        "broken_by": [
            {"attack": jobs[key].attack, "view": jobs[key].view, "images": count}
            for key, count in broken_first({key: evidence.records[key] for key in jobs}).items()
        ],
        "settings": read_json(folder.settings),
        "seconds": round(sum(row["seconds"] for row in rows) + check_seconds, 3),
    }
    # Last, as a summary says that the evaluation is complete.
    write_json(folder.summary, summary)
    return summary


def _classifier_result(plan: Plan, evidence: Evidence) -> dict[str, Any] | None:
    """Return the bare classifier's accuracy, clean and attacked; None where it is not evaluated."""
    jobs = plan.jobs_on("classifier")
    if not jobs:
        return None
    clean = attack_row(evidence.records[jobs[0].key])
    attacked = headline(evidence.of(plan.decisive_jobs("classifier")), plan.attack)
    return {
        "clean": clean["accuracy"],
        "clean_ci95": clean["ci95"],
        "attacked": attacked["accuracy"],
        "attacked_ci95": attacked["ci95"],
    }
