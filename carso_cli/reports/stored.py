"""What runs have stored, as a report holds it: metrics, evaluations, ablations; read by `load`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from carso_cli.runs.paper import beyond_the_paper, dataset_of, departures, scenario_of
from carso_cli.runs.records import Record
from carso_cli.runs.summary import attack_row, decisive, headline, worst_case


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

    def is_union(self, target: str, attack: str) -> bool:
        """Return whether an attack's row counts images that an earlier attack broke and it never saw."""
        found = (record for record in self.records_on(target) if record.attack == attack)
        # Images that are misclassified unperturbed count as broken under every attack, in the paper too.
        return any(record.skipped and "/none" not in f"{record.skipped_by}" for record in found)

    @property
    def on_defence(self) -> str:
        """What was done to the defence: the same for evaluations that differ in what else they attacked."""
        known = {name: value for name, value in self.identity.items() if name != "targets"}
        return json.dumps(known, sort_keys=True)


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
    def dataset(self) -> str | None:
        """The data set by the paper's name, if the recipe reproduces a row of the paper."""
        return dataset_of(self.recipe)

    @property
    def data(self) -> str:
        """The data set by the paper's name where the recipe reproduces it, else the recipe's name."""
        return self.dataset or str(self.recipe["name"])

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
        plain = [
            one for one in self.evaluations if one.identity["attack"] != "noise" and not self.departures(one)
        ]
        widest: dict[str, int] = {}
        for one in plain:
            widest[one.on_defence] = max(widest.get(one.on_defence, 0), len(one.identity["targets"]))
        # One with fewer targets would show some of the same figures again.
        return [one for one in plain if len(one.identity["targets"]) == widest[one.on_defence]]

    def differs(
        self, evaluation: StoredEvaluation | None = None, varied: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Return what differs from the paper's recipe; see `carso_cli.runs.paper.departures`."""
        trained_on = int(self.metrics[-1]["images"]) if self.metrics else None
        identity = None if evaluation is None else evaluation.identity
        known: dict[str, Any] = {"trained": bool(self.metrics), "trained_on": trained_on}
        return departures(self.recipe, identity, varied=varied, **known)

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
