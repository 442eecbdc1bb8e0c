"""The paper's Tables 1 to 5 and 17 to 19 from stored records, and a table for each further ablation.

Columns are the paper's in its order, ours at their right. Each measured row is one evaluation of one run, so
that no row mixes images, seeds or budgets; of Table 4 one for each rule. The paper's rows are those of the
runs' own data sets, or all of them where no run reproduces one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carso_cli.reports.aggregation_tables import table_five, table_four
from carso_cli.reports.rows import (
    DIFFERS,
    architecture,
    classifier_name,
    differs_warning,
    filled,
    measured,
    measured_label,
    paired,
    paper_entries,
    quoted,
    trace_of,
)
from carso_cli.reports.stored import StoredEvaluation, StoredRun
from carso_cli.reports.table import (
    MEASURED,
    Cell,
    Figure,
    ReportTable,
    Row,
    Trace,
    measured_figure,
)
from carso_cli.runs.paper import paper_figures

FEW_IMAGES = 100
"""Of fewer images an accuracy says too little to stand among the literature's."""
_LARGE_EPS = 0.95
_KINDS = {"at": "AT", "clean": "clean"}
_OWN_KIND = "AT/AT"


def table_one(runs: Sequence[StoredRun]) -> ReportTable:
    """Elapsed training time of the purifier, by the run's own clock."""
    columns = (*_scenarios(runs), "epochs", "device", "figures")
    rows = []
    for run in runs:
        if run.metrics:
            seconds = sum(float(line["seconds"]) for line in run.metrics)
            done, planned = len(run.metrics), run.recipe["training"]["epochs"]
            # The time of a training in progress must not pass for that of a whole one.
            unfinished = () if done >= planned else (f"Training is not finished: {done} of {planned} epochs",)
            differing = differs_warning(run.differs())
            facts = {"seed": run.recipe["seed"], "images per epoch": run.metrics[-1]["images"]}
            trace = Trace(str(run.path / "metrics.jsonl"), facts, (*unfinished, *differing))
            label = MEASURED + DIFFERS * bool(differing)
            cells: dict[str, Cell] = {
                "Scenario": f"Elapsed training time, {run.data}",
                run.scenario or _OTHER: _minutes(seconds / 60.0, 1),
                "epochs": f"{done} of {planned}",
                "device": _device(run.environment),
                "figures": ", ".join(filter(None, (label, run.beyond_the_paper))),
            }
            rows.append(Row(MEASURED, tuple(map(cells.get, columns)), trace))
    paper = paper_figures()["1"]
    values: dict[str, Any] = {name: _minutes(one["minutes"], 0) for name, one in paper.items()}
    values["Scenario"] = "Elapsed training time"
    values["epochs"] = ", ".join(str(one["epochs"]) for one in paper.values())
    numbers = ", ".join(one["devices"].partition(" ")[0] for one in paper.values())
    values["device"] = f"{numbers} {paper['(a)']['devices'].partition(' ')[2]}"
    rows.append(quoted(columns, values))
    note = "Ours is the sum of the epochs' own times: checks on held-out images and saving are not in it."
    return filled("1", "Elapsed time of training the purifier", columns, runs, rows, note)


_OTHER = "other"


def _scenarios(runs: Sequence[StoredRun]) -> tuple[str, ...]:
    """Return the columns of a table with one a scenario, and one for runs that reproduce none of them."""
    other = (_OTHER,) if any(run.scenario is None for run in runs) else ()
    return ("Scenario", "(a)", "(b)", "(c)", *other)


def _minutes(value: float, digits: int) -> Figure:
    return Figure(float(value), text=f"{value:.{digits}f} min", digits=digits, unit="minutes")


def _device(environment: Mapping[str, Any]) -> str:
    if not environment:
        return "–"
    name = str(environment.get("device_name", environment.get("device")))
    threads = environment.get("threads")
    # On a CPU the time depends on the number of threads.
    on_cpu = str(environment.get("device")) == "cpu"
    return f"{name} CPU, {threads} thread{'s' * (threads != 1)}" if on_cpu and threads else name


def table_two(runs: Sequence[StoredRun]) -> ReportTable:
    """Clean and adversarial accuracy of classifier and defence."""
    columns = (
        *("Scen.", "Dataset", "AT/Cl", "C/Cl", "AT/AA", "C/randAA (PGD+EoT)", "Best AT/AA"),
        *("Best P/AA (PGD+EoT)", "AT worst", "C worst", "figures"),
    )
    rows = [measured(columns, run, one) for run in runs for one in run.plain_evaluations]
    for scenario, data, paper in paper_entries(runs, "2"):
        brackets = {
            "C/randAA (PGD+EoT)": paired(paper["C/randAA"], paper["PGD+EoT"]),
            "Best P/AA (PGD+EoT)": paired(paper["Best P/AA"], paper["Best P/PGD+EoT"]),
        }
        rows.append(quoted(columns, {"Scen.": scenario, "Dataset": data, **paper, **brackets}))
    note = (
        "AT: the classifier alone; C: the defence; Cl: clean; Best: of the literature, as the paper quotes "
        "it; worst: over all attacks of the evaluation on each image, the paper has no such column. [ ]: 95% "
        "Wilson interval."
    )
    return filled("2", "Clean and adversarial accuracy", columns, runs, rows, note)


def table_three(runs: Sequence[StoredRun]) -> ReportTable:
    """Accuracy at eps 0.95, where any image can be changed into any other: what is left is obfuscation."""
    columns = (*_scenarios(runs), "random noise", "chance", "figures")
    rows, name = [], "eps 0.95 acc."
    for run in runs:
        column = run.scenario or _OTHER
        facts: dict[str, Cell] = {"Scenario": f"{name}, {run.data}"}
        facts["chance"] = Figure(1.0 / run.recipe["data"]["classes"])
        for one in run.evaluations:
            known, checks = one.identity, {check["name"]: check["value"] for check in one.summary["checks"]}
            # An attack on all images comes before the sanity check, which takes at most 32 of them.
            if known["eps"] >= _LARGE_EPS and known["norm"] == "linf" and "defence" in one.worst:
                cells = {column: measured_figure(one.worst["defence"])}
            elif checks.get("large-eps-attack") is not None:
                noise = Figure(checks.get("large-eps-noise"))
                cells = {column: Figure(checks["large-eps-attack"]), "random noise": noise}
            else:
                continue
            rows.append(measured(columns, run, one, facts | cells))
    paper = {scenario: one["eps 0.95"] for scenario, one in paper_figures()["3"].items()}
    rows.append(quoted(columns, {"Scenario": name, **paper}))
    title = "Accuracy at eps 0.95: the attack must bring it below chance"
    note = (
        "Chance is 0.1, 0.01 and 0.005 in the scenarios (a), (b) and (c). Figures without an interval are "
        "sanity checks, taken on at most 32 of the images."
    )
    return filled("3", title, columns, runs, rows, note)


def table_seventeen(runs: Sequence[StoredRun]) -> ReportTable:
    """Which of the two classifier instances is trained adversarially (Appendix D)."""
    columns = ("Dataset", "Type of ablation", "Clean Acc.", "randAA Acc.", "C worst", "figures")
    # The paper varies the two itself, and with the first the weights.
    varied = ("representation.kind", "evaluation.second_kind", "classifier.weights")
    rows = [
        measured(columns, run, one, {"Type of ablation": _type(kind)}, varied=varied)
        for run in runs
        for kind, one in _kinds(run)
        if "defence" in one.worst
    ]
    for _, data, kinds in paper_entries(runs, "17"):
        for kind, paper in kinds.items():
            accuracies = {"Clean Acc.": paper["Clean"], "randAA Acc.": paper["randAA"]}
            rows.append(quoted(columns, {"Dataset": data, "Type of ablation": _type(kind), **accuracies}))
    title = "Training of the first and of the second classifier instance"
    return filled("17", title, columns, runs, rows, "None: AT/AT, the paper's own architecture.")


def _type(kind: str) -> str:
    return "None" if kind == _OWN_KIND else kind


def _kinds(run: StoredRun) -> list[tuple[str, StoredEvaluation]]:
    """Return evaluations by training of first and second instance: the ablation's, then the run's own."""
    found = [(row.label, row.evaluation) for one in run.ablations_of("first-second") for row in one.rows]
    # An evaluation that the ablation used is among the run's own too, and gets one row.
    listed = {one.on_defence for _, one in found}
    first, second = run.recipe["representation"]["kind"], run.recipe["evaluation"]["second_kind"]
    kind = f"{_KINDS[first]}/{_KINDS[second]}"
    return found + [(kind, one) for one in run.plain_evaluations if one.on_defence not in listed]


def table_eighteen(runs: Sequence[StoredRun]) -> ReportTable:
    """The comparison of Table 2 for further classifiers."""
    columns = (
        *("Dataset", "Classification model", "AT/Cl", "AT/AA", "C/Cl", "C/randAA", "C worst", "figures"),
    )
    rows = [
        measured(columns, run, one, {"Classification model": classifier_name(run)})
        for run in runs
        for one in run.plain_evaluations
    ]
    for paper in _paper_list(runs, "18"):
        known = {"Dataset": paper["dataset"], "Classification model": paper["model"]}
        rows.append(quoted(columns, {**paper, **known}))
    title = "Clean and adversarial accuracy for further classifiers"
    return filled("18", title, columns, runs, rows)


def table_nineteen(runs: Sequence[StoredRun]) -> ReportTable:
    """The defence among adversarial training and purification of the literature."""
    columns = ("Dataset", "Model", "Architecture", "Clean Acc.", "Robust Acc.", "Def. type", "figures")
    rows, few = [], 0
    for run in runs:
        cells = {
            "Model": "Ours, this run",
            "Architecture": f"CARSO ({architecture(run)})",
            "Def. type": "AT+P",
        }
        attacked = [one for one in run.plain_evaluations if "defence" in one.worst]
        enough = [one for one in attacked if one.identity["n_images"] >= FEW_IMAGES]
        few += len(attacked) - len(enough)
        rows += [measured(columns, run, one, cells) for one in enough]
    names = {"Dataset": "dataset", "Model": "model", "Architecture": "architecture", "Def. type": "type"}
    names |= {"Clean Acc.": "Clean", "Robust Acc.": "Robust"}
    for paper in _paper_list(runs, "19"):
        values = {column: paper[key] for column, key in names.items()}
        rows.append(quoted(columns, values, paper["source"]))
    note = (
        "Literature: as the paper quotes it, measured by others with their own attacks. Our robust "
        "accuracy is the worst case over the attacks of the evaluation named in the footnote."
    )
    left_out = f"Left out, of fewer than {FEW_IMAGES} images: {few} evaluation{'s' * (few != 1)}."
    notes = (note, left_out) if few else (note,)
    return filled("19", "State-of-the-art defences compared", columns, runs, rows, *notes)


def further_ablations(runs: Sequence[StoredRun]) -> list[ReportTable]:
    """Return a table for each stored ablation that fills none of the paper's: clean, attacked, noise."""
    tables = []
    for run in runs:
        for ablation in run.ablations:
            if ablation.ablation in ("first-second", "aggregations"):
                continue
            rows = []
            for row in ablation.rows:
                found = (measured_figure(row.accuracy(attack)) for attack in ("none", "worst", "noise"))
                cells = (run.data, measured_label(run, row.evaluation), row.label, *found)
                rows.append(Row(MEASURED, cells, trace_of(run, row.evaluation)))
            columns = ("data", "figures", ablation.varies, "clean", "attacked", "random noise")
            # Of several runs the titles would be the same, and with them the anchors.
            where = f", {run.path}" if len(runs) > 1 else ""
            title = f"{ablation.title}, {ablation.attack}{where}"
            notes = (ablation.note,) * bool(ablation.note)
            tables.append(ReportTable("", title, columns, tuple(rows), notes))
    return tables


def _paper_list(runs: Sequence[StoredRun], table: str) -> list[Mapping[str, Any]]:
    """Return the entries of a table that is a list in the paper, of the same data sets as `paper_entries`."""
    datasets = {data for _, data, _ in paper_entries(runs, "2")}
    return [row for row in paper_figures()[table] if row["dataset"] in datasets]


PAPER_TABLES: dict[str, Callable[[Sequence[StoredRun]], ReportTable]] = {
    "1": table_one,
    "2": table_two,
    "3": table_three,
    "4": table_four,
    "5": table_five,
    "17": table_seventeen,
    "18": table_eighteen,
    "19": table_nineteen,
}
"""The tables that can be drawn, by the paper's number."""
