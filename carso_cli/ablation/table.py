"""The stored form of an ablation: a table, `<root run>/ablations/<name>-<attack>.json`.

    {"schema": 1, "ablation": "first-second", "title": …, "varies": …, "tables": ["17"], "recipe": …,
     "reproduces": …, "attack": …, "label": …, "note": …, "settings": {…}, "rows": [row, …]}

Over training seeds it also holds `spread`: `trainings`, and `mean` and `deviation` of both accuracies.
Rows name their records. All rows of a table share its `settings`: images, seed, attack and budget. A row
holds `label`, `values` (what was chosen), `run` and `evaluation` (paths relative to the root run), the
accuracies as `{"accuracy", "ci95", …}` in [0, 1] under `clean`, `attacked`, `noise` and, for aggregations,
`transferred` and `worst`, the checks that failed, the verdict, what the attack's gradients were like, the
purifier's training, and the paper's figures. What is unknown or was not run is null.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carso_cli.ablation.variants import Ablation, Variant, row_order
from carso_cli.errors import StateError
from carso_cli.io.json_files import read_json, write_json
from carso_cli.recipe.identity import TRAINING_SECTIONS, recipe_hash
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import ABLATION_SCHEMA, RunFolder
from carso_cli.runs.paper import paper_row
from carso_cli.runtime.reporter import Reporter

GRADIENT_CHECKS = ("nan-gradients", "zero-gradients", "saturated-outputs")
"""Sanity checks whose failure says that an attack had no gradients to follow."""
_VARYING = (
    *("eps", "n_samples", "aggregation", "second_kind", "pgd_step_size", "pgd_eot_step_size"),
    "gradient_precision",
    *("recipe", "classifier", "purifier", "second_classifier"),
    *("classifier_answers", "second_classifier_answers", "defence_answers"),
)
"""Fields of an evaluation's identity that may differ between the rows of a table."""
_FIGURES = ("accuracy", "ci95", "worst_of_draws", "majority")


def make_row(variant: Variant, root: Path, evaluation: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Draw a row from the summary of its evaluation; paths are relative to `root`, the recipe's own run."""
    identity, headline = summary["settings"]["identity"], summary["headline"]
    unattacked = variant.eps == 0.0
    clean, noise = (find_figures(summary, "defence", attack) for attack in ("none", "noise"))
    classifier = summary["classifier"]
    if unattacked and classifier is not None:
        # At eps 0 the attacked accuracy is the clean one; that of the summary belongs to another eps.
        kept = {"attacked": classifier["clean"], "attacked_ci95": classifier["clean_ci95"]}
        classifier = {**classifier, **kept}
    # Values and not verdicts, as the table shows how much of the gradients was unusable.
    checks = {check["name"]: check["value"] for check in summary["checks"]}
    path = variant.run_folder(root)
    return {
        "label": variant.label,
        "values": dict(variant.values),
        # Relative, so that a folder of runs can be moved; variants lie beside the root, hence `..`.
        "run": os.path.relpath(path, root),
        "evaluation": os.path.relpath(evaluation, root),
        "eps": 0.0 if unattacked else identity["eps"],
        "norm": identity["norm"],
        "n_samples": identity["n_samples"],
        "aggregation": identity["aggregation"],
        "n_images": summary["n_images"],
        "clean": clean,
        "attacked": clean if unattacked else {key: headline[key] for key in _FIGURES},
        "noise": clean if unattacked else noise,
        "classifier": classifier,
        "transferred": None,
        "worst": None,
        "failed": [] if unattacked else list(summary["failed"]),
        # None where nothing was attacked, of an upper bound, and of a version that gave no verdict.
        "trusted": None if unattacked else summary.get("trusted"),
        "verdict": None if unattacked else summary.get("verdict"),
        "gradients": {} if unattacked else {name: checks.get(name) for name in GRADIENT_CHECKS},
        "unreliable_gradients": not unattacked and bool(set(GRADIENT_CHECKS) & set(summary["failed"])),
        "training": _training(variant, path),
        "paper": _paper(variant),
        "seconds": 0.0 if unattacked else summary["seconds"],
    }


def find_figures(summary: Mapping[str, Any], target: str, attack: str) -> dict[str, Any] | None:
    """Return the accuracies of one job of an evaluation, None if it was not run."""
    for row in summary["results"]:
        if (row["target"], row["attack"]) == (target, attack):
            return {key: row[key] for key in _FIGURES}
    return None


def _training(variant: Variant, path: Path) -> dict[str, Any] | None:
    lines = RunFolder(path).read_metrics(variant.recipe.training.epochs)
    if not lines:
        return None
    return {
        "seconds": sum(line["seconds"] for line in lines),
        "epochs": len(lines),
        "images": lines[-1]["images"],
    }


def _paper(variant: Variant) -> dict[str, Any] | None:
    if variant.paper is None:
        return None
    table, entry = variant.paper
    found = (paper_row(variant.recipe.reproduces, table) or {}).get(entry)
    if found is None:
        return None
    # Table 17 calls its columns otherwise than Tables 4 and 5.
    names = ("Clean", "randAA") if table == "17" else ("C/Cl", "C/randAA")
    return {"table": table, "clean": found[names[0]], "attacked": found[names[1]]}


def table_file(root: Path, name: str, attack: str) -> Path:
    """Return the file of an ablation's table: one for each attack or protocol, to stand side by side."""
    return RunFolder(root).ablations / f"{name}-{attack}.json"


def store_table(
    root: Path,
    recipe: Recipe,
    ablation: Ablation,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    note: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Write an ablation's table and return it.

    Rows that are stored already stay where they share the table's settings and their records are still
    there, so that a table may be filled row by row; otherwise the table starts again.
    What all rows share is taken from `summary`, that of one of their evaluations.
    """
    path = table_file(root, ablation.name, summary["attack"])
    identity = summary["settings"]["identity"]
    # Steps of PGD are scaled with eps, so they vary with it; the number of steps may not.
    shared = {key: value for key, value in identity.items() if key not in _VARYING}
    if "eot_draws_by" in shared:
        # Measured for each variant: how many samples a gradient needs depends on what is varied.
        del shared["eot_draws"]
    # The root recipe's training: each variant's own differs by what the ablation varies.
    settings = {**shared, "training": recipe_hash(recipe, TRAINING_SECTIONS)}
    labels = {row["label"] for row in rows}
    # Fresh rows replace stored ones of the same label.
    kept = [row for row in _stored_rows(path, root, settings, reporter) if row["label"] not in labels]
    table = {
        "schema": ABLATION_SCHEMA,
        "ablation": ablation.name,
        "title": ablation.title,
        "varies": ablation.varies,
        "tables": list(ablation.tables),
        "recipe": recipe.name,
        "reproduces": recipe.reproduces,
        "attack": summary["attack"],
        "label": summary["label"],
        "note": note,
        "settings": settings,
        "rows": sorted([*rows, *kept], key=row_order),
    }
    if ablation.by_training_alone:
        table["spread"] = _spread(table["rows"])
    write_json(path, table)
    return table


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and sample standard deviation of the rows' accuracies; no deviation of a single row."""
    spread: dict[str, Any] = {"trainings": len(rows)}
    for name in ("clean", "attacked"):
        found = [row[name]["accuracy"] for row in rows]
        deviation = statistics.stdev(found) if len(found) > 1 else None
        spread[name] = {"mean": statistics.mean(found), "deviation": deviation}
    return spread


def _stored_rows(
    path: Path, root: Path, settings: Mapping[str, Any], reporter: Reporter
) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        stored = read_json(path)
    except StateError as error:
        # A table can be made again from its evaluations, so a damaged one is no reason to stop.
        reporter.warning(f"{error.message}; it is written again")
        return []
    if (stored.get("schema"), stored.get("settings")) != (ABLATION_SCHEMA, settings):
        reporter.info(f"{path} held rows of other settings; their evaluations stay, the table starts again")
        return []
    return [row for row in stored["rows"] if (root / row["evaluation"] / "summary.json").is_file()]
