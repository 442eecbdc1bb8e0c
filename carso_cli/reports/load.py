"""What runs have stored, as a report reads it: metrics, evaluations, ablations.

Every figure is computed again from `records.jsonl`; a summary gives the checks and the settings, and must
agree with its records. Nothing is written, so a report may be made while a run is in progress.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from carso_cli.errors import CarsoError, StateError
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import ABLATION_SCHEMA, RunFolder
from carso_cli.runs.paper import beyond_the_paper, paper_figures, scenario_of
from carso_cli.runs.records import SCHEMA, EvaluationFolder, Record
from carso_cli.runs.summary import attack_row, decisive, headline, worst_case
from carso_cli.runtime.reporter import Reporter

# The adaptive protocol gives the number that counts, so everything that takes the first one takes it.
_ORDER = ("adaptive", "published", "authors", "quick")
# Above what summing floats in another order changes, far below one draw of one image.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class StoredEvaluation:
    """A complete evaluation.

    Args:
        path: Its folder.
        summary: `summary.json`.
        records: Its records by job key, in the order in which the jobs ran.
    """

    path: Path
    summary: Mapping[str, Any]
    records: Mapping[str, Sequence[Record]]

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the evaluation is: attack, view, eps, norm, seed, samples, aggregation, budget, checksums."""
        found: Mapping[str, Any] = self.summary["settings"]["identity"]
        return found

    @property
    def failed(self) -> list[str]:
        """Names of the sanity checks that failed."""
        return list(self.summary["failed"])

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One row per job, computed from the records; see `carso_cli.runs.summary.attack_row`."""
        return [attack_row(records) for records in self.records.values()]

    @cached_property
    def worst(self) -> dict[str, dict[str, Any]]:
        """Worst case over all attacks, by target: `classifier` and `defence`, where attacked at all.

        A single attack stands for itself, without the unperturbed images.
        """
        found = {}
        for target in ("classifier", "defence"):
            records = self.decisive_records(target)
            # Random noise is a baseline, no attack.
            if any(record.attack not in ("none", "noise") for record in records):
                found[target] = headline(records, self.identity["attack"])
        return found

    def records_on(self, target: str) -> list[Record]:
        """Return the records of all jobs on a target."""
        return [record for group in self.records.values() for record in group if record.target == target]

    def decisive_records(self, target: str) -> list[Record]:
        """Return the records on a target among which `worst` takes the worst of each image."""
        return decisive(self.records_on(target), self.identity["attack"])

    def worst_accuracies(self, target: str) -> dict[int, float]:
        """Return each image's accuracy under its worst attack, by the image's position in the split."""
        return {record.index: record.accuracy for record in worst_case(self.decisive_records(target))}

    def find(self, target: str, attack: str) -> dict[str, Any] | None:
        """Return the row of an attack on a target, of `worst` for the worst case; None if it was not run."""
        if attack == "worst":
            return self.worst.get(target)
        return next((row for row in self.rows if (row["target"], row["attack"]) == (target, attack)), None)


@dataclass(frozen=True)
class AblationRow:
    """One variant of an ablation.

    Args:
        label: Its name.
        evaluation: Its evaluation.
        unattacked: Whether the row is about the unperturbed images of that evaluation.
        transferred: Accuracy under examples made against another rule, as `attack_row`; None if not run.
        worst: Worst case over the evaluation and the transferred examples; None without the latter.
    """

    label: str
    evaluation: StoredEvaluation
    unattacked: bool = False
    transferred: Mapping[str, Any] | None = None
    worst: Mapping[str, Any] | None = None

    def accuracy(self, attack: str) -> Mapping[str, Any] | None:
        """Return the row of `none`, `noise` or `worst` on the defence; at eps 0 they are all the same."""
        return self.evaluation.find("defence", "none" if self.unattacked else attack)


@dataclass(frozen=True)
class StoredAblation:
    """One table of `carso ablate`, its figures computed again from the evaluations that its rows name.

    Args:
        ablation: Name of the ablation.
        title: What it shows.
        varies: Heading of what is varied.
        attack: Attack or protocol of all rows.
        note: What to know about its budget; may be empty.
        rows: Its rows, in order.
    """

    ablation: str
    title: str
    varies: str
    attack: str
    note: str
    rows: tuple[AblationRow, ...]


@dataclass(frozen=True)
class StoredRun:
    """A run folder, read.

    Args:
        path: The folder, as it was named.
        recipe: The resolved recipe as plain values.
        environment: `environment.json`, empty if there is none.
        metrics: Lines of `metrics.jsonl`.
        evaluations: Complete evaluations, protocols first.
        ablations: Tables of `carso ablate`.
    """

    path: Path
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[StoredEvaluation] = ()
    ablations: Sequence[StoredAblation] = ()

    def ablations_of(self, name: str) -> list[StoredAblation]:
        """Return the tables of one ablation: one for each attack that it was run with."""
        return [one for one in self.ablations if one.ablation == name]

    @property
    def scenario(self) -> str | None:
        """The paper's scenario, `(a)`, `(b)` or `(c)`, if the recipe reproduces one."""
        return scenario_of(self.recipe["reproduces"])

    @property
    def data(self) -> str:
        """The data set by the paper's name where the recipe reproduces it, else the recipe's name."""
        return str(paper_figures()["2"][self.scenario]["dataset"] if self.scenario else self.recipe["name"])

    @property
    def perturbations_reused(self) -> int:
        """Epochs that shared their perturbed images in training; 1 in the paper."""
        training = self.recipe["training"]
        return int(training["attack_mix"].get("reuse", 1)) if training["objective"] == "elbo" else 1

    @property
    def beyond_the_paper(self) -> str:
        """In what the defence is not the paper's, as one phrase; empty for the paper's."""
        return beyond_the_paper(self.recipe)

    @property
    def plain_evaluations(self) -> list[StoredEvaluation]:
        """Evaluations at the recipe's own eps, norm, samples, aggregation and classifiers.

        Without random noise alone, which is a baseline that `carso ablate` puts beside an attack.
        """
        return [
            one for one in self.evaluations if one.identity["attack"] != "noise" and not self.departures(one)
        ]

    def departures(self, evaluation: StoredEvaluation) -> set[str]:
        """Return in which of eps, norm, n_samples, aggregation and second_kind it departs from the recipe."""
        section, found = self.recipe["evaluation"], evaluation.identity
        departing = {key for key in ("eps", "norm") if found[key] != self.recipe["threat"][key]}
        # The bare classifier has neither samples nor aggregation, so None departs from nothing.
        departing |= {key for key in ("n_samples", "aggregation") if found[key] not in (section[key], None)}
        # An ablation of the second instance shows only in the checksums of the weights.
        first, second = found.get("classifier"), found.get("second_classifier")
        if first and second:
            # Checksums only tell whether the two instances differ, so that is what is compared.
            usually_differ = self.recipe["representation"]["kind"] != section["second_kind"]
            if (first != second) != usually_differ:
                departing.add("second_kind")
        return departing


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
    return [*sorted(folder.evaluation.glob("*/settings.json")), *sorted(folder.ablations.glob("*.json"))]


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
