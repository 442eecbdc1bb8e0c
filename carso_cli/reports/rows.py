"""Rows of the paper's tables: one evaluation of one run, labelled with what it is, or the paper's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from carso_cli.attacks.registry import PROTOCOLS
from carso_cli.reports.stored import StoredEvaluation, StoredRun
from carso_cli.reports.table import (
    MEASURED,
    PAPER,
    Cell,
    Figure,
    ReportTable,
    Row,
    Trace,
    measured_figure,
    paper_figure,
)
from carso_cli.runs.paper import paper_figures
from carso_cli.runs.records import attacks_exact_view_of

OTHER_DATA = (
    "No run here reproduces a data set of the paper; its figures are of other data, not to be compared."
)
NOTHING = "Nothing is stored for this table yet."
FAILED, DIFFERS = "†", "‡"
UNION = "union"
UNION_NOTE = (
    "union: images that an earlier attack of the protocol broke count as broken and were not attacked again."
)
ACCURACIES = {
    "AT/Cl": ("classifier", "none"),
    "AT/AA": ("classifier", "aa"),
    "AT worst": ("classifier", "worst"),
    "C/Cl": ("defence", "none"),
    "C/randAA": ("defence", "rand-aa"),
    "PGD+EoT": ("defence", "pgd-eot"),
    "C worst": ("defence", "worst"),
    "Clean Acc.": ("defence", "none"),
    "randAA Acc.": ("defence", "rand-aa"),
    "Robust Acc.": ("defence", "worst"),
    "clean": ("defence", "none"),
    "attacked": ("defence", "worst"),
    "random noise": ("defence", "noise"),
}
"""Target and attack of each column that holds an accuracy, as `StoredEvaluation.find` takes them."""


def measured(
    columns: Sequence[str],
    run: StoredRun,
    one: StoredEvaluation,
    further: Mapping[str, Cell] | None = None,
    *,
    varied: Collection[str] = (),
) -> Row:
    """Return the row of one evaluation.

    Args:
        columns: Headings; one as `C/randAA (PGD+EoT)` holds two numbers.
        run: The run.
        one: The evaluation.
        further: Cells that are no accuracy, or that replace one.
        varied: Keys that the table varies itself, see `carso_cli.runs.paper.departures`.
    """
    cells: dict[str, Cell] = {name: accuracy(one, name) for name in columns}
    cells |= {"Scen.": run.scenario, "Dataset": run.data}
    cells["figures"] = measured_label(run, one, varied)
    # `further` comes last, so that it may replace an accuracy.
    cells |= further or {}
    return Row(MEASURED, tuple(map(cells.get, columns)), trace_of(run, one, varied))


def accuracy(one: StoredEvaluation, column: str) -> Figure | None:
    """Return what an evaluation found for a column of accuracies; None for another column."""
    first, _, second = column.removesuffix(")").partition(" (")
    main = _found(one, first)
    if first in ACCURACIES and (beside := _found(one, second)) is not None:
        return replace(main or Figure(None), beside=beside)
    return main


def _found(one: StoredEvaluation, name: str) -> Figure | None:
    if name not in ACCURACIES:
        return None
    target, attack = ACCURACIES[name]
    protocol = PROTOCOLS.get(one.identity["attack"])
    # By the authors' procedure nothing is selected: each attack has its own figure, the first is the result.
    if name == "C worst" and protocol is not None and protocol.headline is not None:
        return None
    found = measured_figure(one.find(target, attack) or one.find(target, f"authors-{attack}"))
    # The worst case is a union by its own name.
    if found is None or attack == "worst" or not one.is_union(target, attack):
        return found
    return replace(found, text=f"{found.main} {UNION}")


def quoted(columns: Sequence[str], values: Mapping[str, Any], source: str = PAPER) -> Row:
    """Return a row of numbers and texts that the paper gives; columns that it does not have stay empty."""
    known = {"figures": source, **values}
    return Row(source, tuple(_quoted(known.get(name)) for name in columns))


def _quoted(value: Cell | float) -> Cell:
    bound = isinstance(value, str) and value.startswith(("<", ">", "about"))
    return paper_figure(value) if bound or isinstance(value, float) else value  # type: ignore[arg-type]


def paired(first: float | None, second: float | None) -> Figure | None:
    """Return two numbers of the paper as one cell, the second in round brackets."""
    figure, beside = paper_figure(first), paper_figure(second)
    return figure if figure is None or beside is None else replace(figure, beside=beside)


def measured_label(run: StoredRun, one: StoredEvaluation, varied: Collection[str] = ()) -> str:
    """Say that a row is measured and by which protocol, with marks where checks failed or recipes differ.

    If the defence was attacked, in what it is beyond the paper is named too.
    """
    attack = str(one.identity["attack"])
    name = {"published": "as published", "authors": "the authors' procedure"}.get(attack, attack)
    marks = dagger(one) + DIFFERS * bool(run.differs(one, varied))
    beyond = run.beyond_the_paper if "defence" in one.worst else ""
    return ", ".join(filter(None, (MEASURED, f"{name}{marks}", beyond)))


def dagger(one: StoredEvaluation) -> str:
    """Return the mark of figures whose sanity checks failed, or nothing."""
    return FAILED if one.failed else ""


def trace_of(run: StoredRun, one: StoredEvaluation, varied: Collection[str] = ()) -> Trace:
    """Say which records a row was drawn from, and what to know beside its numbers."""
    known = one.identity
    facts = {
        "images": known["n_images"],
        "seed": known["seed"],
        "eps": f"{known['eps']:.4g} under {known['norm']}",
        "protocol": f"{known['attack']} ({one.summary['label']})",
        "view": known["view"],
        "N": known["n_samples"],
        "aggregation": known["aggregation"],
        "draws": known["draws"],
    }
    warnings = [f"{FAILED} Sanity checks failed: {', '.join(one.failed)}"] if one.failed else []
    warnings += differs_warning(run.differs(one, varied))
    if known["view"] != "exact" and "defence" in one.worst:
        # The released view hides gradients, so its figures never stand without the exact view's.
        exact = (other for other in run.evaluations if attacks_exact_view_of(other.identity, known))
        warnings.append(
            f"Worst case on the exact view: {measured_figure(other.worst['defence'])} ({other.path.name})"
            if (other := next(exact, None))
            else "The exact view was not attacked by the adaptive protocol on these images"
        )
    return Trace(str(one.path), facts, tuple(warnings))


def differs_warning(differing: Sequence[str]) -> tuple[str, ...]:
    """Return the sentence that says what differs from the paper's recipe, or nothing."""
    return (f"{DIFFERS} Differs from the paper's recipe: {'; '.join(differing)}",) if differing else ()


def classifier_name(run: StoredRun) -> str:
    """Return the classifier's own name and its architecture."""
    weights = run.recipe["classifier"][run.recipe["representation"]["kind"]]
    if weights is None:
        return architecture(run)
    return f"{weights['name'] or Path(weights['file']).name} ({architecture(run)})"


def architecture(run: StoredRun) -> str:
    """Return the classifier's architecture, such as `WideResNet-28-10`."""
    section = run.recipe["classifier"]
    if section["family"] != "wide-resnet":
        return section.get("architecture") or "own architecture"
    return f"WideResNet-{section['depth']}-{section['width']}"


def filled(
    number: str,
    title: str,
    columns: tuple[str, ...],
    runs: Sequence[StoredRun],
    rows: Sequence[Row],
    *notes: str,
) -> ReportTable:
    """Return a table with further notes: that nothing is stored, or how its runs depart from the paper."""
    remarks = [NOTHING]
    if any(row.source == MEASURED for row in rows):
        remarks = [] if any(run.dataset for run in runs) else [OTHER_DATA]
        remarks += [
            f"{run.path}: perturbed images were kept for {run.perturbations_reused} epochs of training; the "
            "paper makes new ones for every batch."
            for run in runs
            if run.perturbations_reused > 1
        ]
    if any(isinstance(cell, Figure) and UNION in cell.main for row in rows for cell in row.cells):
        remarks.insert(0, UNION_NOTE)
    return ReportTable(number, title, columns, tuple(rows), (*notes, *remarks))


def paper_entries(runs: Sequence[StoredRun], table: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return scenario, data set and entry of each data set that the runs reproduce; of all for none."""
    known = {run.dataset for run in runs if run.dataset}
    # Table 2 names all three data sets; other tables lack some of them.
    datasets, entries = paper_figures()["2"], paper_figures()[table]
    return [
        (scenario, row["dataset"], entries[scenario])
        for scenario, row in datasets.items()
        if scenario in entries and (not known or row["dataset"] in known)
    ]
