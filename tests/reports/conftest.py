"""Small fixed runs: a few records each, written as `carso evaluate` writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from carso_cli.io.json_files import append_json_lines, write_json
from carso_cli.recipe.load import dump_recipe, load_recipe
from carso_cli.reports.load import read_run
from carso_cli.reports.stored import StoredRun
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.records import SCHEMA, EvaluationFolder, Record, evaluation_id
from carso_cli.runs.summary import attack_row
from carso_cli.runtime.reporter import SilentReporter

Outcomes = Mapping[tuple[str, str, str | None], Sequence[int]]

METRICS = [
    {"epoch": 0, "loss": 900.0, "bce": 900.0, "kl": 4.0, "beta": 0.0, "learning_rate": 1e-3, "images": 10},
    {"epoch": 1, "loss": 501.5, "bce": 500.0, "kl": 3.0, "beta": 0.5, "learning_rate": 1e-4, "images": 10},
]


def _records(
    job: tuple[str, str, str | None], counts: Sequence[int], known: Mapping[str, Any]
) -> list[Record]:
    target, attack, view = job
    draws = known["draws"] if target == "defence" else 1
    return [
        Record(
            job="/".join(filter(None, job)),
            block=0,
            index=index,
            label=index % 10,
            target=target,
            attack=attack,
            part=attack,
            view=view,
            aggregation=known["aggregation"] if target == "defence" else None,
            n_samples=known["n_samples"] if target == "defence" else None,
            eps=0.0 if attack == "none" else known["eps"],
            norm=known["norm"],
            seed=known["seed"],
            draws=draws,
            correct=count,
            correct_selection=count,
            majority_correct=count * 2 > draws,
            margin=float(count) - 0.5,
            clean_margin=1.0,
            loss=1.0,
            distance=0.05,
            disagreements=0,
            broken=False,
            skipped=False,
            skipped_by=None,
        )
        for index, count in enumerate(counts)
    ]


BOTH: Outcomes = {
    ("classifier", "none", None): [1, 1, 1, 0],
    ("classifier", "aa", None): [1, 0, 0, 0],
    ("defence", "none", None): [2, 2, 2, 1],
    ("defence", "noise", None): [2, 2, 1, 1],
    ("defence", "rand-aa", "exact"): [2, 1, 0, 0],
    ("defence", "pgd-eot", "exact"): [0, 2, 1, 1],
}
"""Clean 0.75 and 0.875; aa 0.25; rand-aa 0.375; pgd-eot 0.5; worst case of the defence 0.125."""


class Writer:
    """Writes runs, evaluations and ablations below a folder, and reads them back."""

    both = BOTH

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: Path) -> StoredRun:
        return read_run(path, SilentReporter())

    def run(self, name: str = "digits", recipe: str = "digits", overrides: Sequence[str] = ()) -> Path:
        """Write a run folder: recipe, two epochs of 45 s each, environment."""
        folder = RunFolder(self.root / name)
        folder.path.mkdir()
        chosen = [*overrides]
        if recipe == "digits":
            chosen += ["training.epochs=2", "training.learning_rate.warmup_epochs=0"]
            chosen += ["training.learning_rate.plateau_epochs=1", "training.learning_rate.annealing_epochs=1"]
            chosen += ["training.beta_increase.first_epoch=0", "training.beta_increase.last_epoch=1"]
        folder.recipe.write_text(dump_recipe(load_recipe(recipe, chosen)))
        write_json(folder.environment, {"device": "cpu", "device_name": "x86_64", "threads": 2})
        lines = [{**line, "seconds": 45.0, "defence_clean_accuracy": 0.9} for line in METRICS]
        append_json_lines(folder.metrics, lines)
        return folder.path

    def ablation(
        self, run: Path, name: str, rows: Sequence[tuple[str, Path, dict[str, Any]]], **facts: Any
    ) -> Path:
        """Write an ablation's table, whose rows are (label, evaluation, further fields)."""
        described = [
            {"label": label, "values": {}, "eps": 0.1, "transferred": None}
            | {"evaluation": os.path.relpath(path, run)}
            | further
            for label, path, further in rows
        ]
        (run / "ablations").mkdir(exist_ok=True)
        table = {"schema": 1, "ablation": name, "title": f"About {name}", "varies": name, "note": ""}
        table = {**table, "attack": "adaptive", **facts}
        file = run / "ablations" / f"{name}-{table['attack']}.json"
        write_json(file, {**table, "rows": described})
        return file

    def transferred(self, run: Path, counts: Mapping[str, Sequence[int]]) -> str:
        """Write examples made against one rule and scored under others; return their place in the run."""
        folder = EvaluationFolder(run / "ablations" / "transferred-1234")
        folder.start({"schema": 1})
        for rule, correct in counts.items():
            known = {"draws": 2, "aggregation": rule, "n_samples": 8, "eps": 0.1, "norm": "linf", "seed": 3}
            records = _records(("defence", "transferred", rule), correct, known)
            folder.append_block(records, {"job": rule, "block": 0, "steps": [], "seconds": 1.0})
        return str(folder.path.relative_to(run))

    def evaluation(
        self,
        run: Path,
        attack: str,
        outcomes: Outcomes,
        *,
        draws: int = 2,
        failed: Sequence[str] = (),
        checks: Mapping[str, float | None] | None = None,
        unusable: float = 0.0,
        skipped: Mapping[str, str] | None = None,
        **identity: Any,
    ) -> Path:
        """Write a complete evaluation; `outcomes` gives, per job, the correct draws of each image.

        `skipped` gives, per job, which other one broke the first image.
        """
        known = {
            "attack": attack,
            "targets": sorted({target for target, _, _ in outcomes}),
            "view": "exact",
            "eps": 0.1,
            "norm": "linf",
            "seed": 3,
            "n_samples": 8,
            "aggregation": "doubly-exponential",
            "n_images": len(next(iter(outcomes.values()))),
            "images": "feed",
            "purifier": "abcd",
            "second_classifier": "cafe",
            "draws": draws,
            "pgd_step_size": 0.25 * identity.get("eps", 0.1),
        } | identity
        folder = EvaluationFolder(RunFolder(run).evaluation / evaluation_id(known))
        jobs = {"/".join(filter(None, job)): _records(job, counts, known) for job, counts in outcomes.items()}
        for job, by in (skipped or {}).items():
            jobs[job][0] = replace(jobs[job][0], skipped=True, skipped_by=by)
        settings = {
            "schema": SCHEMA,
            "identity": known,
            "label": f"label of {attack}",
            "jobs": list(jobs),
            "recipe": "digits",
            "carso": "0.1.0",
            "environment": {"device": "cpu"},
        }
        folder.start(settings)
        for records in jobs.values():
            folder.append_block(records, {"job": records[0].job, "block": 0, "steps": [], "seconds": 1.0})
        health = {"gradients": 5, "unusable": unusable}
        results = [{**attack_row(records), "gradients": health, "seconds": 1.0} for records in jobs.values()]
        named = {**dict.fromkeys(failed, 0.5), **(checks or {})}
        described = [
            {
                "name": name,
                "value": value,
                "threshold": 0.1,
                "passed": name not in failed,
                "meaning": f"of {name}",
            }
            for name, value in named.items()
        ]
        summary = {"schema": SCHEMA, "label": f"label of {attack}", "results": results, "settings": settings}
        write_json(folder.summary, {**summary, "checks": described, "failed": list(failed)})
        return folder.path


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return Writer(tmp_path)
