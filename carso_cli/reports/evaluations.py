"""Stored evaluations, as a report reads them.

Every figure is computed again from `records.jsonl`; the summary beside it is read for the checks and the
settings, and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from carso_cli.errors import StateError
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.runs.records import SCHEMA, EvaluationFolder, Record
from carso_cli.runs.summary import attack_row, decisive, headline, worst_case

UNTRUSTED = "†"

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

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One row per job, computed from the records; see `carso_cli.runs.summary.attack_row`."""
        return [attack_row(records) for records in self.records.values()]

    @cached_property
    def worst(self) -> dict[str, dict[str, Any]]:
        """Result on each target, `classifier` and `defence`, where attacked at all.

        The worst case over all attacks of a protocol; a single attack stands for itself.
        """
        found = {}
        for target in ("classifier", "defence"):
            own = self._decisive(target)
            if any(record.attack not in ("none", "noise") for record in own):
                found[target] = headline(own, self.identity["attack"])
        return found

    def worst_records(self, target: str) -> list[Record]:
        """Return, for each image, the record that `worst` counts."""
        return worst_case(self._decisive(target))

    def _decisive(self, target: str) -> list[Record]:
        own = [record for group in self.records.values() for record in group if record.target == target]
        return decisive(own, self.identity["attack"])

    def worst_of(self, target: str, prefix: str) -> dict[str, Any] | None:
        """Return the worst case over the attacks whose name starts with `prefix`; None if there is none."""
        own = [
            record
            for group in self.records.values()
            for record in group
            if record.target == target and record.attack.startswith(prefix)
        ]
        return headline(own, prefix) if own else None

    @property
    def health(self) -> list[Mapping[str, Any]]:
        """Gradient health by job, as summarised: `target`, `attack` and the shares of `gradients`."""
        return [row for row in self.summary["results"] if row["gradients"]["gradients"]]

    @property
    def failed(self) -> list[str]:
        """Names of the trust checks that failed."""
        return list(self.summary["failed"])

    @property
    def dagger(self) -> str:
        """What marks figures whose trust checks failed, or nothing."""
        return UNTRUSTED if self.failed else ""

    @property
    def headline_target(self) -> str:
        """The target that the trust checks are about."""
        return str(self.identity["targets"][-1])

    def find(self, target: str, *attacks: str) -> dict[str, Any] | None:
        """Return the row of the first of some attacks on a target that was run."""
        for attack in attacks:
            for row in self.rows:
                if (row["target"], row["attack"]) == (target, attack):
                    return row
        return None


def read_evaluation(path: Path) -> StoredEvaluation | None:
    """Read one evaluation; None if it is not complete.

    Raises:
        StateError: If its files are damaged, of another version of carso, or contradict each other.
    """
    folder = EvaluationFolder(path)
    if not folder.summary.is_file():
        return None
    summary = read_json(folder.summary)
    if summary.get("schema") != SCHEMA:
        raise StateError(f"{folder.summary} has schema {summary.get('schema')}; this carso reads {SCHEMA}")
    try:
        identity = summary["settings"]["identity"]
        jobs = {job: list[Record]() for job in summary["settings"]["jobs"]}
        for line in read_json_lines(folder.records, repair=False):
            record = Record.from_dict(line)
            jobs[record.job].append(record)
        found = StoredEvaluation(path, summary, jobs)
        _check_against_summary(found, identity["n_images"])
    except (KeyError, TypeError) as error:
        raise StateError(f"{path} lacks or misplaces {error}") from error
    return found


def _check_against_summary(evaluation: StoredEvaluation, images: int) -> None:
    for job, records in evaluation.records.items():
        if len({record.index for record in records}) != images or len(records) != images:
            raise StateError(
                f"{evaluation.path / 'records.jsonl'} holds {len(records)} records of '{job}' for {images} "
                "images; the summary beside it belongs to other records"
            )
    for row, told in zip(evaluation.rows, evaluation.summary["results"], strict=True):
        if abs(row["accuracy"] - told["accuracy"]) > _ROUNDING:
            raise StateError(
                f"{evaluation.path}: its records give {row['target']}/{row['attack']} an accuracy of "
                f"{row['accuracy']:.6g}; its summary says {told['accuracy']:.6g}"
            )
