"""Tables of an evaluation, at most 80 columns wide: the paper's Table 2, every attack, trust checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from carso_cli.cli.display import accuracy, duration, figure, output, table
from carso_cli.runs.paper import paper_row

_BOUNDS = {"at most": "<=", "at least": ">="}
_VERDICTS = {True: "passed", False: "FAILED", None: "–"}


def show_evaluation(summary: Mapping[str, Any]) -> None:
    """Print a summary: tables, headline, checks, and what must be said beside them."""
    console = output()
    for part in evaluation_tables(summary):
        console.print(part)


def evaluation_tables(summary: Mapping[str, Any]) -> list[Table | Text]:
    """Return what `show_evaluation` prints, in order."""
    parts: list[Table | Text] = [table_two(summary)]
    large = table_three(summary)
    if large is not None:
        parts.append(large)
    parts += [_attacks(summary, target) for target in ("classifier", "defence") if _rows(summary, target)]
    parts += [_checks(summary), *_not_run(summary)]
    parts.append(Text(headline_line(summary), style="bold"))
    if summary["exact"] is not None:
        parts.append(Text(f"On the exact view: {_exact_line(summary['exact'])}"))
    if summary["failed"]:
        parts.append(
            Text(
                f"Do not trust this number before these are explained: {', '.join(summary['failed'])}.", "red"
            )
        )
    parts.append(
        Text(f"{summary['n_images']} images, {duration(summary['seconds'])}, stored in {summary['run']}")
    )
    return parts


def headline_line(summary: Mapping[str, Any]) -> str:
    """Return the number to quote in one sentence."""
    found = summary["headline"]
    return (
        f"Accuracy of the {found['target']} ({summary['label']}): "
        f"{accuracy(found['accuracy'], tuple(found['ci95']))}; "
        f"right in all draws {found['worst_of_draws']:.3f}, in most {found['majority']:.3f}"
    )


def _exact_line(exact: Mapping[str, Any]) -> str:
    if exact["accuracy"] is None:
        return str(exact["note"])
    return f"{accuracy(exact['accuracy'], tuple(exact['ci95']))} ({exact['note']})"


def table_two(summary: Mapping[str, Any]) -> Table:
    """Return the paper's Table 2 with our figures, and the paper's beside them where it has any."""
    settings = summary["settings"]
    columns = ("AT/Cl", "C/Cl", "AT/AA", "C/randAA", "PGD+EoT", "worst case")
    ours = {
        "AT/Cl": _find(summary, "classifier", "none"),
        "C/Cl": _find(summary, "defence", "none"),
        "AT/AA": _find(summary, "classifier", "aa"),
        "C/randAA": _find(summary, "defence", "rand-aa"),
        "PGD+EoT": _find(summary, "defence", "pgd-eot"),
        "worst case": summary["headline"]["accuracy"],
    }
    rows = [["measured", *(accuracy(ours[column]) for column in columns)]]
    paper = paper_row(settings.get("reproduces", ""), "2")
    if paper is not None:
        rows.append(["paper", *(accuracy(paper.get(column)) for column in columns)])
    identity = settings["identity"]
    title = f"{summary['recipe']}: Table 2, eps {figure(identity['eps'])} under {identity['norm']}"
    caption = "AT: classifier alone; C: defence; Cl: clean; the worst case is over all attacks of the target"
    beyond = settings.get("beyond_the_paper")
    if beyond and identity["n_samples"] is not None:
        caption += f". The defence is {beyond}"
    return table(("", *columns), rows, title=title, caption=caption, numeric=columns)


def table_three(summary: Mapping[str, Any]) -> Table | None:
    """Return the paper's Table 3, accuracy where eps is so large that nothing can stand; None if not run."""
    checks = {check["name"]: check for check in summary["checks"]}
    attacked, noise = checks.get("large-eps-attack"), checks.get("large-eps-noise")
    if attacked is None or attacked["value"] is None or noise is None:
        return None
    columns = ("attacked", "random noise")
    rows = [["measured", accuracy(attacked["value"]), accuracy(noise["value"])]]
    paper = paper_row(summary["settings"].get("reproduces", ""), "3")
    if paper is not None:
        rows.append(["paper", paper["eps 0.95"], "–"])
    return table(("", *columns), rows, title="Table 3: accuracy at eps 0.95", numeric=columns)


def _attacks(summary: Mapping[str, Any], target: str) -> Table:
    rows = [
        [
            row["attack"],
            row["view"] or "–",
            accuracy(row["accuracy"], tuple(row["ci95"])),
            accuracy(row["worst_of_draws"]),
            accuracy(row["majority"]),
        ]
        for row in _rows(summary, target)
    ]
    columns = ("attack", "view", "accuracy", "all", "most")
    caption = "all, most: share of images that are right in all draws, in most draws"
    return table(columns, rows, title=_describe(summary, target), caption=caption, numeric=columns[2:])


def _describe(summary: Mapping[str, Any], target: str) -> str:
    first = _rows(summary, target)[0]
    if target == "classifier":
        return "classifier alone"
    return f"defence: {first['aggregation']}, N = {first['n_samples']}, {first['draws']} draws an image"


def _checks(summary: Mapping[str, Any]) -> Table:
    rows = []
    for check in summary["checks"]:
        if check["value"] is None and check["passed"] is None:
            continue
        bound = f"{_BOUNDS[check['bound']]} {figure(check['threshold'])}" if check["bound"] else "–"
        rows.append(
            [check["name"], figure(check["value"]), bound, _VERDICTS[check["passed"]], check["meaning"]]
        )
    columns = ("check", "value", "bound", "verdict", "meaning")
    return table(columns, rows, title="trust checks", numeric=("value", "bound", "verdict"))


def _not_run(summary: Mapping[str, Any]) -> list[Text]:
    """Return a line per reason for which checks were not run."""
    by_reason: dict[str, list[str]] = {}
    for check in summary["checks"]:
        if check["value"] is None and check["passed"] is None:
            by_reason.setdefault(check["meaning"], []).append(check["name"])
    return [Text(f"{', '.join(names)}: {reason}") for reason, names in by_reason.items()]


def _rows(summary: Mapping[str, Any], target: str) -> Sequence[Mapping[str, Any]]:
    return [row for row in summary["results"] if row["target"] == target]


def _find(summary: Mapping[str, Any], target: str, attack: str) -> float | None:
    found = [row["accuracy"] for row in _rows(summary, target) if row["attack"] == attack]
    return float(found[0]) if found else None
