"""Tables of an evaluation, at most 80 columns wide: the paper's Table 2, every attack, sanity checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from carso_cli.cli.console import accuracy, duration, figure, output, table
from carso_cli.runs.paper import paper_row

_BOUNDS = {"at most": "<=", "below": "<", "at least": ">="}
_VERDICTS = {True: "passed", False: "FAILED", None: "–"}
Summary = Mapping[str, Any]


def show_evaluation(summary: Summary) -> None:
    """Print a summary: tables, headline, sanity checks and their consequences."""
    console = output()
    for part in evaluation_tables(summary):
        console.print(part)


def evaluation_tables(summary: Summary) -> list[Table | Text]:
    """Return what `show_evaluation` prints, in order."""
    parts: list[Table | Text] = [table_two(summary)]
    large = table_three(summary)
    if large is not None:
        parts.append(large)
    parts += [_attacks(rows) for target in ("classifier", "defence") if (rows := _rows(summary, target))]
    parts += [*_checks(summary), Text(headline_line(summary), style="bold")]
    # A number on another view never stands alone: the exact view hides no gradients.
    if exact := summary["exact"]:
        found = exact["accuracy"]
        text = exact["note"] if found is None else f"{accuracy(found, exact['ci95'])} ({exact['note']})"
        parts.append(Text(f"On the exact view: {text}"))
    if summary["failed"]:
        failed = ", ".join(summary["failed"])
        parts.append(Text(f"Do not trust this number before these are explained: {failed}.", "red"))
    parts.append(
        Text(f"{summary['n_images']} images, {duration(summary['seconds'])}, stored in {summary['run']}")
    )
    return parts


def headline_line(summary: Summary) -> str:
    """Return the number to quote in one sentence."""
    found = summary["headline"]
    number = accuracy(found["accuracy"], found["ci95"])
    return (
        f"Accuracy of the {found['target']} ({summary['label']}): {number}; "
        f"right in all draws {found['worst_of_draws']:.3f}, in most {found['majority']:.3f}"
    )


def table_two(summary: Summary) -> Table:
    """Return the paper's Table 2 with our figures, and the paper's beside them where it has any."""
    settings = summary["settings"]
    ours = {
        "AT/Cl": _find(summary, "classifier", "none"),
        "C/Cl": _find(summary, "defence", "none"),
        "AT/AA": _find(summary, "classifier", "aa"),
        "C/randAA": _find(summary, "defence", "rand-aa"),
        "PGD+EoT": _find(summary, "defence", "pgd-eot"),
        "worst case": summary["headline"]["accuracy"],
    }
    rows = [["measured", *map(accuracy, ours.values())]]
    paper = paper_row(settings.get("reproduces", ""), "2")
    if paper is not None:
        # The paper has no worst case, so that cell is a dash.
        rows.append(["paper", *(accuracy(paper.get(column)) for column in ours)])
    identity = settings["identity"]
    title = f"{summary['recipe']}: Table 2, eps {figure(identity['eps'])} under {identity['norm']}"
    caption = "AT: classifier alone; C: defence; Cl: clean; the worst case is over all attacks of the target"
    beyond = settings.get("beyond_the_paper")
    # A bare classifier has no samples; the remark is about a defence.
    if beyond and identity["n_samples"] is not None:
        caption += f". The defence is {beyond}"
    # Beside the paper's figures it must be said what is not the paper's.
    if differing := settings.get("differs"):
        caption += f". Differs from the paper's recipe: {'; '.join(differing)}"
    return table(("", *ours), rows, title=title, caption=caption, numeric=tuple(ours))


def table_three(summary: Summary) -> Table | None:
    """Return the paper's Table 3, accuracy at an eps that allows any image; None if it was not measured."""
    checks = {check["name"]: check for check in summary["checks"]}
    attacked, noise = checks.get("large-eps-attack"), checks.get("large-eps-noise")
    # A check that was not run is listed all the same, with None for its value.
    if attacked is None or attacked["value"] is None or noise is None:
        return None
    columns = ("attacked", "random noise")
    rows = [["measured", accuracy(attacked["value"]), accuracy(noise["value"])]]
    paper = paper_row(summary["settings"].get("reproduces", ""), "3")
    if paper is not None:
        rows.append(["paper", paper["eps 0.95"], "–"])
    return table(("", *columns), rows, title="Table 3: accuracy at eps 0.95", numeric=columns)


def _attacks(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of all attacks on one target."""
    rows = [
        [
            row["attack"],
            row["view"] or "–",
            accuracy(row["accuracy"], row["ci95"]),
            accuracy(row["worst_of_draws"]),
            accuracy(row["majority"]),
        ]
        for row in results
    ]
    first = results[0]
    title = "classifier alone"
    if first["target"] == "defence":
        title = f"defence: {first['aggregation']}, N = {first['n_samples']}, {first['draws']} draws per image"
    columns = ("attack", "view", "accuracy", "all", "most")
    caption = "all, most: share of images classified correctly in all draws, in most draws"
    return table(columns, rows, title=title, caption=caption, numeric=columns[2:])


def _checks(summary: Summary) -> list[Table | Text]:
    """Return the table of sanity checks, and a line for each reason for which some were not run."""
    rows: list[list[str]] = []
    not_run: dict[str, list[str]] = {}
    for check in summary["checks"]:
        name, value, verdict = check["name"], check["value"], check["passed"]
        if value is None and verdict is None:
            not_run.setdefault(check["meaning"], []).append(name)
            continue
        bound = f"{_BOUNDS[check['bound']]} {figure(check['threshold'])}" if check["bound"] else "–"
        rows.append([name, figure(value), bound, _VERDICTS[verdict], check["meaning"]])
    columns = ("check", "value", "bound", "verdict", "meaning")
    return [
        table(columns, rows, title="sanity checks", numeric=columns[1:4]),
        *(Text(f"{', '.join(names)}: {reason}") for reason, names in not_run.items()),
    ]


def _rows(summary: Summary, target: str) -> Sequence[Mapping[str, Any]]:
    return [row for row in summary["results"] if row["target"] == target]


def _find(summary: Summary, target: str, attack: str) -> float | None:
    # The authors' own version of an attack stands in the same column.
    names = (attack, f"authors-{attack}")
    found = [row["accuracy"] for row in _rows(summary, target) if row["attack"] in names]
    return float(found[0]) if found else None
