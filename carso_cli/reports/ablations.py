"""The paper's tables of variations, filled from stored records: 4, 5 and 17; and further ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carso_cli.reports.ablated import StoredAblation
from carso_cli.reports.evaluations import StoredEvaluation
from carso_cli.reports.results import measured_label, paper_scenarios, remarks, trace_of
from carso_cli.reports.stored import StoredRun
from carso_cli.reports.table import (
    MEASURED,
    PAPER,
    Figure,
    ReportTable,
    Row,
    measured_figure,
    paper_figure,
)

_MAJORITY = "majority-vote"
_KINDS = {"at": "AT", "clean": "clean"}
_FIRST_SECOND = "first-second"
_IN_TABLES = (_FIRST_SECOND, "aggregations")
_TRANSFERRED = (
    "Transferred: examples made against a rule that has gradients, or stand-ins with such; C worst: over "
    "these and all attacks of the evaluation."
)


def table_four(runs: Sequence[StoredRun]) -> ReportTable:
    """Aggregation rules that have gradients."""
    rows = []
    for run in runs:
        for one in _of_aggregations(run):
            rule = one.identity["aggregation"]
            if rule != _MAJORITY:
                cells = (run.data, measured_label(run, one), rule, *_figures_of_rule(run, one))
                rows.append(Row(MEASURED, cells, trace_of(run, one)))
    for dataset, rules in paper_scenarios(runs, "4"):
        for rule, paper in rules.items():
            values = (paper_figure(paper["C/Cl"]), paper_figure(paper["C/randAA"]))
            rows.append(Row(PAPER, (dataset, PAPER, rule, *values, None, None)))
    return ReportTable(
        "4",
        "Aggregation rules compared",
        ("data", "figures", "aggregation", "C/Cl", "C/randAA", "transferred", "C worst"),
        tuple(rows),
        (_TRANSFERRED, *remarks(runs, rows)),
    )


def table_five(runs: Sequence[StoredRun]) -> ReportTable:
    """Majority vote, whose own gradients say nothing: transferred examples give the number that counts."""
    rows = []
    for run in runs:
        for one in _of_aggregations(run):
            if one.identity["aggregation"] == _MAJORITY:
                cells = (run.data, measured_label(run, one), *_figures_of_rule(run, one), _unusable(one))
                rows.append(Row(MEASURED, cells, trace_of(run, one)))
    for dataset, rules in paper_scenarios(runs, "5"):
        paper = rules[_MAJORITY]
        values = (paper_figure(paper["C/Cl"]), paper_figure(paper["C/randAA"]))
        unusable = Figure(None, text="> 0.99")
        rows.append(Row(PAPER, (dataset, PAPER, *values, None, None, unusable)))
    return ReportTable(
        "5",
        "Majority vote",
        ("data", "figures", "C/Cl", "C/randAA", "transferred", "C worst", "gradients unusable"),
        tuple(rows),
        (
            "A vote has no useful gradient: accuracy under gradients of its own is no robustness.",
            _TRANSFERRED,
            *remarks(runs, rows),
        ),
    )


def table_seventeen(runs: Sequence[StoredRun]) -> ReportTable:
    """Which of the two classifier instances is trained adversarially (Appendix D)."""
    rows = []
    for run in runs:
        for kind, one in _kinds(run):
            cells = (
                measured_figure(one.find("defence", "none")),
                measured_figure(one.find("defence", "rand-aa")),
                measured_figure(one.worst["defence"]),
            )
            rows.append(Row(MEASURED, (run.data, measured_label(run, one), kind, *cells), trace_of(run, one)))
    for dataset, kinds in paper_scenarios(runs, "17"):
        for kind, paper in kinds.items():
            values = (paper_figure(paper["Clean"]), paper_figure(paper["randAA"]))
            rows.append(Row(PAPER, (dataset, PAPER, kind, *values, None)))
    return ReportTable(
        "17",
        "Training of the first and of the second classifier instance",
        ("data", "figures", "first/second", "clean", "randAA", "worst"),
        tuple(rows),
        ("AT/AT is the paper's own architecture.", *remarks(runs, rows)),
    )


def _kinds(run: StoredRun) -> list[tuple[str, StoredEvaluation]]:
    """Return evaluations by training of first and second instance: the ablation's, then the run's own."""
    found = [(row.label, row.evaluation) for one in run.ablations_of(_FIRST_SECOND) for row in one.rows]
    listed = {one.path.resolve() for _, one in found}
    first, second = run.recipe["representation"]["kind"], run.recipe["evaluation"]["second_kind"]
    own = [one for one in run.plain_evaluations if one.path.resolve() not in listed]
    found += [(f"{_KINDS[first]}/{_KINDS[second]}", one) for one in own]
    return [(kind, one) for kind, one in found if "defence" in one.worst]


def further_ablations(runs: Sequence[StoredRun]) -> list[ReportTable]:
    """Return a table for each stored ablation that fills none of the paper's."""
    return [
        ablation_table(run, ablation)
        for run in runs
        for ablation in run.ablations
        if ablation.name not in _IN_TABLES
    ]


def ablation_table(run: StoredRun, ablation: StoredAblation) -> ReportTable:
    """Return clean, attacked and noisy accuracy by what was varied."""
    rows = [
        Row(
            MEASURED,
            (
                run.data,
                measured_label(run, row.evaluation),
                row.label,
                measured_figure(row.clean),
                measured_figure(row.attacked),
                measured_figure(row.noise),
            ),
            trace_of(run, row.evaluation),
        )
        for row in ablation.rows
    ]
    columns = ("data", "figures", ablation.varies, "clean", "attacked", "random noise")
    title = f"{ablation.title}, {ablation.attack}"
    return ReportTable("", title, columns, tuple(rows), tuple(filter(None, (ablation.note,))))


def _figures_of_rule(run: StoredRun, one: StoredEvaluation) -> tuple[Figure | None, ...]:
    """Return C/Cl, C/randAA, transferred and C worst."""
    found = one.find("defence", "none"), one.find("defence", "rand-aa"), *_transferred(run, one)
    return tuple(measured_figure(row) for row in found)


def _transferred(run: StoredRun, one: StoredEvaluation) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """Return accuracy under transferred examples, and the worst case over them and everything else.

    They come from the ablation, or else from the evaluation's own attacks on stand-ins.
    """
    for row in (row for ablation in run.ablations_of("aggregations") for row in ablation.rows):
        if row.evaluation.path.resolve() == one.path.resolve() and row.worst is not None:
            return row.transferred, row.worst
    return one.worst_of("defence", "transfer-"), one.worst["defence"]


def _of_aggregations(run: StoredRun) -> list[StoredEvaluation]:
    """Return attacked evaluations of the defence that differ from the recipe in their aggregation at most."""
    return [
        one for one in run.evaluations if "defence" in one.worst and run.departures(one) <= {"aggregation"}
    ]


def _unusable(one: StoredEvaluation) -> Figure | None:
    shares = [
        row["gradients"]["unusable"]
        for row in one.health
        if row["target"] == "defence"
        and row["gradients"]["unusable"] is not None
        and row["view"] != "surrogate"
    ]
    return Figure(max(shares)) if shares else None
