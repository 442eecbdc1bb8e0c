"""The runs in a folder, each with what it measured: what `carso runs ls` shows.

Everything is read from summaries; `carso_cli.reports.load` computes the figures again from the records.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from carso_cli.attacks.registry import is_upper_bound
from carso_cli.errors import CarsoError
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.summary import describe_upper_bound

CLASSIFIER_WEIGHTS = "classifier.safetensors"
_PROTOCOLS = ("adaptive", "published", "authors", "quick")
# Both say nothing of robustness.
_BASELINES = ("none", "noise")


def list_runs(root: Path) -> list[dict[str, Any]]:
    """Return the runs in a folder, the newest last.

    Args:
        root: Folder of run folders, usually `runs`.

    Returns:
        One mapping per run: `run` (its path), `recipe` (a name), `when` (ISO time of its newest file, UTC),
        `attack`, `n_images`, `clean` and `robust` (`accuracy` and `ci95`; None where not measured), and
        `verdict`, what to think of the numbers or what is missing. Where there are several evaluations, the
        figures are those of the strongest protocol, of equals the newest.
    """
    found = [_describe(path) for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    return sorted(filter(None, found), key=lambda run: (run["when"], run["run"]))


def _describe(path: Path) -> dict[str, Any] | None:
    """Return what a folder holds; None if it is no run."""
    folder = RunFolder(path)
    marks = (folder.recipe, folder.purifier, folder.state, path / CLASSIFIER_WEIGHTS, path / "summary.json")
    files = [*(mark for mark in marks if mark.is_file()), *path.glob("evaluation/*/settings.json")]
    if not files:
        return None
    files += path.glob("evaluation/*/summary.json")
    newest = datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC)
    nothing = dict.fromkeys(("attack", "n_images", "clean", "robust"))
    run = {"run": str(path), "recipe": "", "when": newest.isoformat(timespec="seconds"), **nothing}
    try:
        return run | _content(folder)
    except (CarsoError, KeyError, TypeError) as error:
        # One damaged run must not hide the others.
        return run | {"verdict": f"damaged: {error}"}


def _content(folder: RunFolder) -> dict[str, Any]:
    """Return recipe, figures and verdict of a run."""
    path = folder.path
    if (path / "summary.json").is_file():
        audit = read_json(path / "summary.json")
        figures = {name: audit[name] for name in ("n_images", "clean", "robust", "verdict")}
        return {"recipe": audit["name"], "attack": f"audit, {audit['budget']}", **figures}
    recipe = load_recipe(str(folder.recipe.resolve())).name if folder.recipe.is_file() else ""
    summaries = [(file.stat().st_mtime, read_json(file)) for file in path.glob("evaluation/*/summary.json")]
    if summaries:
        _, summary = max(summaries, key=lambda pair: (_strength(pair[1]), pair[0]))
        return {"recipe": recipe or summary["recipe"], **_measured(summary)}
    if (path / CLASSIFIER_WEIGHTS).is_file():
        last = (read_json_lines(path / "metrics.jsonl", repair=False) or [{}])[-1]
        accuracies = {
            name: None if (value := last.get(key)) is None else {"accuracy": value, "ci95": None}
            for name, key in (("clean", "clean_accuracy"), ("robust", "pgd_accuracy"))
        }
        return {"recipe": recipe, "attack": "pgd", **accuracies, "verdict": "classifier, held-out images"}
    return {"recipe": recipe, "verdict": "not evaluated" if folder.purifier.is_file() else "not finished"}


def _strength(summary: Mapping[str, Any]) -> int:
    """Order evaluations: protocols above single attacks, which stand above random noise."""
    attack = summary["attack"]
    if attack in _PROTOCOLS:
        return len(_PROTOCOLS) - _PROTOCOLS.index(attack)
    return -1 if attack in _BASELINES else 0


def _measured(summary: Mapping[str, Any]) -> dict[str, Any]:
    headline, failed = summary["headline"], list(summary["failed"])
    target, attack = headline["target"], summary["attack"]
    clean = [row for row in summary["results"] if (row["target"], row["attack"]) == (target, "none")]
    verdict = f"not trusted: {', '.join(failed)}" if failed else "checks passed"
    if is_upper_bound(attack) and not failed:
        verdict = describe_upper_bound(summary["checks"])
    return {
        "attack": attack,
        "n_images": summary["n_images"],
        "clean": _figures(clean[0]) if clean else None,
        "robust": None if attack in _BASELINES else _figures(headline),
        "verdict": f"{verdict}, classifier alone" if target == "classifier" else verdict,
    }


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"accuracy": row["accuracy"], "ci95": list(row["ci95"])}
