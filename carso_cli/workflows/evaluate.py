"""Measure clean and robust accuracy by any attack or protocol, resumably, with checks that it worked.

    result = evaluate(recipe, run=Path("runs/digits"), attack="pgd", reporter=reporter, limit=200)
    for row in result["results"]:
        row["target"], row["attack"], row["accuracy"], row["ci95"], row["n_images"]

gives classifier and defence, each under `none` (clean) and the attack, the defence on its exact view. Leave
out `attack` for the adaptive protocol. With `defence=` (and `classifier=`) given, those models are evaluated
instead of the run's, and `run` is only where records go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from carso_cli import __version__
from carso_cli.errors import InterruptedRun, StateError, UsageError
from carso_cli.recipe.load import recipe_hash
from carso_cli.recipe.schema import Recipe
from carso_cli.reporter import Reporter
from carso_cli.runs.environment import describe_environment
from carso_cli.runs.files import ensure_folder, read_json, read_json_lines, write_json
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.lock import locked
from carso_cli.runs.records import SCHEMA, EvaluationFolder, Record, find_to_resume
from carso_cli.runs.summary import job_health
from carso_cli.workflows.evaluation_jobs import run_block
from carso_cli.workflows.evaluation_plan import UNPERTURBED, Job
from carso_cli.workflows.evaluation_result import exact_counterpart, summarise
from carso_cli.workflows.evaluation_setup import Evaluation, EvaluationOptions, prepare_evaluation
from carso_cli.workflows.extra_checks import extra_checks
from carso_cli.workflows.trust_checks import Evidence, stored_checks


def evaluate(
    recipe: Recipe,
    *,
    run: Path,
    reporter: Reporter,
    resume: bool = False,
    force: bool = False,
    **options: Unpack[EvaluationOptions],
) -> dict[str, Any]:
    """Evaluate a run, or models of your own.

    Args:
        recipe: The resolved recipe; a trained run keeps its own, but for threat and evaluation.
        run: Run folder; records go to its `evaluation/`.
        reporter: Where progress goes.
        resume: Go on from the last complete block, or return the stored result of a complete evaluation.
        force: Start over where one with the same settings is stored.
        options: Attack, target, images, budget, own models: see `EvaluationOptions`.

    Returns:
        The summary, as stored; see `carso_cli.workflows.evaluation_result.summarise`.

    Raises:
        UsageError: If the attack does not fit the target, or a result with these settings is stored and
            neither `resume` nor `force` is given.
        StateError: If the run is not trained, or stored state belongs to another configuration.
        NumericsError: If an attack's example leaves the ball or the pixel range.
        InterruptedRun: On Ctrl-C; complete blocks are saved.
    """
    evaluation = prepare_evaluation(recipe, run=run, reporter=reporter, **options)
    return run_evaluation(evaluation, reporter=reporter, resume=resume, force=force)


def run_evaluation(
    evaluation: Evaluation, *, reporter: Reporter, resume: bool = False, force: bool = False
) -> dict[str, Any]:
    """Run what `prepare_evaluation` has resolved; see `evaluate`."""
    folder = _choose_folder(evaluation, resume=resume, force=force)
    if folder.summary.is_file() and not force:
        reporter.say(f"{folder.path} is complete; showing its stored result")
        return _stored_result(folder)
    path = RunFolder(evaluation.run).inside("evaluation", folder.path.name)
    with locked(ensure_folder(path), reporter):
        if force or not folder.exists:
            folder.discard()
            folder.start(_settings(evaluation))
        return _measure(evaluation, folder, reporter)


def _measure(evaluation: Evaluation, folder: EvaluationFolder, reporter: Reporter) -> dict[str, Any]:
    try:
        records = _run_jobs(evaluation, folder, reporter)
        health = folder.read_health()
        evidence = Evidence(evaluation.plan, records, {key: job_health(health, key) for key in records})
        extra = extra_checks(evaluation.setting, evaluation.plan, evidence, folder, reporter)
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"stopped; complete blocks are saved in {folder.path}",
            hint="go on with the same command and --resume",
        ) from None
    summary = summarise(
        evaluation.plan,
        evidence,
        [*stored_checks(evidence), *extra],
        recipe=evaluation.recipe.name,
        run=str(evaluation.run),
        settings=read_json(folder.settings),
        check_seconds=sum(line["seconds"] for line in read_json_lines(folder.checks)),
        exact=exact_counterpart(folder.path.parent, evaluation.plan, evaluation.identity),
    )
    write_json(folder.summary, summary)
    return summary


def _stored_result(folder: EvaluationFolder) -> dict[str, Any]:
    summary = read_json(folder.summary)
    if summary.get("schema") != SCHEMA:
        raise StateError(
            f"{folder.summary} has schema {summary.get('schema')}; this version reads {SCHEMA}",
            hint="--force evaluates again",
        )
    return summary


def _choose_folder(evaluation: Evaluation, *, resume: bool, force: bool) -> EvaluationFolder:
    folder = evaluation.folder
    if resume and not force:
        return find_to_resume(folder.path.parent, evaluation.identity)
    if folder.exists and not force:
        state = "holds the result of" if folder.summary.is_file() else "holds an unfinished run of"
        raise UsageError(
            f"{folder.path} {state} this very evaluation",
            hint="--resume goes on with it and shows its result; --force starts over",
        )
    return folder


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    recipe = evaluation.recipe
    return {
        "schema": SCHEMA,
        "identity": evaluation.identity,
        "label": evaluation.plan.label,
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "reproduces": recipe.reproduces,
        "jobs": [job.key for job in evaluation.plan.jobs],
        "carso": __version__,
        "environment": describe_environment(evaluation.setting.subject.device),
    }


def _run_jobs(
    evaluation: Evaluation, folder: EvaluationFolder, reporter: Reporter
) -> dict[str, list[Record]]:
    """Run every block that is not stored yet; return all records by job, in the images' order."""
    blocks, jobs = evaluation.blocks(), evaluation.plan.jobs
    sizes = {(job.key, n): len(block) for job in jobs for n, block in enumerate(blocks)}
    done = folder.read_blocks(sizes, reporter)
    records: dict[str, dict[int, Record]] = {}
    for job in jobs:
        earlier = _Earlier(job, records)
        found: dict[int, Record] = {}
        with reporter.progress(f"{job.target}: {job.attack}", len(evaluation.setting.images)) as progress:
            for number, positions in enumerate(blocks):
                fresh = done.get((job.key, number))
                if fresh is None:
                    fresh, health = run_block(evaluation.setting, job, number, positions, earlier)
                    folder.append_block(fresh, health)
                found |= {record.index: record for record in fresh}
                share = sum(record.accuracy for record in found.values()) / len(found)
                progress.advance(len(positions), accuracy=share)
        records[job.key] = found
    return {key: list(found.values()) for key, found in records.items()}


@dataclass(frozen=True)
class _Earlier:
    """What earlier jobs found about an image that a job is about to attack."""

    job: Job
    records: Mapping[str, Mapping[int, Record]]

    def __call__(self, index: int) -> tuple[Record | None, Record | None]:
        """Return the image's clean record, and the record of the job that settles it, if any."""
        clean = self.records.get(f"{self.job.target}/{UNPERTURBED}")
        found = (self.records[key][index] for key in self.job.waits_for)
        settling = next((record for record in found if record.certain), None)
        return (None if clean is None else clean[index]), settling
