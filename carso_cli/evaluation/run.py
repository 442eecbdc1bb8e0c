"""Measure clean and robust accuracy by any attack or protocol, resumably, with checks that it worked.

    result = evaluate(recipe, run=Path("runs/digits"), attack="pgd", reporter=reporter, limit=200)
    for row in result["results"]:
        row["target"], row["attack"], row["accuracy"], row["ci95"], row["n_images"]

gives classifier and defence, each under `none` (clean) and the attack, the defence on its exact view. Leave
out `attack` for the adaptive protocol. With `defence=` (and `classifier=`) given, those models are evaluated
instead of the run's, and `run` is only where records go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from carso_cli import __version__
from carso_cli.distributed.world import World, join
from carso_cli.errors import InterruptedRun, StateError, UsageError
from carso_cli.evaluation.attack_batch import Setting, run_block
from carso_cli.evaluation.protocols import UNPERTURBED, Job
from carso_cli.evaluation.rerun_checks import rerun_checks
from carso_cli.evaluation.result import exact_counterpart, summarise
from carso_cli.evaluation.sanity_checks import Check, Evidence, stored_checks
from carso_cli.evaluation.setup import Evaluation, EvaluationOptions, prepare_evaluation
from carso_cli.io.json_files import ensure_folder, read_json, read_json_lines, write_json
from carso_cli.recipe.identity import recipe_hash
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.description import describe_environment
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.lock import locked
from carso_cli.runs.paper import beyond_the_paper
from carso_cli.runs.records import SCHEMA, EvaluationFolder, Record, find_to_resume
from carso_cli.runs.summary import job_health
from carso_cli.runtime.reporter import SILENT, Reporter


def evaluate(
    recipe: Recipe,
    *,
    run: Path,
    reporter: Reporter = SILENT,
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
        The summary, as stored; see `carso_cli.evaluation.result.summarise`.

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
    world = join(evaluation.setting.models.device)
    reporter, folder = world.reporter(reporter), evaluation.folder
    if world.restarted:
        # Whatever is unfinished is what these processes began before one of them died.
        resume, force = world.on_main(lambda: (folder.exists, force and folder.summary.is_file()))
    folder, stored = world.on_main(lambda: _choose_folder(evaluation, resume=resume, force=force))
    if stored is not None:
        reporter.info(f"{folder.path} is complete; showing its stored result")
        return stored
    with world.main_holds(lambda: _claimed(evaluation, folder, force, reporter)):
        return _measure(evaluation, folder, world, reporter)


@contextmanager
def _claimed(
    evaluation: Evaluation, folder: EvaluationFolder, force: bool, reporter: Reporter
) -> Iterator[None]:
    """Hold the folder, other processes kept out, and start the evaluation where there is none."""
    path = RunFolder(evaluation.run).inside("evaluation", folder.path.name)
    with locked(ensure_folder(path), reporter):
        if force or not folder.exists:
            folder.discard()
            folder.start(_settings(evaluation))
        yield


def _measure(
    evaluation: Evaluation, folder: EvaluationFolder, world: World, reporter: Reporter
) -> dict[str, Any]:
    try:
        records = _run_jobs(evaluation, folder, world, reporter)
        health = world.on_main(folder.read_health)
        evidence = Evidence(evaluation.plan, records, {key: job_health(health, key) for key in records})
        extra = rerun_checks(evaluation.setting, evaluation.plan, evidence, folder, world, reporter)
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"stopped; complete blocks are saved in {folder.path}",
            hint="go on with the same command and --resume",
        ) from None
    checks = [*stored_checks(evidence), *extra]
    return world.on_main(lambda: _store_result(evaluation, folder, evidence, checks))


def _store_result(
    evaluation: Evaluation, folder: EvaluationFolder, evidence: Evidence, checks: Sequence[Check]
) -> dict[str, Any]:
    summary = summarise(
        evaluation.plan,
        evidence,
        checks,
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


def _choose_folder(
    evaluation: Evaluation, *, resume: bool, force: bool
) -> tuple[EvaluationFolder, dict[str, Any] | None]:
    """Return where the evaluation starts, or goes on, and its result where it is complete already."""
    folder = evaluation.folder
    if resume and not force:
        folder = find_to_resume(folder.path.parent, evaluation.identity)
        return folder, _stored_result(folder) if folder.summary.is_file() else None
    if folder.exists and not force:
        state = "holds the result of" if folder.summary.is_file() else "holds an unfinished run of"
        raise UsageError(
            f"{folder.path} {state} this very evaluation",
            hint="--resume goes on with it and shows its result; --force starts over",
        )
    return folder, None


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    recipe = evaluation.recipe
    return {
        "schema": SCHEMA,
        "identity": evaluation.identity,
        "label": evaluation.plan.label,
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "reproduces": recipe.reproduces,
        "beyond_the_paper": beyond_the_paper(recipe.model_dump(mode="json")),
        "precision": recipe.precision,
        "jobs": [job.key for job in evaluation.plan.jobs],
        "carso": __version__,
        "environment": describe_environment(evaluation.setting.models.device),
    }


def _run_jobs(
    evaluation: Evaluation, folder: EvaluationFolder, world: World, reporter: Reporter
) -> dict[str, list[Record]]:
    """Run every block that is not stored yet; return all records by job, in the images' order."""
    blocks, jobs = evaluation.blocks(), evaluation.plan.jobs
    sizes = {(job.key, n): len(block) for job in jobs for n, block in enumerate(blocks)}
    done = world.on_main(lambda: folder.read_blocks(sizes, reporter))
    records: dict[str, dict[int, Record]] = {}
    for job in jobs:
        stored = {n: done[job.key, n] for n in range(len(blocks)) if (job.key, n) in done}
        found = {record.index: record for block in stored.values() for record in block}
        work = partial(_run_block, evaluation.setting, job, blocks, _Earlier(job, records))
        missing = [n for n in range(len(blocks)) if n not in stored]
        with reporter.progress(f"{job.target}: {job.attack}", len(evaluation.setting.images)) as progress:
            if found:
                progress.advance(len(found))
            for number, (fresh, health) in world.map_sharded(missing, work):
                if world.is_main:
                    folder.append_block(fresh, health)
                found |= {record.index: record for record in fresh}
                share = sum(record.accuracy for record in found.values()) / len(found)
                progress.advance(len(blocks[number]), accuracy=share)
        # In the order of the images, whichever blocks were stored already.
        records[job.key] = {index: found[index] for index in evaluation.setting.images.indices.tolist()}
    return {key: list(found.values()) for key, found in records.items()}


def _run_block(
    setting: Setting, job: Job, blocks: Sequence[range], earlier: _Earlier, number: int
) -> tuple[list[Record], dict[str, Any]]:
    return run_block(setting, job, number, blocks[number], earlier)


@dataclass(frozen=True)
class _Earlier:
    """What earlier jobs found about an image that a job is about to attack."""

    job: Job
    records: Mapping[str, Mapping[int, Record]]

    def __call__(self, index: int) -> tuple[Record | None, Record | None]:
        """Return the image's clean record, and the record of the job that settles it, if any."""
        clean = self.records.get(f"{self.job.target}/{UNPERTURBED}")
        found = (self.records[key][index] for key in self.job.waits_for)
        settling = next((record for record in found if record.broken), None)
        return (None if clean is None else clean[index]), settling
