"""The paper's Tables 4 and 5: aggregation rules side by side (Appendix B)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from carso_cli.reports.rows import accuracy, filled, measured, paper_entries, quoted
from carso_cli.reports.stored import StoredEvaluation, StoredRun
from carso_cli.reports.table import Cell, Figure, ReportTable, Row, Trace, measured_figure
from carso_cli.runs.summary import headline

_RULES = {"logit-mean": " (L.A.)", "probability-mean": " (P.A.)", "doubly-exponential": ""}
_MAJORITY = {"majority-vote": " (M.V.)"}
_TRANSFERRED = (
    "Transferred: examples made against a rule that has gradients, or surrogates with such; C worst: over "
    "these and all attacks of the evaluation."
)


def table_four(runs: Sequence[StoredRun]) -> ReportTable:
    """Aggregation rules that have gradients (Appendix B), side by side."""
    title = "Aggregation rules compared"
    note = "L.A.: logits averaged; P.A.: probabilities averaged; neither: the doubly-exponential rule."
    return _aggregation_table("4", title, runs, _RULES, (), note, _TRANSFERRED)


def table_five(runs: Sequence[StoredRun]) -> ReportTable:
    """Majority vote: it has no useful gradient, so the transferred examples give the number that counts."""
    note = "A vote has no useful gradient: accuracy under attacks by its own gradients is no robustness."
    further = ("gradients unusable",)
    return _aggregation_table("5", "Majority vote", runs, _MAJORITY, further, note, _TRANSFERRED)


def _aggregation_table(
    number: str,
    title: str,
    runs: Sequence[StoredRun],
    rules: Mapping[str, str],
    further: tuple[str, ...],
    *notes: str,
) -> ReportTable:
    """Return the table of some rules, each with its columns: the paper's two, then ours of all rules."""
    names = (("C/Cl", "C/randAA"), ("transferred", "C worst"))
    accuracies = tuple(f"{name}{mark}" for part in names for mark in rules.values() for name in part)
    columns = ("Scen.", "Dataset", *accuracies, *further, "figures")
    rows = []
    for run, found in _by_rule(runs, rules):
        # Also those of rules that were not evaluated: they must stay empty.
        cells: dict[str, Cell] = dict.fromkeys(columns[2:-1])
        for rule, one in found.items():
            known = {name: accuracy(one, name) for name in names[0]} | _transferred(run, one)
            cells |= {f"{name}{rules[rule]}": cell for name, cell in known.items()}
            cells["gradients unusable"] = _unusable(one)
        parts = [measured(columns, run, one, cells, varied=("aggregation",)) for one in found.values()]
        rows.append(_joined(parts, columns.index("figures")))
    for scenario, data, paper in paper_entries(runs, number):
        values: dict[str, Any] = {"Scen.": scenario, "Dataset": data, "gradients unusable": "> 0.99"}
        for rule, found_there in paper.items():
            values |= {f"{name}{rules[rule]}": value for name, value in found_there.items()}
        rows.append(quoted(columns, values))
    return filled(number, title, columns, runs, rows, *notes)


def _joined(parts: Sequence[Row], label: int) -> Row:
    """Return rows of equal cells as one, with the marks and the records of all."""
    first, traces = parts[0], [part.trace for part in parts if part.trace is not None]
    # The longest label bears the marks of checks that failed for one of the rules.
    marked = max((str(part.cells[label]) for part in parts), key=len)
    cells = (*first.cells[:label], marked, *first.cells[label + 1 :])
    if len(traces) == 1:
        return Row(first.source, cells, traces[0])
    facts = {
        **traces[0].facts,
        "aggregation": " | ".join(str(trace.facts["aggregation"]) for trace in traces),
    }
    warnings = dict.fromkeys(
        warning if len(parts) == 1 else f"{warning} ({trace.facts['aggregation']})"
        for trace in traces
        for warning in trace.warnings
    )
    return Row(first.source, cells, Trace(" | ".join(one.record for one in traces), facts, tuple(warnings)))


def _by_rule(
    runs: Sequence[StoredRun], rules: Mapping[str, str]
) -> Iterator[tuple[StoredRun, dict[str, StoredEvaluation]]]:
    """Yield attacked evaluations of the defence that differ in their aggregation alone, by rule."""
    for run in runs:
        groups: dict[str, dict[str, StoredEvaluation]] = {}
        for one in run.evaluations:
            rule = str(one.identity["aggregation"])
            if "defence" in one.worst and rule in rules and run.departures(one) <= {"aggregation"}:
                known = {name: value for name, value in one.identity.items() if name != "aggregation"}
                # Which targets else were attacked changes nothing for the defence.
                known.pop("targets")
                groups.setdefault(json.dumps(known, sort_keys=True), {}).setdefault(rule, one)
        for group in groups.values():
            yield run, {rule: group[rule] for rule in rules if rule in group}


def _transferred(run: StoredRun, one: StoredEvaluation) -> dict[str, Cell]:
    """Return accuracy under transferred examples, and the worst case over them and everything else.

    They come from the ablation, or else from the evaluation's own attacks on surrogates.
    """
    records = [record for record in one.records_on("defence") if record.attack.startswith("transfer-")]
    accuracy = headline(records, "transfer-") if records else None
    worst = one.worst["defence"]
    for row in (row for ablation in run.ablations_of("aggregations") for row in ablation.rows):
        # Resolved, since an ablation names its evaluations by relative paths.
        if row.worst is not None and row.evaluation.path.resolve() == one.path.resolve():
            return {"transferred": measured_figure(row.transferred), "C worst": measured_figure(row.worst)}
    return {"transferred": measured_figure(accuracy), "C worst": measured_figure(worst)}


def _unusable(one: StoredEvaluation) -> Figure | None:
    """Return the largest share of unusable gradients over the attacks on the defence itself."""
    shares = [
        row["gradients"]["unusable"]
        for row in one.summary["results"]
        # An attack on a surrogate uses the gradients of another rule, and some attacks use none.
        if row["target"] == "defence" and row["view"] != "surrogate" and row["gradients"]["gradients"]
    ]
    return Figure(max(known)) if (known := [share for share in shares if share is not None]) else None
