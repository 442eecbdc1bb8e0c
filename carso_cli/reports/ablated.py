"""Stored ablations, each row joined with the records that it was drawn from.

`carso ablate` stores a table whose rows name their evaluations; figures are computed again from those
records, so that an ablation's row and the same evaluation elsewhere in a report cannot disagree.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carso_cli.errors import StateError
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.reports.evaluations import StoredEvaluation, read_evaluation
from carso_cli.runs.folder import ABLATION_SCHEMA
from carso_cli.runs.records import Record
from carso_cli.runs.summary import attack_row, decisive, headline


@dataclass(frozen=True)
class AblationRow:
    """One variant.

    Args:
        label: What it is called.
        values: What was chosen.
        evaluation: Its evaluation.
        unattacked: Whether the row is about the unperturbed images of that evaluation.
        transferred: Accuracy under examples made against another rule, as `attack_row`; None if not run.
        worst: Worst case over the evaluation and the transferred examples; None without the latter.
    """

    label: str
    values: Mapping[str, Any]
    evaluation: StoredEvaluation
    unattacked: bool = False
    transferred: Mapping[str, Any] | None = None
    worst: Mapping[str, Any] | None = None

    @property
    def clean(self) -> Mapping[str, Any] | None:
        """Accuracy of the defence on unperturbed images."""
        return self.evaluation.find("defence", "none")

    @property
    def attacked(self) -> Mapping[str, Any] | None:
        """Worst case of the defence over the attacks of the evaluation."""
        return self.clean if self.unattacked else self.evaluation.worst.get("defence")

    @property
    def noise(self) -> Mapping[str, Any] | None:
        """Accuracy of the defence under random noise."""
        return self.clean if self.unattacked else self.evaluation.find("defence", "noise")


@dataclass(frozen=True)
class StoredAblation:
    """One table of `carso ablate`.

    Args:
        name: Which ablation it is.
        title: What it shows.
        varies: Heading of what is varied.
        attack: Attack or protocol of all rows.
        note: What must be known of its budget; may be empty.
        rows: Its rows, in order.
    """

    name: str
    title: str
    varies: str
    attack: str
    note: str
    rows: tuple[AblationRow, ...]


def read_ablation(path: Path, known: Mapping[Path, StoredEvaluation]) -> StoredAblation:
    """Read `<run>/ablations/<name>-<attack>.json` and the records of its rows.

    Args:
        path: The file.
        known: Evaluations that are read already, by resolved folder.

    Raises:
        StateError: If the file or one of its evaluations is damaged, missing or of another version.
    """
    stored = read_json(path)
    if stored.get("schema") != ABLATION_SCHEMA:
        raise StateError(f"{path} has schema {stored.get('schema')}; this carso reads {ABLATION_SCHEMA}")
    root = path.parents[1]
    try:
        rows = tuple(_read_row(root, row, known) for row in stored["rows"])
        texts = {key: str(stored[key]) for key in ("title", "varies", "attack", "note")}
        return StoredAblation(str(stored["ablation"]), **texts, rows=rows)
    except (KeyError, TypeError) as error:
        raise StateError(f"{path} lacks or misplaces {error}") from error


def _read_row(root: Path, row: Mapping[str, Any], known: Mapping[Path, StoredEvaluation]) -> AblationRow:
    folder = Path(os.path.normpath(root / row["evaluation"]))
    evaluation = known.get(folder.resolve()) or read_evaluation(folder)
    if evaluation is None:
        raise StateError(f"the evaluation {folder} of row '{row['label']}' is not complete")
    transferred = row["transferred"]
    records = [] if transferred is None else _transferred_records(root / transferred["source"], evaluation)
    every = [record for group in evaluation.records.values() for record in group]
    own = decisive([one for one in every if one.target == "defence"], evaluation.identity["attack"])
    return AblationRow(
        str(row["label"]),
        row["values"],
        evaluation,
        unattacked=row["eps"] == 0.0,
        transferred=attack_row(records) if records else None,
        worst=headline([*own, *records], "transferred") if records else None,
    )


def _transferred_records(folder: Path, evaluation: StoredEvaluation) -> list[Record]:
    rule = evaluation.identity["aggregation"]
    lines = read_json_lines(folder / "records.jsonl", repair=False)
    found = [record for record in map(Record.from_dict, lines) if record.aggregation == rule]
    images = evaluation.identity["n_images"]
    if len({record.index for record in found}) != images or len(found) != images:
        raise StateError(f"{folder} holds {len(found)} records of '{rule}' for {images} images")
    return found
