"""What `carso evaluate` shows, at most 80 columns wide: number and verdict, what broke it, the checks.

`--table` adds the paper's Tables 2 and 3 with our figures and every attack; `-v` shows every check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from carso_cli.attacks.registry import is_upper_bound
from carso_cli.cli.console import accuracy, duration, figure, output, table
from carso_cli.runs.paper import paper_row
from carso_cli.runs.summary import describe_upper_bound

_BOUNDS = {"at most": "<=", "below": "<", "at least": ">="}
_VERDICTS = {True: "passed", False: "FAILED", None: "–"}
Summary = Mapping[str, Any]


def show_evaluation(summary: Summary, *, tables: bool = False, verbose: bool = False) -> None:
    """Print a summary: number and verdict, what broke it, checks; see `evaluation_tables`."""
    console = output()
    for part in evaluation_tables(summary, tables=tables, verbose=verbose):
        # The first line is for programs too: it is never broken into two.
        console.print(part, soft_wrap=isinstance(part, Text))


def evaluation_tables(summary: Summary, *, tables: bool = False, verbose: bool = False) -> list[Table | Text]:
    """Return what `show_evaluation` prints, in order; the first line is the number and its verdict.

    Args:
        summary: As `carso_cli.evaluation.run.evaluate` returns it.
        tables: Show the paper's tables and every attack too.
        verbose: Show every check, and the precision of the gradients.
    """
    trusted, verdict = verdict_of(summary)
    parts: list[Table | Text] = [
        Text(headline_line(summary, verdict), "bold red" if trusted is False else "bold")
    ]
    # A number on another view never stands alone: the exact view hides no gradients.
    if exact := summary["exact"]:
        value = exact["accuracy"]
        text = exact["note"] if value is None else f"{accuracy(value, exact['ci95'])} ({exact['note']})"
        parts.append(Text(f"On the exact view: {text}"))
    parts += [Text(line) for line in (*_about(summary), *(_gradients(summary) if verbose else ()))]
    if broken := summary.get("broken_by"):
        rows = [[row["attack"], row["view"] or "–", str(row["images"])] for row in broken]
        columns = ("attack", "view", "broke first")
        parts += [Text(), table(columns, rows, numeric=columns[2:])]
    if tables:
        parts += [Text(), table_two(summary)]
        large = table_three(summary)
        parts += [] if large is None else [large]
        parts += [_attacks(each) for target in ("classifier", "defence") if (each := _rows(summary, target))]
    return [*parts, Text(), *_checks(summary, verbose=verbose)]


def verdict_of(summary: Summary) -> tuple[bool | None, str]:
    """Return whether a number is trusted (None of an upper bound), and the verdict in words.

    Evaluations of earlier versions store no sentence, or call an upper bound trusted.
    """
    failed = ", ".join(summary["failed"])
    if is_upper_bound(summary["attack"]) and not failed:
        return None, describe_upper_bound(summary["checks"])
    verdict = summary.get("verdict", f"not trusted: these checks failed: {failed}" if failed else "trusted")
    return bool(summary.get("trusted", not failed)), str(verdict)


def headline_line(summary: Summary, verdict: str) -> str:
    """Return the number to quote, its interval, n and the verdict, in one line."""
    found = summary["headline"]
    # Robust is what the worst of all attacks leaves; that of a few is an upper bound.
    kind = {"none": "clean", "adaptive": "robust"}.get(summary["attack"], "attacked")
    number = accuracy(found["accuracy"], found["ci95"])
    return f"{kind} accuracy {number} on {summary['n_images']} images: {verdict}"


def _about(summary: Summary) -> list[str]:
    """Return what the number is of: target, attacks, threat; clean accuracy, the classifier's beside it."""
    found, identity = summary["headline"], summary["settings"]["identity"]
    lines = [
        f"{found['target']} of {summary['recipe']}: {summary['label']}; {identity['norm']}, eps "
        f"{figure(identity['eps'])}",
        f"clean {_interval(_row(summary, found['target'], 'none'))}; right in all draws "
        f"{found['worst_of_draws']:.3f}, in most {found['majority']:.3f}",
    ]
    beside = summary["classifier"]
    if beside and found["target"] == "defence":
        lines.append(
            f"classifier alone: clean {accuracy(beside['clean'], beside['clean_ci95'])}, "
            f"attacked {accuracy(beside['attacked'], beside['attacked_ci95'])}"
        )
    return [*lines, f"{duration(summary['seconds'])}, stored in {summary['run']}"]


def _gradients(summary: Summary) -> list[str]:
    """Return in what precision the defence's gradients were, where it was chosen."""
    found = summary["settings"].get("gradients")
    if found is None or found["cosine"] is None:
        return []
    agree = f"their cosine with those in the models' precision is {found['cosine']:.4f}"
    return [f"gradients of the defence in {found['precision']}; in bf16 {agree}"]


def _interval(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None else accuracy(row["accuracy"], row["ci95"])


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


def _checks(summary: Summary, *, verbose: bool) -> list[Table | Text]:
    """Return the checks that failed, all where `verbose`, and counts of the others."""
    groups: dict[bool | None, list[Mapping[str, Any]]] = {False: [], None: [], True: []}
    for check in summary["checks"]:
        groups[check["passed"]].append(check)
    shown = [check for group in groups.values() for check in group] if verbose else groups[False]
    parts: list[Table | Text] = []
    if shown:
        rows = [
            [
                check["name"],
                figure(check["value"]),
                _bound(check),
                _VERDICTS[check["passed"]],
                check["meaning"],
            ]
            for check in shown
        ]
        columns = ("check", "value", "bound", "verdict", "meaning")
        parts.append(table(columns, rows, numeric=columns[1:4]))
    # What was measured for comparison alone has a value and no verdict.
    not_run = [check["name"] for check in groups[None] if check["value"] is None]
    told = f"checks: {len(groups[False])} failed, {len(groups[True])} passed"
    if not_run:
        told += f", {len(not_run)} not run ({', '.join(not_run)})"
    return [*parts, Text(told if verbose else f"{told}; -v shows all")]


def _bound(check: Mapping[str, Any]) -> str:
    return f"{_BOUNDS[check['bound']]} {figure(check['threshold'])}" if check["bound"] else "–"


def _rows(summary: Summary, target: str) -> Sequence[Mapping[str, Any]]:
    return [row for row in summary["results"] if row["target"] == target]


def _row(summary: Summary, target: str, attack: str) -> Mapping[str, Any] | None:
    return next((row for row in _rows(summary, target) if row["attack"] == attack), None)


def _find(summary: Summary, target: str, attack: str) -> float | None:
    # The authors' own version of an attack stands in the same column.
    row = _row(summary, target, attack) or _row(summary, target, f"authors-{attack}")
    return None if row is None else float(row["accuracy"])
