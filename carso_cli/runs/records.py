"""Records of an evaluation: one JSON line per image and attack, written as they come.

    <run>/evaluation/<id>/
        settings.json      what is attacked and how: the identity that a resumed evaluation must share
        records.jsonl      one `Record` per image and job, appended a whole block at a time
        gradients.jsonl    per block: seconds, gradient health of every attack step, library warnings
        checks.jsonl       per rerun of an attack on a few images, for the sanity checks: seconds, its values
        summary.json       the result, drawn from the records

A job is one attack on one target; a block is a fixed group of images. A block that a kill left incomplete is
dropped when the evaluation is resumed, so no image is counted twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from carso_cli.errors import StateError
from carso_cli.io.json_files import (
    append_json_lines,
    ensure_folder,
    read_json,
    read_json_lines,
    write_json,
    write_json_lines,
)
from carso_cli.recipe.identity import differing_values
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import Reporter

SCHEMA = 1
"""Version of the settings, records and summary; raised when a field changes its meaning."""

_SAME_MODELS = (
    *("eps", "norm", "n_samples", "aggregation", "images"),
    *("classifier", "purifier", "second_classifier"),
    *("classifier_answers", "second_classifier_answers", "defence_answers"),
)
"""Fields of the identity that two evaluations must share to be compared; absent in older ones."""
_SAME_BUDGET = (
    *("seed", "draws", "eot_draws", "pgd_steps", "apgd_steps", "pgd_eot_steps", "square_queries"),
)
"""Fields that they must share too for one number to stand beside the other."""

_STORED_AS = {"broken": "certain", "skipped": "settled", "skipped_by": "settled_by"}
"""Fields whose names in the files are older than their names here."""


@dataclass(frozen=True)
class Record:
    """One image under one attack. R is `draws`, the fresh draws of each scoring set; 1 for a classifier.

    Where something is chosen, an attack or an example of one, the selection set decides and `correct` is
    counted on the report set, so the choice does not flatter the attacker.
    """

    job: str
    block: int
    index: int
    """Position of the image in the full split."""
    label: int
    target: str
    attack: str
    part: str
    """Which of the attack's examples this is, where it offers several."""
    view: str | None
    aggregation: str | None
    n_samples: int | None
    eps: float
    norm: str
    seed: int
    draws: int
    correct: int
    """Of R report draws, how many classify the example as its label."""
    correct_selection: int | None
    """The same on the selection draws; None for a single attack, where nothing is chosen."""
    majority_correct: bool
    """Whether the label has more of the report draws than any other class."""
    margin: float | None
    """Mean lead of the label's exact-view logit over the next, in the deciding draws; negative if wrong."""
    clean_margin: float | None
    """The same on the unperturbed image."""
    loss: float | None
    """Mean cross-entropy of the exact view, in the same draws."""
    distance: float
    disagreements: int
    """Of R report draws, in how many the exact view's argmax differs from the defence's own decision."""
    broken: bool
    """Wrong in every selection draw and in every draw of a third set: later attacks skip the image."""
    skipped: bool
    """Not attacked: an earlier job, `skipped_by`, has broken it, and its result stands here."""
    skipped_by: str | None

    @property
    def accuracy(self) -> float:
        """Share of report draws that classify the example as its label."""
        return self.correct / self.draws

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; a number that is not finite becomes None."""
        return {
            # JSON has no NaN or infinity, and the checksum refuses them.
            _STORED_AS.get(key, key): None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read one line.

        Raises:
            StateError: If fields are missing or unknown.
        """
        names = {_STORED_AS.get(entry.name, entry.name): entry.name for entry in fields(cls)}
        # Unknown fields too: a newer version may mean something else by the rest.
        if set(values) != set(names):
            raise StateError(
                f"a record's fields differ from this version's: {sorted(set(values) ^ set(names))}"
            )
        return cls(**{names[key]: value for key, value in values.items()})

    def carried_to(self, job: str, block: int, **changes: Any) -> Record:  # noqa: ANN401  (fields of a record)
        """Return this result as the record of a later job, which skips the image."""
        # By the job that broke it, not by one in between that only skipped it as well.
        return replace(
            self, job=job, block=block, skipped=True, skipped_by=self.skipped_by or self.job, **changes
        )


class EvaluationFolder:
    """One evaluation on disk.

    Args:
        path: Its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.records = path / "records.jsonl"
        self.gradients = path / "gradients.jsonl"
        self.checks = path / "checks.jsonl"
        self.summary = path / "summary.json"

    @property
    def exists(self) -> bool:
        """Whether an evaluation was started here."""
        return self.settings.is_file()

    def start(self, settings: Mapping[str, Any]) -> None:
        """Create the folder, proven writable, and write the settings before anything is computed."""
        ensure_folder(self.path)
        write_json(self.settings, settings)

    def discard(self) -> None:
        """Remove what the evaluation stored, its settings last: until then it can be resumed."""
        # The summary first: while it is there, the evaluation counts as complete.
        for path in (self.summary, self.records, self.gradients, self.checks, self.settings):
            path.unlink(missing_ok=True)

    def append_block(self, records: Sequence[Record], gradients: Mapping[str, Any]) -> None:
        """Write one finished block, gradients first: where the records are, the gradients are too."""
        append_json_lines(self.gradients, [gradients])
        append_json_lines(self.records, [record.as_dict() for record in records])

    def read_blocks(
        self, sizes: Mapping[tuple[str, int], int], reporter: Reporter
    ) -> dict[tuple[str, int], list[Record]]:
        """Return the complete blocks by (job, block); remove from disk what belongs to no complete one.

        Args:
            sizes: Number of images of every block of every job.
            reporter: Told how much is there, and warned when more was there once.

        Raises:
            StateError: If the files are damaged, hold an image twice, or a job or block that is not planned.
        """
        found: dict[tuple[str, int], list[Record]] = {}
        for line in read_json_lines(self.records):
            record = Record.from_dict(line)
            place = (record.job, record.block)
            if place not in sizes:
                raise StateError(f"{self.records} holds block {record.block} of '{record.job}', not planned")
            found.setdefault(place, []).append(record)
        for place, records in found.items():
            # Such a block would count some images double.
            if len(records) > sizes[place] or len({record.index for record in records}) < len(records):
                raise StateError(f"{self.records}: block {place[1]} of '{place[0]}' counts images twice")
        health = read_json_lines(self.gradients)
        # A block run again after a kill has two lines here; the last is that of its records.
        measured = {(line["job"], line["block"]): line for line in health}
        # Without its line on gradients a block would be missing from the sanity checks.
        complete = {
            place: records
            for place, records in found.items()
            if len(records) == sizes[place] and place in measured
        }
        if sum(map(len, complete.values())) < sum(map(len, found.values())):
            # Replaced in one step: a kill meanwhile leaves the old file, and this is done again.
            write_json_lines(
                self.records, [record.as_dict() for group in complete.values() for record in group]
            )
        if len(complete) < len(health):
            write_json_lines(self.gradients, [measured[place] for place in complete])
        if begun := len(set(found) | set(measured)):
            reporter.info(f"{len(complete)} of {len(sizes)} blocks are stored in {self.path}")
            # A kill leaves one block incomplete; more than that means that records were lost.
            if (lost := begun - len(complete)) > 1:
                reporter.warning(
                    f"{self.path} once held {begun} blocks; {lost} of them are incomplete and are run again"
                )
        return complete

    def read_health(self) -> list[dict[str, Any]]:
        """Return the lines on seconds and gradients, one per finished block."""
        return read_json_lines(self.gradients)

    def append_check(self, name: str, images: int, values: Sequence[float], seconds: float) -> None:
        """Write what one rerun for a sanity check found on some images."""
        line = {"check": name, "n_images": images, "values": list(values), "seconds": round(seconds, 4)}
        append_json_lines(self.checks, [line])

    def read_checks(self, images: int) -> dict[str, dict[str, Any]]:
        """Return the lines of `append_check` on that many images, by name."""
        return {line["check"]: line for line in read_json_lines(self.checks) if line["n_images"] == images}


def evaluation_id(identity: Mapping[str, Any]) -> str:
    """Return the name of an evaluation's folder: its attack, and a short hash of everything else."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{identity['attack']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


_HASHED = {
    "images": "other images",
    "classifier": "other weights of the classifier",
    "purifier": "other weights of the purifier",
    "second_classifier": "other weights of the second classifier",
    "recipe": "another recipe",
    "classifier_answers": "other answers of the classifier",
    "second_classifier_answers": "other answers of the second classifier",
    "defence_answers": "other answers of the defence",
}
"""What to say of fields whose values are hashes, which would tell a user nothing."""


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say in which fields two identities differ, with both values where these are no hashes."""
    # Evaluations from before there was a choice do not say it.
    stored, wanted = ({"gradient_precision": "fp32", **identity} for identity in (stored, wanted))
    names = [name for name in dict.fromkeys((*wanted, *stored)) if stored.get(name) != wanted.get(name)]
    # Another number of images is always other images.
    names = [name for name in names if name != "images" or "n_images" not in names]
    if {"images", "n_images"} & set(names):
        # Models answer otherwise on other images, which says nothing of the models.
        names = [name for name in names if not name.endswith("_answers")]
    options = {"n_images": "--limit", "gradient_precision": "evaluation.gradient_precision"}
    return [
        _HASHED.get(name)
        or f"{options.get(name, name)} was {short(stored.get(name))}, now {short(wanted.get(name))}"
        for name in names
    ]


def _recipe_differences(stored: Mapping[str, Any], recipe: Recipe | None) -> list[str]:
    """Say in which values the recipe of an evaluation differs from another; unknown for an older one."""
    if recipe is None or "values" not in stored:
        return []
    return differing_values(Recipe.model_validate(stored["values"]), recipe)


def attacks_exact_view_of(other: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Say whether an evaluation is the adaptive protocol, at the same budget, on the exact view of the same.

    Args:
        other: Its identity.
        identity: That of the other evaluation, on whatever view.
    """
    is_exact = (other["attack"], other["view"]) == ("adaptive", "exact") and "defence" in other["targets"]
    same = (*_SAME_MODELS, *_SAME_BUDGET)
    return is_exact and all(other.get(name) == identity.get(name) for name in same)


def exact_view_result(parent: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what must be shown beside a result that did not attack the exact view; None beside others.

    It is looked up whenever a result is shown, as the other evaluation may be run later, or again.

    Args:
        parent: The run's evaluation folder.
        identity: That of the result.

    Returns:
        `accuracy` and `ci95` of the adaptive protocol on the same models, images, eps and budget, both None
        where it was not run, and a `note`.
    """
    if identity["view"] == "exact" or "defence" not in identity["targets"]:
        return None
    found: list[tuple[int, str, Mapping[str, Any]]] = []
    # Only complete evaluations have a summary.
    for path in parent.glob("*/summary.json"):
        try:
            stored = read_json(path)
            other = stored["settings"]["identity"]
            if attacks_exact_view_of(other, identity):
                found.append((other.get("version", 1), path.parent.name, stored["headline"]))
        except (StateError, KeyError, TypeError):
            # Damaged, or written by another version: this result does not depend on it.
            continue
    if not found:
        missing = "run carso evaluate with --attack adaptive and the same options"
        return {
            "accuracy": None,
            "ci95": None,
            "note": f"not run: the exact view was not attacked on these images at this budget; {missing}",
        }
    # The newest version of the protocol; by name, as a file system lists in any order.
    version, name, figures = max(found, key=lambda one: one[:2])
    note = f"the adaptive protocol, version {version}, on the exact view, from {name}"
    return {"accuracy": figures["accuracy"], "ci95": figures["ci95"], "note": note}


def short(value: object) -> str:
    """Return a value as text, a checksum by its first digits."""
    text = str(value)
    # 64 characters: a SHA-256 in hexadecimal digits.
    return text[:12] if len(text) == 64 else text


def find_to_resume(
    parent: Path, identity: Mapping[str, Any], recipe: Recipe | None = None
) -> EvaluationFolder:
    """Return the evaluation of this identity in a run's evaluation folder.

    Args:
        parent: The evaluation folder of the run.
        identity: What is to be resumed.
        recipe: The recipe of it, to name the values in which a stored one differs.

    Raises:
        StateError: If there is none; where there are others, naming how the nearest differs.
    """
    folder = EvaluationFolder(parent / evaluation_id(identity))
    stored = [EvaluationFolder(path.parent) for path in sorted(parent.glob("*/settings.json"))]
    if not stored:
        raise StateError(f"{parent} holds no evaluation to resume", hint="leave out --resume to start one")
    compared = [
        (differences(settings.get("identity", {}), identity), one, settings)
        # Compared even where the name fits: it holds but 8 digits of the hash.
        for one in ([folder] if folder.exists else stored)
        for settings in [read_json(one.settings)]
    ]
    found, folder, settings = min(compared, key=lambda each: len(each[0]))
    if found:
        older = any(
            name.endswith("_answers") and name not in settings.get("identity", {}) for name in identity
        )
        if _HASHED["recipe"] in found and (named := _recipe_differences(settings, recipe)):
            found = [*named, *(text for text in found if text != _HASHED["recipe"])]
        raise StateError(
            f"{folder.path} belongs to another configuration: {'; '.join(found)}",
            hint="it was stored by an earlier version of carso and cannot be told from other code; leave out "
            "--resume to evaluate, or see it with carso report"
            if older
            else "give the same options as before, or leave out --resume to start another",
        )
    return folder
