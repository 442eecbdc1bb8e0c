"""Variants of the defence beside classifiers alone, compared image by image.

Two evaluations are compared where they attacked the same images by the same attack with the same budget;
what is attacked may differ in all else. Beyond the paper, which compares accuracies only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from carso_cli.reports.evaluations import StoredEvaluation
from carso_cli.reports.results import measured_label, trace_of
from carso_cli.reports.stored import StoredRun
from carso_cli.reports.table import MEASURED, Cell, Figure, ReportTable, Row, measured_figure
from carso_cli.runs.intervals import paired_difference

_SUBJECT = (
    *("targets", "view", "n_samples", "aggregation", "recipe", "seed", "batch_size", "selects"),
    *("classifier", "purifier", "second_classifier"),
)
"""Fields of an evaluation's identity that say what is attacked, or by which random numbers."""


@dataclass(frozen=True)
class _Subject:
    """One model under attack: a run's defence, or its classifier alone."""

    run: StoredRun
    evaluation: StoredEvaluation
    target: str

    @property
    def protocol(self) -> str:
        """What another evaluation shares that this one may be compared with."""
        identity = self.evaluation.identity
        return json.dumps({name: identity[name] for name in identity if name not in _SUBJECT}, sort_keys=True)

    @property
    def model(self) -> tuple[Any, ...]:
        """What tells this model from others."""
        identity = self.evaluation.identity
        if self.target == "classifier":
            return (identity.get("classifier"),)
        return (identity.get("classifier"), identity["purifier"], identity["n_samples"])

    @property
    def accuracies(self) -> dict[int, float]:
        """Accuracy of each image under the worst attack, by its position in the split."""
        return {record.index: record.accuracy for record in self.evaluation.worst_records(self.target)}

    @property
    def label(self) -> str:
        """How the model is called in its row."""
        if self.target == "classifier":
            return f"classifier of {self.run.path.name}, alone"
        section, recipe = self.evaluation.identity, self.run.recipe
        layers, latent = recipe["representation"]["layers"], recipe["purifier"]["latent_features"]
        share = recipe["purifier"]["input_share"]
        skip = f", input {share:g}" if share else ""
        return f"{self.run.path.name}, N {section['n_samples']}, Z {latent}, {len(layers)} layers{skip}"


def comparison_table(runs: Sequence[StoredRun]) -> ReportTable:
    """Return clean and attacked accuracy of every model, and its paired difference to every classifier."""
    groups: dict[str, dict[tuple[Any, ...], _Subject]] = {}
    for subject in _subjects(runs):
        groups.setdefault(subject.protocol, {}).setdefault(subject.model, subject)
    compared = [group for group in groups.values() if len(group) > 1]
    bare: dict[tuple[Any, ...], str] = {}
    for group in compared:
        for model, subject in group.items():
            if subject.target == "classifier":
                bare.setdefault(model, subject.run.path.name)
    rows = [_row(subject, group, list(bare)) for group in compared for subject in group.values()]
    return ReportTable(
        "",
        "Variants and classifiers, compared image by image",
        ("data", "figures", "model", "clean", "attacked", *(f"minus {name}" for name in bare.values())),
        tuple(rows),
        (
            "Beyond the paper. attacked: worst case over all attacks of the evaluation. minus RUN: attacked "
            "accuracy less that of RUN's classifier alone, on the same images under the same attack; [ ]: "
            "95% interval for matched pairs (Agresti and Min, 2005).",
        ),
    )


def _subjects(runs: Sequence[StoredRun]) -> Iterator[_Subject]:
    for run in runs:
        for one in run.evaluations:
            if run.departures(one) <= {"n_samples"}:
                for target in one.worst:
                    if target == "classifier" or one.identity["view"] == "exact":
                        yield _Subject(run, one, target)


def _row(subject: _Subject, group: dict[tuple[Any, ...], _Subject], bare: Sequence[tuple[Any, ...]]) -> Row:
    one = subject.evaluation
    differences: list[Cell] = [
        None if model == subject.model or model not in group else _difference(subject, group[model])
        for model in bare
    ]
    cells = (
        *(subject.run.data, measured_label(subject.run, one, subject.target), subject.label),
        measured_figure(one.find(subject.target, "none")),
        measured_figure(one.worst[subject.target]),
        *differences,
    )
    return Row(MEASURED, cells, trace_of(subject.run, one))


def _difference(subject: _Subject, other: _Subject) -> Figure:
    ours, theirs = subject.accuracies, other.accuracies
    mean, low, high = paired_difference([*ours.values()], [theirs[index] for index in ours])
    return Figure(mean, low, high, text=f"{mean:+.3f}")
