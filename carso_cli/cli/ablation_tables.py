"""Tables of an ablation, at most 80 columns wide: one row per variant, the paper's figures below ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from carso_cli.attacks.registry import is_upper_bound
from carso_cli.cli.console import accuracy, duration, figure, output, print_plain, show_table, table

Stored = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


def show_ablation(stored: Stored, wanted: Sequence[str] = ()) -> None:
    """Print an ablation's table and its remarks.

    Args:
        stored: The table, as `ablate` returns it.
        wanted: Labels of the rows to show; all when empty.
    """
    console = output()
    for part in ablation_parts(stored, wanted):
        console.print(part)


def ablation_parts(stored: Stored, wanted: Sequence[str] = ()) -> list[Table | Text]:
    """Return what `show_ablation` prints, in order."""
    # The stored table may hold rows of earlier calls, which this one was not asked for.
    rows = [row for row in stored["rows"] if not wanted or row["label"] in wanted]
    parts: list[Table | Text] = [_accuracies(stored, rows)]
    if any(row["classifier"] for row in rows):
        parts.append(_baselines(stored, rows))
    if any(row["transferred"] for row in rows):
        parts.append(_transfers(stored, rows))
    parts += [Text(line, style) for line, style in _remarks(stored, rows)]
    return parts


def _accuracies(stored: Stored, rows: Rows) -> Table:
    lines = []
    for row in rows:
        mark = "†" if row["unreliable_gradients"] else ""
        # At eps 0 nothing was attacked: no gradients were seen, so there is no verdict.
        verdict = _verdict(stored, row) if row["gradients"] else "–"
        lines.append(
            [row["label"], _with_interval(row["clean"]), _with_interval(row["attacked"]) + mark, verdict]
        )
        if row["paper"]:
            lines.append(["  paper", _paper(row["paper"]["clean"]), _paper(row["paper"]["attacked"]), ""])
    # A row at eps 0 is the unattacked end of the series and no size of its own.
    sizes = sorted({row["eps"] for row in rows if row["eps"] > 0})
    eps = figure(sizes[0]) if len(sizes) == 1 else "as given"
    settings = stored["settings"]
    caption = (
        f"{stored['recipe']}, attack {stored['attack']} on the {settings['view']} view, eps {eps} under "
        f"{settings['norm']}, {settings['n_images']} images, {settings['draws']} draws; [95% interval]"
    )
    columns = (stored["varies"], "clean", "attacked", "verdict")
    return table(columns, lines, title=stored["title"], caption=caption, numeric=columns[1:])


def _baselines(stored: Stored, rows: Rows) -> Table:
    lines = [
        [
            row["label"],
            accuracy(row["attacked"]["accuracy"]),
            accuracy(row["noise"] and row["noise"]["accuracy"]),
            accuracy(row["classifier"] and row["classifier"]["attacked"]),
        ]
        for row in rows
    ]
    columns = (stored["varies"], "defence attacked", "defence, noise", "classifier attacked")
    return table(columns, lines, title="beside the baselines", numeric=columns[1:])


def _transfers(stored: Stored, rows: Rows) -> Table:
    lines = []
    for row in rows:
        # The worst share counts: NaN, zero or saturated, each alone stops an attack.
        unusable = max((value for value in row["gradients"].values() if value is not None), default=None)
        cells = [_with_interval(row[name]) for name in ("transferred", "worst")]
        mark = " †" if row["unreliable_gradients"] else ""
        lines.append([row["label"], *cells, figure(unusable) + mark])
    columns = (stored["varies"], "transferred", "worst of both", "unusable")
    caption = (
        "transferred: examples made against the logsumexp view of the doubly-exponential rule, scored under "
        "each rule; unusable: largest share of the rule's own gradients that are NaN, zero or saturated"
    )
    title = "the same rules under transferred examples"
    return table(columns, lines, title=title, caption=caption, numeric=columns[1:])


def _remarks(stored: Stored, rows: Rows) -> list[tuple[str, str]]:
    """Return sentences to print below the tables, each with its style."""
    lines = [
        (f"{row['label']}: {_reason(row)}", "red")
        for row in rows
        if row["gradients"] and not _is_trusted(row)
    ]
    if any(row["unreliable_gradients"] for row in rows):
        lines.append(("† The attack had no usable gradients: this accuracy is not robustness.", "red"))
    if any(row["paper"] for row in rows):
        lines.append(("The paper's randAA attacked the released view, whose float32 gradients saturate.", ""))
    if spread := stored.get("spread"):
        lines.append((_over_trainings(spread), ""))
    if stored["note"]:
        lines.append((stored["note"], ""))
    # Variants may share a purifier, whose training time counts once.
    trained = {row["run"]: row["training"]["seconds"] for row in rows if row["training"]}
    times = duration(sum(trained.values())), duration(sum(row["seconds"] for row in rows))
    lines.append((f"purifiers: {len(trained)}, trained in {times[0]}; evaluated in {times[1]}", ""))
    return lines


def _over_trainings(spread: Mapping[str, Any]) -> str:
    def part(name: str) -> str:
        mean, deviation = spread[name]["mean"], spread[name]["deviation"]
        return f"{name} {mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")

    figures = ", ".join(part(name) for name in ("clean", "attacked"))
    return f"over {spread['trainings']} trainings, mean ± standard deviation: {figures}"


def _is_trusted(row: Mapping[str, Any]) -> bool:
    # Upper bounds and rows of earlier versions have no verdict: there the failed checks decide.
    trusted = row.get("trusted")
    return not row["failed"] if trusted is None else bool(trusted)


def _verdict(stored: Stored, row: Mapping[str, Any]) -> str:
    if not _is_trusted(row):
        return "NOT trusted"
    return "upper bound" if is_upper_bound(stored["attack"]) else "trusted"


def _reason(row: Mapping[str, Any]) -> str:
    failed = f"sanity checks failed: {', '.join(row['failed'])}"
    return f"{row['verdict']} ({failed})" if row.get("verdict") else failed


def _with_interval(figures: Mapping[str, Any] | None) -> str:
    return "–" if figures is None else accuracy(figures["accuracy"], figures["ci95"])


def _paper(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.4f}"


def show_plan(plans: Rows, note: str) -> None:
    """Print what ablations would train and evaluate, and the predicted time."""
    for plan in plans:
        rows = [
            [step["step"], step["what"], step["state"], duration(step["seconds"])] for step in plan["steps"]
        ]
        rows.append(["in all, about", "", "", duration(plan["seconds"])])
        columns = ("step", "what", "state", "time")
        show_table(columns, rows, title=f"{plan['title']}: predicted on this device", numeric=("time",))
        for sentence in plan["missing"]:
            output().print(Text(f"missing: {sentence}", "red"))
    if note:
        print_plain(note)
