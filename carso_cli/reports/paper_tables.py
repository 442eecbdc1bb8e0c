"""The paper's Tables 1 to 5 and 17 to 19 from stored records, and a table for each further ablation.

Each measured row is one evaluation of one run, so that no row mixes images, seeds or budgets. The paper's
rows are those of the runs' own data sets, or all of them where no run reproduces one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from carso_cli.reports.load import StoredEvaluation, StoredRun
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
from carso_cli.runs.summary import headline

OTHER_DATA = (
    "No run here reproduces a data set of the paper; its figures are of other data, not to be compared."
)
NOTHING = "Nothing is stored for this table yet."
_DAGGER = "†"
_LARGE_EPS = 0.95
_MAJORITY = "majority-vote"
_KINDS = {"at": "AT", "clean": "clean"}
_ACCURACIES = {
    "AT/Cl": ("classifier", "none"),
    "AT/AA": ("classifier", "aa"),
    "AT worst": ("classifier", "worst"),
    "C/Cl": ("defence", "none"),
    "C/randAA": ("defence", "rand-aa"),
    "PGD+EoT": ("defence", "pgd-eot"),
    "C worst": ("defence", "worst"),
    "clean": ("defence", "none"),
    "randAA": ("defence", "rand-aa"),
    "attacked": ("defence", "worst"),
    "random noise": ("defence", "noise"),
    "robust": ("defence", "worst"),
    "worst": ("defence", "worst"),
}
"""Target and attack of each column that holds an accuracy, as `StoredEvaluation.find` takes them."""
_TRANSFERRED = (
    "Transferred: examples made against a rule that has gradients, or surrogates with such; C worst: over "
    "these and all attacks of the evaluation."
)


def table_one(runs: Sequence[StoredRun]) -> ReportTable:
    """Elapsed training time of the purifier, by the run's own clock."""
    columns = ("data", "figures", "minutes", "epochs", "device")
    rows = []
    for run in runs:
        if run.metrics:
            seconds = sum(float(line["seconds"]) for line in run.metrics)
            done, planned = len(run.metrics), run.recipe["training"]["epochs"]
            # The time of a training in progress must not pass for that of a whole one.
            unfinished = () if done >= planned else (f"Training is not finished: {done} of {planned} epochs",)
            facts = {"seed": run.recipe["seed"], "images per epoch": run.metrics[-1]["images"]}
            trace = Trace(str(run.path / "metrics.jsonl"), facts, unfinished)
            label = ", ".join(filter(None, (MEASURED, run.beyond_the_paper)))
            time = Figure(seconds / 60.0, digits=1, unit="minutes")
            cells = (run.data, label, time, f"{done} of {planned}", _device(run.environment))
            rows.append(Row(MEASURED, cells, trace))
    for data, paper in _paper(runs, "1"):
        minutes = Figure(float(paper["minutes"]), digits=0, unit="minutes")
        rows.append(_quoted(columns, data, {"minutes": minutes, "device": paper["devices"]}))
    note = "Ours is the sum of the epochs' own times: checks on held-out images and saving are not in it."
    return _filled("1", "Elapsed time of training the purifier, in minutes", columns, runs, rows, note)


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
    columns = ("data", "figures", "AT/Cl", "C/Cl", "AT/AA", "C/randAA", "PGD+EoT", "AT worst", "C worst")
    rows = [_measured(columns, run, one) for run in runs for one in run.plain_evaluations]
    for data, paper in _paper(runs, "2"):
        rows.append(_quoted(columns, data, paper))
        literature = {
            "literature, best AT": {"AT/AA": paper["Best AT/AA"]},
            "literature, best purification": {
                "C/randAA": paper["Best P/AA"],
                "PGD+EoT": paper["Best P/PGD+EoT"],
            },
        }
        for label, values in literature.items():
            # For some data sets the paper quotes no such result.
            if any(values.values()):
                rows.append(_quoted(columns, data, {"figures": label, **values}, LITERATURE))
    note = (
        "AT: the classifier alone; C: the defence; Cl: clean; worst: over all attacks of the evaluation "
        "on each image, the paper has no such column. [ ]: 95% Wilson interval."
    )
    return _filled("2", "Clean and adversarial accuracy", columns, runs, rows, note)


def table_three(runs: Sequence[StoredRun]) -> ReportTable:
    """Accuracy at eps 0.95, where any image can be changed into any other: what is left is obfuscation."""
    columns = ("data", "figures", "attacked", "random noise", "chance")
    rows = []
    for run in runs:
        chance = Figure(1.0 / run.recipe["data"]["classes"])
        for one in run.evaluations:
            known, checks = one.identity, {check["name"]: check["value"] for check in one.summary["checks"]}
            # An attack on all images comes before the sanity check, which takes at most 32 of them.
            if known["eps"] >= _LARGE_EPS and known["norm"] == "linf" and "defence" in one.worst:
                rows.append(_measured(columns, run, one, {"chance": chance}))
            elif checks.get("large-eps-attack") is not None:
                attacked, noise = Figure(checks["large-eps-attack"]), Figure(checks.get("large-eps-noise"))
                cells = {"attacked": attacked, "random noise": noise, "chance": chance}
                rows.append(_measured(columns, run, one, cells))
    rows += [_quoted(columns, data, {"attacked": paper["eps 0.95"]}) for data, paper in _paper(runs, "3")]
    title = "Accuracy at eps 0.95: the attack must bring it below chance"
    note = "Figures without an interval are sanity checks, taken on at most 32 of the images."
    return _filled("3", title, columns, runs, rows, note)


def table_four(runs: Sequence[StoredRun]) -> ReportTable:
    """Aggregation rules that have gradients (Appendix B)."""
    columns = ("data", "figures", "aggregation", "C/Cl", "C/randAA", "transferred", "C worst")
    rows = [
        _measured(columns, run, one, {"aggregation": rule, **_transferred(run, one)})
        for run, one, rule in _by_aggregation(runs)
        if rule != _MAJORITY
    ]
    for data, rules in _paper(runs, "4"):
        rows += [_quoted(columns, data, {"aggregation": rule, **paper}) for rule, paper in rules.items()]
    return _filled("4", "Aggregation rules compared", columns, runs, rows, _TRANSFERRED)


def table_five(runs: Sequence[StoredRun]) -> ReportTable:
    """Majority vote: it has no useful gradient, so the transferred examples give the number that counts."""
    columns = ("data", "figures", "C/Cl", "C/randAA", "transferred", "C worst", "gradients unusable")
    rows = [
        _measured(columns, run, one, {"gradients unusable": _unusable(one), **_transferred(run, one)})
        for run, one, rule in _by_aggregation(runs)
        if rule == _MAJORITY
    ]
    unusable = Figure(None, text="> 0.99")
    rows += [
        _quoted(columns, data, {"gradients unusable": unusable, **rules[_MAJORITY]})
        for data, rules in _paper(runs, "5")
    ]
    note = "A vote has no useful gradient: accuracy under attacks by its own gradients is no robustness."
    return _filled("5", "Majority vote", columns, runs, rows, note, _TRANSFERRED)


def _by_aggregation(runs: Sequence[StoredRun]) -> Iterator[tuple[StoredRun, StoredEvaluation, str]]:
    """Yield attacked evaluations of the defence that differ from the recipe in their aggregation at most."""
    for run in runs:
        for one in run.evaluations:
            if "defence" in one.worst and run.departures(one) <= {"aggregation"}:
                yield run, one, str(one.identity["aggregation"])


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


def table_seventeen(runs: Sequence[StoredRun]) -> ReportTable:
    """Which of the two classifier instances is trained adversarially (Appendix D)."""
    columns = ("data", "figures", "first/second", "clean", "randAA", "worst")
    rows = [
        _measured(columns, run, one, {"first/second": kind})
        for run in runs
        for kind, one in _kinds(run)
        if "defence" in one.worst
    ]
    for data, kinds in _paper(runs, "17"):
        for kind, paper in kinds.items():
            values = {"first/second": kind, "clean": paper["Clean"], "randAA": paper["randAA"]}
            rows.append(_quoted(columns, data, values))
    title = "Training of the first and of the second classifier instance"
    return _filled("17", title, columns, runs, rows, "AT/AT is the paper's own architecture.")


def _kinds(run: StoredRun) -> list[tuple[str, StoredEvaluation]]:
    """Return evaluations by training of first and second instance: the ablation's, then the run's own."""
    found = [(row.label, row.evaluation) for one in run.ablations_of("first-second") for row in one.rows]
    # An evaluation that the ablation used is among the run's own too, and gets one row.
    listed = {one.path.resolve() for _, one in found}
    first, second = run.recipe["representation"]["kind"], run.recipe["evaluation"]["second_kind"]
    kind = f"{_KINDS[first]}/{_KINDS[second]}"
    return found + [(kind, one) for one in run.plain_evaluations if one.path.resolve() not in listed]


def table_eighteen(runs: Sequence[StoredRun]) -> ReportTable:
    """The comparison of Table 2 for further classifiers."""
    columns = ("data", "figures", "classifier", "AT/Cl", "AT/AA", "C/Cl", "C/randAA", "C worst")
    rows = [
        _measured(columns, run, one, {"classifier": _classifier(run)})
        for run in runs
        for one in run.plain_evaluations
    ]
    for paper in _paper_list(runs, "18"):
        rows.append(_quoted(columns, paper["dataset"], {"classifier": paper["model"], **paper}))
    title = "Clean and adversarial accuracy for further classifiers"
    return _filled("18", title, columns, runs, rows)


def table_nineteen(runs: Sequence[StoredRun]) -> ReportTable:
    """The defence among adversarial training and purification of the literature."""
    columns = ("data", "figures", "model", "architecture", "clean", "robust", "type")
    rows = []
    for run in runs:
        cells = {"model": "CARSO, this run", "architecture": _architecture(run), "type": "AT+P"}
        attacked = (one for one in run.plain_evaluations if "defence" in one.worst)
        rows += [_measured(columns, run, one, cells) for one in attacked]
    for paper in _paper_list(runs, "19"):
        values = {**paper, "clean": paper["Clean"], "robust": paper["Robust"]}
        rows.append(_quoted(columns, paper["dataset"], values, paper["source"]))
    note = (
        "Literature: as the paper quotes it, measured by others with their own attacks. Our robust "
        "accuracy is the worst case over the attacks of the evaluation named in the footnote."
    )
    return _filled("19", "State-of-the-art defences compared", columns, runs, rows, note)


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
            title, notes = f"{ablation.title}, {ablation.attack}", (ablation.note,) * bool(ablation.note)
            tables.append(ReportTable("", title, columns, tuple(rows), notes))
    return tables


def _measured(
    columns: Sequence[str], run: StoredRun, one: StoredEvaluation, further: Mapping[str, Cell] | None = None
) -> Row:
    """Return the row of one evaluation; `further` holds cells that are no accuracy, or replaces one."""
    cells: dict[str, Cell] = {
        name: measured_figure(one.find(*_ACCURACIES[name])) for name in columns if name in _ACCURACIES
    }
    # `further` comes last, so that it may replace an accuracy.
    cells |= {"data": run.data, "figures": measured_label(run, one), **(further or {})}
    return Row(MEASURED, tuple(map(cells.get, columns)), trace_of(run, one))


def _quoted(columns: Sequence[str], data: str, values: Mapping[str, Any], source: str = PAPER) -> Row:
    """Return a row of numbers and texts that the paper gives; columns that it does not have stay empty."""
    known = {"data": data, "figures": source, **values}
    cells = [paper_figure(known.get(name)) if name in _ACCURACIES else known.get(name) for name in columns]
    return Row(source, tuple(cells))


def _filled(
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
        remarks = [] if any(run.scenario for run in runs) else [OTHER_DATA]
        remarks += [
            f"{run.path}: perturbed images were kept for {run.perturbations_reused} epochs of training; the "
            "paper makes new ones for every batch."
            for run in runs
            if run.perturbations_reused > 1
        ]
    return ReportTable(number, title, columns, tuple(rows), (*notes, *remarks))


def measured_label(run: StoredRun, one: StoredEvaluation) -> str:
    """Say that a row is measured and by which protocol, with a dagger where sanity checks failed.

    If the defence was attacked, in what it is beyond the paper is named too.
    """
    attack = str(one.identity["attack"])
    name = "as published" if attack == "published" else attack
    beyond = run.beyond_the_paper if "defence" in one.worst else ""
    return ", ".join(filter(None, (MEASURED, f"{name}{dagger(one)}", beyond)))


def dagger(one: StoredEvaluation) -> str:
    """Return the mark of figures whose sanity checks failed, or nothing."""
    return _DAGGER if one.failed else ""


def trace_of(run: StoredRun, one: StoredEvaluation) -> Trace:
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
    warnings = [f"{_DAGGER} Sanity checks failed: {', '.join(one.failed)}"] if one.failed else []
    if known["view"] != "exact" and "defence" in one.worst:
        # The released view hides gradients, so its figures never stand without the exact view's.
        exact = (other for other in run.evaluations if attacks_exact_view_of(other.identity, known))
        warnings.append(
            f"Worst case on the exact view: {measured_figure(other.worst['defence'])} ({other.path.name})"
            if (other := next(exact, None))
            else "The exact view was not attacked by the adaptive protocol on these images"
        )
    return Trace(str(one.path), facts, tuple(warnings))


def _classifier(run: StoredRun) -> str:
    """Return the classifier's own name and its architecture."""
    weights = run.recipe["classifier"][run.recipe["representation"]["kind"]]
    if weights is None:
        return _architecture(run)
    return f"{weights['name'] or Path(weights['file']).name} ({_architecture(run)})"


def _architecture(run: StoredRun) -> str:
    section = run.recipe["classifier"]
    if section["family"] != "wide-resnet":
        return section.get("architecture") or "own architecture"
    return f"WideResNet-{section['depth']}-{section['width']}"


def _paper(runs: Sequence[StoredRun], table: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return data set and entry of each scenario that the runs reproduce; of all if they reproduce none."""
    scenarios = sorted({run.scenario for run in runs if run.scenario}) or ["(a)", "(b)", "(c)"]
    # Table 2 names all three data sets; other tables lack some of them.
    datasets, entries = paper_figures()["2"], paper_figures()[table]
    return [(datasets[name]["dataset"], entries[name]) for name in scenarios if name in entries]


def _paper_list(runs: Sequence[StoredRun], table: str) -> list[Mapping[str, Any]]:
    """Return the entries of a table that is a list in the paper, of the same data sets as `_paper`."""
    datasets = {data for data, _ in _paper(runs, "2")}
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
