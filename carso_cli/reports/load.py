"""What runs have stored, as a report reads it: metrics, evaluations, ablations.

Every figure is computed again from `records.jsonl`; a summary gives the checks and the settings, and must
agree with its records. Nothing is written, so a report may be made while a run is in progress.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carso_cli.errors import CarsoError, StateError
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.reports.stored import AblationRow, StoredAblation, StoredEvaluation, StoredRun
from carso_cli.runs.folder import ABLATION_SCHEMA, RunFolder
from carso_cli.runs.records import SCHEMA, EvaluationFolder, Record
from carso_cli.runs.summary import attack_row, headline
from carso_cli.runtime.reporter import Reporter

# The adaptive protocol gives the number that counts, so everything that takes the first one takes it.
_ORDER = ("adaptive", "published", "authors", "quick")
# Above what summing floats in another order changes, far below one draw of one image.
_ROUNDING = 1e-9


def read_evaluation(path: Path) -> StoredEvaluation | None:
    """Read one evaluation; None if it is not complete.

    Raises:
        StateError: If its files are damaged, of another version of carso, or contradict each other.
    """
    folder = EvaluationFolder(path)
    if not folder.summary.is_file():
        return None
    summary = _read_with_schema(folder.summary, SCHEMA)
    try:
        # Every planned job from the start, so that one without any record fails the check below.
        jobs = {job: list[Record]() for job in summary["settings"]["jobs"]}
        # Not repaired: another process may be appending to the file.
        for line in read_json_lines(folder.records, repair=False):
            record = Record.from_dict(line)
            jobs[record.job].append(record)
        found = StoredEvaluation(path, summary, jobs)
        _check_against_summary(found, found.identity["n_images"])
    except (KeyError, TypeError) as error:
        raise StateError(f"{path} lacks or misplaces {error}") from error
    return found


def _read_with_schema(path: Path, schema: int) -> dict[str, Any]:
    content = read_json(path)
    if content.get("schema") != schema:
        raise StateError(f"{path} has schema {content.get('schema')}; this carso reads {schema}")
    return content


def _check_against_summary(evaluation: StoredEvaluation, images: int) -> None:
    for job, records in evaluation.records.items():
        # Neither number alone: some images may be missing while others are there twice.
        if len({record.index for record in records}) != images or len(records) != images:
            raise StateError(
                f"{evaluation.path / 'records.jsonl'} holds {len(records)} records of '{job}' for {images} "
                "images; the summary beside it belongs to other records"
            )
    for row, stored in zip(evaluation.rows, evaluation.summary["results"], strict=True):
        if abs(row["accuracy"] - stored["accuracy"]) > _ROUNDING:
            raise StateError(
                f"{evaluation.path}: its records give {row['target']}/{row['attack']} an accuracy of "
                f"{row['accuracy']:.6g}; its summary says {stored['accuracy']:.6g}"
            )


def read_ablation(path: Path, known: Mapping[Path, StoredEvaluation]) -> StoredAblation:
    """Read `<run>/ablations/<name>-<attack>.json` and the records of its rows.

    Args:
        path: The file.
        known: Evaluations that are read already, by resolved folder.

    Raises:
        StateError: If the file or one of its evaluations is damaged, missing or of another version.
    """
    stored = _read_with_schema(path, ABLATION_SCHEMA)
    try:
        rows = tuple(_read_row(path.parents[1], row, known) for row in stored["rows"])
        texts = {key: str(stored[key]) for key in ("ablation", "title", "varies", "attack", "note")}
        return StoredAblation(**texts, rows=rows)
    except (KeyError, TypeError) as error:
        raise StateError(f"{path} lacks or misplaces {error}") from error


def _read_row(run: Path, row: Mapping[str, Any], known: Mapping[Path, StoredEvaluation]) -> AblationRow:
    # A variant may live in another run's folder, so the stored path may hold `..`.
    folder = Path(os.path.normpath(run / row["evaluation"]))
    # Several tables may name one evaluation, whose records are the bulk of what is read.
    evaluation = known.get(folder.resolve()) or read_evaluation(folder)
    if evaluation is None:
        raise StateError(f"the evaluation {folder} of row '{row['label']}' is not complete")
    # Exactly 0.0 is what `make_row` stores for a variant without an attack.
    label, unattacked = str(row["label"]), row["eps"] == 0.0
    if row["transferred"] is None:
        return AblationRow(label, evaluation, unattacked)
    records = _transferred_records(run / row["transferred"]["source"], evaluation)
    # A rule without gradients resists its own attack, but not examples made against another rule.
    worst = headline([*evaluation.decisive_records("defence"), *records], "transferred")
    return AblationRow(label, evaluation, unattacked, attack_row(records), worst)


def _transferred_records(folder: Path, evaluation: StoredEvaluation) -> list[Record]:
    rule, images = evaluation.identity["aggregation"], evaluation.identity["n_images"]
    lines = read_json_lines(folder / "records.jsonl", repair=False)
    found = [record for record in map(Record.from_dict, lines) if record.aggregation == rule]
    if len({record.index for record in found}) != images or len(found) != images:
        raise StateError(f"{folder} holds {len(found)} records of '{rule}' for {images} images")
    return found


def read_run(path: Path, reporter: Reporter) -> StoredRun:
    """Read everything that a run has stored; damaged or incomplete parts are left out with a warning.

    Args:
        path: Run folder.
        reporter: Where warnings go.

    Raises:
        StateError: If the folder holds no run.
    """
    folder = RunFolder(path)
    recipe = _recipe_of(folder).model_dump(mode="json")
    environment, metrics = {}, []
    # A run that was only evaluated never had the file; one that was trained here has lost it.
    if folder.trained_here and not folder.environment.is_file():
        reporter.warning(f"left out: {folder.environment} is missing")
    try:
        environment = read_json(folder.environment) if folder.environment.is_file() else {}
        metrics = folder.read_metrics(recipe["training"]["epochs"])
    except StateError as error:
        reporter.warning(f"left out: {error.message}")
    evaluations: dict[Path, StoredEvaluation] = {}
    ablations = []
    # Evaluations come first, so that an ablation's table finds those of this run read already.
    for file in results_of(folder):
        try:
            if file.name != "settings.json":
                ablations.append(read_ablation(file, evaluations))
            elif found := read_evaluation(file.parent):
                evaluations[file.parent.resolve()] = found
            else:
                reporter.warning(f"left out: {file.parent} is not complete")
        except StateError as error:
            reporter.warning(f"left out: {error.message}")
    ordered = sorted(evaluations.values(), key=_protocols_first)
    return StoredRun(path, recipe, environment, metrics, ordered, ablations)


def _protocols_first(evaluation: StoredEvaluation) -> tuple[int, str, float, int]:
    identity = evaluation.identity
    attack = str(identity["attack"])
    place = _ORDER.index(attack) if attack in _ORDER else len(_ORDER)
    return place, attack, float(identity["eps"]), identity["n_samples"] or 0


def results_of(folder: RunFolder) -> list[Path]:
    """Return the files that describe measurements: evaluations' settings, then ablations' tables."""
    # Not by `RunFolder.evaluation`, which refuses links: only what is written must stay in the folder.
    evaluations, ablations = (folder.path / name for name in ("evaluation", "ablations"))
    return [*sorted(evaluations.glob("*/settings.json")), *sorted(ablations.glob("*.json"))]


def _recipe_of(folder: RunFolder) -> Recipe:
    """Return a run's recipe; for a run without training, the shipped one that its results name."""
    if folder.recipe.is_file():
        return load_recipe(str(folder.recipe.resolve()))
    results = results_of(folder)
    if not results:
        raise StateError(
            f"{folder.path} holds no run: neither recipe.yaml nor an evaluation is in it",
            hint="name the folder that carso train-purifier or carso evaluate wrote to",
        )
    # Results store the recipe's name and no path, so only a shipped recipe can be found by it.
    name = read_json(results[0]).get("recipe")
    try:
        return load_recipe(str(name))
    except CarsoError as error:
        raise StateError(
            f"{folder.path} holds no recipe.yaml, and the recipe '{name}' of {results[0]} is not a shipped "
            "one",
            hint=f"copy the recipe to {folder.recipe}",
        ) from error
