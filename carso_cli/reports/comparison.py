"""Variants of the defence beside classifiers alone, compared image by image.

Two evaluations are compared where they attacked the same images by the same attack with the same budget;
what is attacked may differ in all else. Beyond the paper, which compares accuracies only.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from carso_cli.reports.evaluations import StoredEvaluation
from carso_cli.reports.results import trace_of
from carso_cli.reports.stored import StoredRun
from carso_cli.reports.table import MEASURED, Figure, ReportTable, Row, measured_figure
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
        weights = (identity.get("classifier"), identity["purifier"], identity.get("second_classifier"))
        share = self.run.recipe["purifier"]["input_share"]
        return (*weights, share, identity["n_samples"], identity["aggregation"])

    @property
    def accuracies(self) -> dict[int, float]:
        """Accuracy of each image under the worst attack, by its position in the split."""
        return {record.index: record.accuracy for record in self.evaluation.worst_records(self.target)}

    def label(self, letter: str | None) -> str:
        """How the model is called in its row; `letter` is that of a classifier in the headings."""
        name = self.run.path.name
        if letter is not None:
            return f"[{letter}] {name}: classifier alone"
        recipe = self.run.recipe
        layers, latent = recipe["representation"]["layers"], recipe["purifier"]["latent_features"]
        built = f"{name}: N {self.evaluation.identity['n_samples']}, Z {latent}, {len(layers)} layers"
        return "; ".join(filter(None, (built, self.run.beyond_the_paper)))


def comparison_tables(runs: Sequence[StoredRun]) -> list[ReportTable]:
    """Return a table for each attack: every model, and its paired difference to each classifier alone.

    Without anything to compare there is one table without rows.
    """
    groups: dict[str, dict[tuple[Any, ...], _Subject]] = {}
    for subject in _subjects(runs):
        groups.setdefault(subject.protocol, {}).setdefault(subject.model, subject)
    compared = [[*group.values()] for group in groups.values() if len(group) > 1]
    return [_table(place, group) for place, group in enumerate(compared, start=1)] or [_table(1, [])]


def _table(place: int, group: Sequence[_Subject]) -> ReportTable:
    bare = [subject for subject in group if subject.target == "classifier"]
    # A to Z, then AA, AB and so on.
    names = ("".join(pair) for size in (1, 2) for pair in itertools.product(ascii_uppercase, repeat=size))
    letters = {subject.model: letter for subject, letter in zip(bare, names, strict=False)}
    attack = f": {_attack(group[0].evaluation.identity)}" if group else ""
    return ReportTable(
        "",
        f"Comparison {place}, image by image{attack}",
        ("model, measured", "clean", "attacked", *(f"minus [{letter}]" for letter in letters.values())),
        tuple(_row(subject, bare, letters.get(subject.model)) for subject in group),
        (
            "Beyond the paper. attacked: worst case over all attacks of the evaluation. minus: attacked "
            "accuracy less that of a classifier alone, on the same images under the same attack; [ ]: "
            "95% interval for matched pairs (Agresti and Min, 2005).",
        ),
    )


def _attack(identity: Mapping[str, Any]) -> str:
    return (
        f"{identity['attack']}, {identity['n_images']} images, eps {identity['eps']:.4g} {identity['norm']}"
    )


def _subjects(runs: Sequence[StoredRun]) -> Iterator[_Subject]:
    for run in runs:
        for one in run.evaluations:
            if run.departures(one) <= {"n_samples"}:
                for target in one.worst:
                    if target == "classifier" or one.identity["view"] == "exact":
                        yield _Subject(run, one, target)


def _row(subject: _Subject, bare: Sequence[_Subject], letter: str | None) -> Row:
    one = subject.evaluation
    cells = (
        f"{subject.label(letter)}{one.dagger if subject.target == one.headline_target else ''}",
        measured_figure(one.find(subject.target, "none")),
        measured_figure(one.worst[subject.target]),
        *(None if other is subject else _difference(subject, other) for other in bare),
    )
    return Row(MEASURED, cells, trace_of(subject.run, one))


def _difference(subject: _Subject, other: _Subject) -> Figure:
    ours, theirs = subject.accuracies, other.accuracies
    mean, low, high = paired_difference([*ours.values()], [theirs[index] for index in ours])
    # As many digits at both ends: whether they lie on one side of zero is what is asked.
    return Figure(mean, low, high, text=f"{mean:+.3f}", interval_digits=3)
