"""Variants of the defence beside classifiers alone, compared image by image.

Two evaluations are compared where they attacked the same images by the same attack with the same budget;
the attacked models may differ in everything else. Beyond the paper, which compares accuracies only.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from carso_cli.reports.rows import dagger, trace_of
from carso_cli.reports.stored import StoredEvaluation, StoredRun
from carso_cli.reports.table import MEASURED, Cell, Figure, ReportTable, Row, measured_figure
from carso_cli.runs.intervals import paired_difference

_MODEL_FIELDS = {
    *("targets", "view", "n_samples", "aggregation", "recipe", "seed", "batch_size", "selects"),
    *("classifier", "purifier", "second_classifier"),
}
"""Fields of an evaluation's identity that say what is attacked, or by which random numbers."""


@dataclass(frozen=True)
class _Model:
    """A model under attack: a run's defence, or its classifier alone."""

    run: StoredRun
    evaluation: StoredEvaluation
    target: str

    @property
    def protocol(self) -> str:
        """The rest of the identity: models are compared where it is the same."""
        # The identity holds a checksum of the images, so one protocol means the same images.
        rest = {name: value for name, value in self.evaluation.identity.items() if name not in _MODEL_FIELDS}
        return json.dumps(rest, sort_keys=True)

    @property
    def key(self) -> tuple[Any, ...]:
        """What distinguishes this model from others: checksums of its weights and how they are used."""
        identity = self.evaluation.identity
        # A bare classifier is the same model in every run built on it: neither samples nor rule apply.
        if self.target == "classifier":
            return (identity.get("classifier"),)
        weights = (identity.get("classifier"), identity["purifier"], identity.get("second_classifier"))
        share = self.run.recipe["purifier"]["input_share"]
        return (*weights, share, identity["n_samples"], identity["aggregation"])

    def label(self, letter: str | None) -> str:
        """Return the model's name in its row; `letter` stands for a classifier in the headings."""
        name, recipe, one = self.run.path.name, self.run.recipe, self.evaluation
        # The checks are about the last target only, so a classifier beside a defence bears no dagger.
        mark = dagger(one) if self.target == one.identity["targets"][-1] else ""
        if letter is not None:
            return f"[{letter}] {name}: classifier alone{mark}"
        layers, latent = recipe["representation"]["layers"], recipe["purifier"]["latent_features"]
        built = f"{name}: N {one.identity['n_samples']}, Z {latent}, {len(layers)} layers"
        return "; ".join(filter(None, (built, self.run.beyond_the_paper))) + mark

    def minus(self, other: _Model) -> Figure:
        """Return the paired difference of attacked accuracies."""
        ours, theirs = (model.evaluation.worst_accuracies(model.target) for model in (self, other))
        # Theirs by our indices, since each pair must be of one image.
        mean, low, high = paired_difference([*ours.values()], [theirs[index] for index in ours])
        # As many digits at both ends as in the mean: the question is whether they lie on one side of zero.
        return Figure(mean, low, high, text=f"{mean:+.3f}", interval_digits=3)


def comparison_tables(runs: Sequence[StoredRun]) -> list[ReportTable]:
    """Return a table for each attack: every model, and its paired difference to each classifier alone.

    Without anything to compare there is one table without rows.
    """
    groups: dict[str, dict[tuple[Any, ...], _Model]] = {}
    for model in _models(runs):
        # Of equal models the first stands for all, such as a classifier that several runs share.
        groups.setdefault(model.protocol, {}).setdefault(model.key, model)
    compared = [[*group.values()] for group in groups.values() if len(group) > 1]
    return [_table(place, group) for place, group in enumerate(compared, start=1)] or [_table(1, [])]


def _models(runs: Sequence[StoredRun]) -> Iterator[_Model]:
    for run in runs:
        for one in run.evaluations:
            # A model's row names N; whatever else departs from its recipe would not show there.
            if run.departures(one) <= {"n_samples"}:
                for target in one.worst:
                    # A view whose gradients saturate says nothing about the defence.
                    if target == "classifier" or one.identity["view"] == "exact":
                        yield _Model(run, one, target)


def _table(place: int, group: Sequence[_Model]) -> ReportTable:
    classifiers = [model for model in group if model.target == "classifier"]
    # A to Z, then AA, AB and so on.
    names = ("".join(pair) for size in (1, 2) for pair in itertools.product(ascii_uppercase, repeat=size))
    letters = {model.key: letter for model, letter in zip(classifiers, names, strict=False)}
    attack, rows = "", []
    for model in group:
        one, known = model.evaluation, model.evaluation.identity
        # The same for every model, since a group shares its protocol.
        attack = f": {known['attack']}, {known['n_images']} images, eps {known['eps']:.4g} {known['norm']}"
        cells: tuple[Cell, ...] = (
            model.label(letters.get(model.key)),
            measured_figure(one.find(model.target, "none")),
            measured_figure(one.worst[model.target]),
            *(None if other is model else model.minus(other) for other in classifiers),
        )
        rows.append(Row(MEASURED, cells, trace_of(model.run, one)))
    return ReportTable(
        "",
        f"Comparison {place}, image by image{attack}",
        ("model, measured", "clean", "attacked", *(f"minus [{letter}]" for letter in letters.values())),
        tuple(rows),
        (
            "Beyond the paper. attacked: worst case over all attacks of the evaluation. minus: attacked "
            "accuracy less that of a classifier alone, on the same images under the same attack; [ ]: "
            "95% interval for matched pairs (Agresti and Min, 2005).",
        ),
    )
