"""The paper's tables of results, filled from stored records: 1, 2, 3, 18 and 19.

Each row of ours is one evaluation of one run, so that no row mixes images, seeds or budgets. The paper's
rows are those of the runs' own data sets, or all of them where no run reproduces one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from carso_cli.reports.evaluations import UNTRUSTED, StoredEvaluation
from carso_cli.reports.stored import StoredRun
from carso_cli.reports.table import (
    LITERATURE,
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
_LARGE_EPS = 0.95


def table_one(runs: Sequence[StoredRun]) -> ReportTable:
    """Elapsed training time of the purifier, by the run's own clock."""
    rows = []
    for run in runs:
        if run.metrics:
            seconds = sum(float(line["seconds"]) for line in run.metrics)
            done, planned = len(run.metrics), run.recipe["training"]["epochs"]
            unfinished = () if done >= planned else (f"Training is not finished: {done} of {planned} epochs",)
            facts = {"seed": run.recipe["seed"], "images an epoch": run.metrics[-1]["images"]}
            time = Figure(seconds / 60.0, digits=1, unit="minutes")
            device = _device(run.environment)
            trace = Trace(str(run.path / "metrics.jsonl"), facts, unfinished)
            label = ", ".join(filter(None, (MEASURED, run.beyond_the_paper)))
            rows.append(Row(MEASURED, (run.data, label, time, f"{done} of {planned}", device), trace))
    for scenario in _scenarios(runs):
        paper = paper_figures()["1"][scenario]
        minutes = Figure(float(paper["minutes"]), digits=0, unit="minutes")
        rows.append(Row(PAPER, (paper["dataset"], PAPER, minutes, None, paper["devices"])))
    notes = ("Ours is the sum of the epochs' own times: checks on held-out images and saving are not in it.",)
    return ReportTable(
        "1",
        "Elapsed time of training the purifier, in minutes",
        ("data", "figures", "minutes", "epochs", "device"),
        tuple(rows),
        (*notes, *remarks(runs, rows)),
    )


def _device(environment: Mapping[str, Any]) -> str:
    if not environment:
        return "–"
    name = str(environment.get("device_name", environment.get("device")))
    threads = environment.get("threads")
    on_cpu = str(environment.get("device")) == "cpu"
    return f"{name} CPU, {threads} thread{'s' * (threads != 1)}" if on_cpu and threads else name


def table_two(runs: Sequence[StoredRun]) -> ReportTable:
    """Clean and adversarial accuracy of classifier and defence."""
    rows = []
    for run in runs:
        for one in run.plain_evaluations:
            worst = one.worst
            cells = (
                measured_figure(one.find("classifier", "none")),
                measured_figure(one.find("defence", "none")),
                measured_figure(one.find("classifier", "aa")),
                measured_figure(one.find("defence", "rand-aa")),
                measured_figure(one.find("defence", "pgd-eot")),
                measured_figure(worst.get("classifier")),
                measured_figure(worst.get("defence")),
            )
            rows.append(Row(MEASURED, (run.data, measured_label(run, one), *cells), trace_of(run, one)))
    for scenario in _scenarios(runs):
        rows += _paper_two(paper_figures()["2"][scenario])
    return ReportTable(
        "2",
        "Clean and adversarial accuracy",
        ("data", "figures", "AT/Cl", "C/Cl", "AT/AA", "C/randAA", "PGD+EoT", "AT worst", "C worst"),
        tuple(rows),
        (
            "AT: the classifier alone; C: the defence; Cl: clean; worst: over all attacks of the evaluation "
            "on each image, the paper has no such column. [ ]: 95% Wilson interval.",
            *remarks(runs, rows),
        ),
    )


def _paper_two(paper: Mapping[str, Any]) -> list[Row]:
    names = ("AT/Cl", "C/Cl", "AT/AA", "C/randAA", "PGD+EoT")
    shown: list[Cell] = [paper_figure(paper[name]) for name in names]
    data = paper["dataset"]
    rows = [Row(PAPER, (data, PAPER, *shown, None, None))]
    if paper["Best AT/AA"] is not None:
        best = paper_figure(paper["Best AT/AA"])
        rows.append(Row(LITERATURE, (data, "literature, best AT", None, None, best, None, None, None, None)))
    if paper["Best P/AA"] is not None:
        best, eot = paper_figure(paper["Best P/AA"]), paper_figure(paper["Best P/PGD+EoT"])
        label = "literature, best purification"
        rows.append(Row(LITERATURE, (data, label, None, None, None, best, eot, None, None)))
    return rows


def table_three(runs: Sequence[StoredRun]) -> ReportTable:
    """Accuracy at eps 0.95, where nothing can stand and a defence that still does hides its gradients."""
    rows = []
    for run in runs:
        chance = Figure(1.0 / run.recipe["data"]["classes"])
        for one in run.evaluations:
            found = _at_large_eps(one)
            if found is not None:
                cells = (run.data, measured_label(run, one), *found, chance)
                rows.append(Row(MEASURED, cells, trace_of(run, one)))
    for scenario in _scenarios(runs):
        dataset = paper_figures()["2"][scenario]["dataset"]
        bound = paper_figure(paper_figures()["3"][scenario]["eps 0.95"])
        rows.append(Row(PAPER, (dataset, PAPER, bound, None, None)))
    return ReportTable(
        "3",
        "Accuracy at eps 0.95: the attack must bring it below chance",
        ("data", "figures", "attacked", "random noise", "chance"),
        tuple(rows),
        (
            "Figures without an interval are trust checks, taken on at most 32 of the images.",
            *remarks(runs, rows),
        ),
    )


def _at_large_eps(one: StoredEvaluation) -> tuple[Cell, Cell] | None:
    if one.identity["eps"] >= _LARGE_EPS and one.identity["norm"] == "linf" and "defence" in one.worst:
        return measured_figure(one.worst["defence"]), measured_figure(one.find("defence", "noise"))
    checks = {check["name"]: check["value"] for check in one.summary["checks"]}
    if checks.get("large-eps-attack") is None:
        return None
    return Figure(checks["large-eps-attack"]), Figure(checks.get("large-eps-noise"))


def table_eighteen(runs: Sequence[StoredRun]) -> ReportTable:
    """The same comparison for further classifiers."""
    rows = []
    for run in runs:
        for one in run.plain_evaluations:
            cells = (
                measured_figure(one.find("classifier", "none")),
                measured_figure(one.find("classifier", "aa")),
                measured_figure(one.find("defence", "none")),
                measured_figure(one.find("defence", "rand-aa")),
                measured_figure(one.worst.get("defence")),
            )
            label = (run.data, measured_label(run, one), describe_classifier(run))
            rows.append(Row(MEASURED, (*label, *cells), trace_of(run, one)))
    for paper in _of_data(runs, paper_figures()["18"]):
        values = [paper_figure(paper[name]) for name in ("AT/Cl", "AT/AA", "C/Cl", "C/randAA")]
        rows.append(Row(PAPER, (paper["dataset"], PAPER, paper["model"], *values, None)))
    return ReportTable(
        "18",
        "Clean and adversarial accuracy for further classifiers",
        ("data", "figures", "classifier", "AT/Cl", "AT/AA", "C/Cl", "C/randAA", "C worst"),
        tuple(rows),
        remarks(runs, rows),
    )


def table_nineteen(runs: Sequence[StoredRun]) -> ReportTable:
    """The defence among adversarial training and purification of the literature."""
    rows = []
    for run in runs:
        for one in run.plain_evaluations:
            if "defence" in one.worst:
                clean, worst = measured_figure(one.find("defence", "none")), one.worst["defence"]
                label = (run.data, measured_label(run, one), "CARSO, this run", _architecture(run))
                cells = (*label, clean, measured_figure(worst), "AT+P")
                rows.append(Row(MEASURED, cells, trace_of(run, one)))
    for paper in _of_data(runs, paper_figures()["19"]):
        values = (paper_figure(paper["Clean"]), paper_figure(paper["Robust"]))
        label = (paper["dataset"], paper["source"], paper["model"], paper["architecture"])
        rows.append(Row(paper["source"], (*label, *values, paper["type"])))
    return ReportTable(
        "19",
        "State-of-the-art defences compared",
        ("data", "figures", "model", "architecture", "clean", "robust", "type"),
        tuple(rows),
        (
            "Literature: as the paper quotes it, measured by others with their own attacks. Our robust "
            "accuracy is the worst case over the attacks of the evaluation named in the footnote.",
            *remarks(runs, rows),
        ),
    )


def measured_label(run: StoredRun, one: StoredEvaluation, target: str = "defence") -> str:
    """Say that a row is ours and by which protocol or attack, with a dagger where trust checks failed.

    Args:
        run: The run.
        one: The evaluation.
        target: What the row is about; in what a defence is beyond the paper is named.
    """
    attack = str(one.identity["attack"])
    name = "as published" if attack == "published" else attack
    beyond = run.beyond_the_paper if target == "defence" and target in one.worst else ""
    return ", ".join(filter(None, (MEASURED, f"{name}{one.dagger}", beyond)))


def trace_of(run: StoredRun, one: StoredEvaluation) -> Trace:
    """Say which records a row was drawn from, and what must be known beside its numbers."""
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
    warnings = [f"{UNTRUSTED} Trust checks failed: {', '.join(one.failed)}"] if one.failed else []
    if known["view"] != "exact" and "defence" in one.worst:
        warnings.append(_beside_the_exact_view(run, one))
    return Trace(str(one.path), facts, tuple(warnings))


def _beside_the_exact_view(run: StoredRun, one: StoredEvaluation) -> str:
    """Return the sentence without which a result on another view is never shown."""
    for other in run.evaluations:
        if attacks_exact_view_of(other.identity, one.identity):
            figure = measured_figure(other.worst["defence"])
            return f"Worst case on the exact view: {figure} ({other.path.name})"
    return "The exact view was not attacked by the adaptive protocol on these images"


def describe_classifier(run: StoredRun) -> str:
    """Return the classifier's own name and its architecture."""
    section = run.recipe["classifier"]
    weights = section[run.recipe["representation"]["kind"]]
    if weights is None:
        return _architecture(run)
    name = weights["name"] or Path(weights["file"]).name
    return f"{name} ({_architecture(run)})"


def _architecture(run: StoredRun) -> str:
    section = run.recipe["classifier"]
    if section["family"] != "wide-resnet":
        return section.get("architecture") or "own architecture"
    return f"WideResNet-{section['depth']}-{section['width']}"


def _scenarios(runs: Sequence[StoredRun]) -> tuple[str, ...]:
    own = tuple(sorted({run.scenario for run in runs if run.scenario is not None}))
    return own or ("(a)", "(b)", "(c)")


def paper_scenarios(runs: Sequence[StoredRun], table: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return data set and entry of the paper's scenarios to be shown beside some runs in a table."""
    entries = paper_figures()[table]
    return [
        (paper_figures()["2"][scenario]["dataset"], entries[scenario])
        for scenario in _scenarios(runs)
        if scenario in entries
    ]


def _of_data(runs: Sequence[StoredRun], rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    shown = {paper_figures()["2"][scenario]["dataset"] for scenario in _scenarios(runs)}
    return [row for row in rows if row["dataset"] in shown]


def remarks(runs: Sequence[StoredRun], rows: Sequence[Row]) -> tuple[str, ...]:
    """Return what must be said of a table: that it is empty, or how its runs depart from the paper."""
    measured = any(row.source == MEASURED for row in rows)
    if not measured:
        return (NOTHING,)
    reused = [
        f"{run.path}: perturbed images were kept for {run.perturbations_reused} epochs of training; the "
        "paper makes them anew for every batch."
        for run in runs
        if run.perturbations_reused > 1
    ]
    return (*(() if any(run.scenario for run in runs) else (OTHER_DATA,)), *reused)
