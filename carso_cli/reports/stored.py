"""What a run has stored, as a report reads it: metrics, evaluations, ablations.

Nothing is written, so a run that is still going on may be reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carso_cli.errors import StateError
from carso_cli.io.json_files import read_json
from carso_cli.reports.ablated import StoredAblation, read_ablation
from carso_cli.reports.evaluations import StoredEvaluation, read_evaluation
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.paper import beyond_the_paper, paper_figures, scenario_of
from carso_cli.runtime.reporter import Reporter

_ORDER = ("adaptive", "published", "quick")


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

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return str(self.recipe["name"])

    def ablations_of(self, name: str) -> list[StoredAblation]:
        """Return the tables of one ablation, which may have been attacked in more ways than one."""
        return [one for one in self.ablations if one.name == name]

    @property
    def scenario(self) -> str | None:
        """The paper's scenario, `(a)`, `(b)` or `(c)`, if the recipe reproduces one."""
        return scenario_of(self.recipe["reproduces"])

    @property
    def data(self) -> str:
        """The data set by the paper's name where the recipe reproduces it, else the recipe's name."""
        return str(paper_figures()["2"][self.scenario]["dataset"]) if self.scenario else self.name

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
        """Evaluations at the recipe's own eps, norm, samples and aggregation.

        Random noise alone is none of them: it is a baseline that `carso ablate` sets beside an attack.
        """
        return [
            one for one in self.evaluations if one.identity["attack"] != "noise" and not self.departures(one)
        ]

    def departures(self, evaluation: StoredEvaluation) -> set[str]:
        """Return in which of eps, norm, n_samples, aggregation and second_kind it departs from the recipe."""
        section, threat = self.recipe["evaluation"], self.recipe["threat"]
        usual = {
            "eps": threat["eps"],
            "norm": threat["norm"],
            "n_samples": section["n_samples"],
            "aggregation": section["aggregation"],
        }
        found = evaluation.identity
        departing = {
            key
            for key, value in usual.items()
            # The bare classifier has neither samples nor aggregation.
            if found[key] != value and not (key in ("n_samples", "aggregation") and found[key] is None)
        }
        # An ablation of the second instance shows in its weights alone.
        first, second = found.get("classifier"), found.get("second_classifier")
        if first and second:
            usually_differ = self.recipe["representation"]["kind"] != section["second_kind"]
            if (first != second) != usually_differ:
                departing.add("second_kind")
        return departing


def read_run(path: Path, recipe: Mapping[str, Any], reporter: Reporter) -> StoredRun:
    """Read everything that a run has stored; what cannot be read is left out with a warning.

    Args:
        path: Run folder.
        recipe: Its resolved recipe as plain values.
        reporter: Where warnings go.
    """
    folder = RunFolder(path)
    environment, metrics = {}, []
    if folder.trained_here and not folder.environment.is_file():
        reporter.warning(f"left out: {folder.environment} is missing")
    try:
        environment = read_json(folder.environment) if folder.environment.is_file() else {}
        metrics = folder.read_metrics(recipe["training"]["epochs"])
    except StateError as error:
        reporter.warning(f"left out: {error.message}")
    evaluations = []
    for settings in sorted(folder.evaluation.glob("*/settings.json")):
        try:
            found = read_evaluation(settings.parent)
        except StateError as error:
            reporter.warning(f"left out: {error.message}")
            continue
        if found is None:
            reporter.warning(f"left out: {settings.parent} is not complete")
        else:
            evaluations.append(found)
    known = {one.path.resolve(): one for one in evaluations}
    ablations = []
    for file in sorted(folder.ablations.glob("*.json")):
        try:
            ablations.append(read_ablation(file, known))
        except StateError as error:
            reporter.warning(f"left out: {error.message}")
    evaluations.sort(key=_protocols_first)
    return StoredRun(path, recipe, environment, metrics, evaluations, ablations)


def _protocols_first(evaluation: StoredEvaluation) -> tuple[int, str, float, int]:
    identity = evaluation.identity
    attack = str(identity["attack"])
    place = _ORDER.index(attack) if attack in _ORDER else len(_ORDER)
    return place, attack, float(identity["eps"]), identity["n_samples"] or 0
