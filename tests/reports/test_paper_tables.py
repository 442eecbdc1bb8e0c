"""The paper's tables and further ablations, against small fixed records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from carso_cli.errors import UsageError
from carso_cli.recipe.load import load_recipe
from carso_cli.reports.aggregation_tables import table_five, table_four
from carso_cli.reports.paper_tables import (
    PAPER_TABLES,
    further_ablations,
    table_eighteen,
    table_nineteen,
    table_one,
    table_seventeen,
    table_three,
    table_two,
)
from carso_cli.reports.report import report
from carso_cli.reports.rows import NOTHING, OTHER_DATA, UNION_NOTE
from carso_cli.reports.table import Figure, ReportTable, Row, shown
from carso_cli.runs.intervals import wilson
from carso_cli.runs.paper import paper_row
from carso_cli.runtime.reporter import SilentReporter


def ours(table: ReportTable) -> list[Row]:
    return [row for row in table.rows if row.source == "measured"]


def values(row: Row) -> list[float | None]:
    return [cell.value if isinstance(cell, Figure) else None for cell in row.cells]


def figure(row: Row, place: int) -> Figure:
    cell = row.cells[place]
    assert isinstance(cell, Figure)
    return cell


# As the paper prints them, Tables 1 to 5 and 17 to 19.
HEADERS = {
    "1": "Scenario|(a)|(b)|(c)",
    "2": "Scen.|Dataset|AT/Cl|C/Cl|AT/AA|C/randAA (PGD+EoT)|Best AT/AA|Best P/AA (PGD+EoT)",
    "3": "Scenario|(a)|(b)|(c)",
    "4": "Scen.|Dataset|C/Cl (L.A.)|C/randAA (L.A.)|C/Cl (P.A.)|C/randAA (P.A.)|C/Cl|C/randAA",
    "5": "Scen.|Dataset|C/Cl (M.V.)|C/randAA (M.V.)",
    "17": "Dataset|Type of ablation|Clean Acc.|randAA Acc.",
    "18": "Dataset|Classification model|AT/Cl|AT/AA|C/Cl|C/randAA",
    "19": "Dataset|Model|Architecture|Clean Acc.|Robust Acc.|Def. type",
}
FIRST_ROWS = {
    "1": "Elapsed training time|159 min|138 min|213 min",
    "2": "(a)|CIFAR-10|0.9216|0.8686|0.6773|0.7613 (0.7689)|0.7371|0.7812 (0.6641)",
    "3": "eps 0.95 acc.|< 0.047|< 0.010|about 0.0",
    "4": "(a)|CIFAR-10|0.8688|0.0086|0.8688|0.0092|0.8686|0.7613",
    "5": "(a)|CIFAR-10|0.8691|0.8602",
    "17": "CIFAR-10|clean/clean|0.7314|0.7070",
    "18": "CIFAR-10|Rebuffi et al. (2021)|0.8733|0.6075|0.8152|0.7070",
    "19": "CIFAR-10|Bartoldson et al. (2024)|WideResNet-94-16|0.9368|0.7371|AT",
}


@pytest.mark.parametrize("number", PAPER_TABLES)
def test_columns_are_the_papers_in_its_order_and_ours_at_their_right(write: Any, number: str) -> None:
    table = PAPER_TABLES[number]([write.read(write.run())])
    header = HEADERS[number].split("|")
    assert list(table.columns[: len(header)]) == header
    assert "figures" in table.columns[len(header) :]
    quoted = next(row for row in table.rows if row.source != "measured")
    assert [shown(cell) for cell in quoted.cells[: len(header)]] == FIRST_ROWS[number].split("|")


@pytest.mark.shared
def test_those_headers_stand_in_the_paper(shared_folder: Path) -> None:
    text = (shared_folder / "paper" / "carso-paper.md").read_text()
    # One of its headers was read as `CI` for `Cl`.
    plain = re.sub(r"</?[ib]>", "", text).replace("AT/CI", "AT/Cl").replace("C/CI", "C/Cl")
    for header in HEADERS.values():
        assert header.replace("|", "\t") in plain


def test_table_one_is_the_runs_own_clock_beside_the_papers_minutes(write: Any) -> None:
    run = write.read(write.run())
    table = table_one([run])
    assert table.columns[4:] == ("other", "epochs", "device", "figures")
    (row,) = ours(table)
    assert row.cells[0] == "Elapsed training time, digits"
    assert row.cells[1:4] == (None, None, None)
    assert row.cells[4] == Figure(1.5, text="1.5 min", digits=1, unit="minutes")
    assert row.cells[5:] == ("2 of 2", "x86_64 CPU, 2 threads", "measured")
    assert str(row.trace) == f"{run.path}/metrics.jsonl, seed 0, images per epoch 10"
    (paper,) = table.rows[1:]
    assert values(paper)[1:4] == [159.0, 138.0, 213.0]
    assert paper.cells[4:6] == (None, "200, 200, 250")
    assert OTHER_DATA in table.notes


def test_a_run_of_a_scenario_takes_its_column(write: Any) -> None:
    table = table_one([write.read(write.run("c100", "cifar100"))])
    assert table.columns[3:5] == ("(c)", "epochs")
    assert [shown(cell) for cell in ours(table)[0].cells[:5]] == [
        *("Elapsed training time, CIFAR-100", "–", "1.5 min", "–", "2 of 200")
    ]


def test_table_two_holds_every_quantity_with_interval_and_record(write: Any) -> None:
    run = write.run()
    path = write.evaluation(run, "adaptive", write.both)
    (row,) = ours(table_two([write.read(run)]))
    assert row.cells[:2] == (None, "digits")
    assert row.cells[-1] == "measured, adaptive"
    # Worst case by the selection draws of each image: 0, 1, 0, 0 of 2.
    assert values(row)[2:] == [0.75, 0.875, 0.25, 0.375, None, None, 0.25, 0.125, None]
    assert str(figure(row, 5).beside).startswith("0.500 [")
    low, high = wilson(0.5, 4)
    assert str(row.cells[9]) == f"0.125 [{low:.2f}, {high:.2f}]"
    assert str(row.trace) == (
        f"{path}, images 4, seed 3, eps 0.1 under linf, protocol adaptive (label of adaptive), view exact, "
        "N 8, aggregation doubly-exponential, draws 2"
    )


def test_an_attack_that_skipped_broken_images_is_a_union(write: Any) -> None:
    run = write.run()
    both = write.evaluation(run, "adaptive", write.both, skipped={"defence/pgd-eot/exact": "defence/rand-aa"})
    alone = write.evaluation(run, "pgd-eot", write.both, skipped={"defence/pgd-eot/exact": "defence/none"})
    table = table_two([write.read(run)])
    found = {str(row.trace).partition(",")[0]: figure(row, 5) for row in ours(table)}
    # What is misclassified unperturbed needs no attack.
    mains = {path: cell.main for path, cell in found.items()}
    assert mains == {str(both): "0.375 (0.500 union)", str(alone): "0.375 (0.500)"}
    assert [cell.beside and cell.beside.value for cell in found.values()] == [0.5, 0.5]
    assert UNION_NOTE in table.notes


def test_the_authors_attacks_stand_in_the_papers_columns(write: Any) -> None:
    run = write.run()
    outcomes = {
        ("defence", "none", None): [1, 1, 1, 1],
        ("defence", "authors-rand-aa", "released"): [1, 1, 0, 1],
        ("defence", "authors-pgd-eot", "released"): [1, 0, 0, 1],
    }
    write.evaluation(run, "authors", outcomes, view="released", draws=1)
    (row,) = ours(table_two([write.read(run)]))
    assert figure(row, 5).main == "0.750 (0.500)"
    # Nothing was selected, so there is no worst case over both.
    assert row.cells[9] is None
    assert row.cells[-1] == "measured, the authors' procedure"
    (row,) = ours(table_seventeen([write.read(run)]))
    assert values(row)[2:5] == [1.0, 0.75, None]


def test_table_two_says_that_nothing_is_stored(write: Any) -> None:
    table = table_two([write.read(write.run())])
    assert NOTHING in table.notes
    assert not ours(table)


def test_what_differs_from_the_papers_recipe_is_marked_and_said(write: Any) -> None:
    short = ["training.epochs=20", "training.batch_size=512", "purifier.latent_features=64"]
    path = write.run("short", "cifar10", [*short, "representation.layers=[layer.0.block.0.conv_0]"])
    write.evaluation(path, "adaptive", write.both, eps=8 / 255, apgd_steps=5)
    said = (
        "‡ Differs from the paper's recipe: trained on 10 of 50,000 images; number of layers 1, "
        "not 26; latent_features 64, not 128; epochs 20, not 200; batch_size 512, not 5120"
    )
    for draw in (table_two, table_eighteen, table_seventeen):
        (row,) = ours(draw([write.read(path)]))
        assert row.cells[-1] == "measured, adaptive‡"
        assert str(row.trace).endswith(f"{said}; apgd_steps 5, not 100; 4 of 10,000 test images")
    (row,) = ours(table_one([write.read(path)]))
    assert row.cells[-1] == "measured‡"
    assert str(row.trace).endswith(said)


def test_the_papers_own_recipe_differs_in_nothing(write: Any) -> None:
    path = write.run("whole", "cifar10", ["data.root=/elsewhere", "data.holdout=0", "training.epochs=50"])
    (said,) = write.read(path).differs()[1:]
    assert said == "epochs 50, not 200"
    # An imported purifier was not trained by the recipe beside it.
    (path / "metrics.jsonl").unlink()
    assert write.read(path).differs() == ()


@pytest.mark.parametrize("name", ["cifar10-gowal2020", "cifar10-rebuffi2021", "cifar100-rebuffi2021"])
def test_the_further_classifiers_stand_under_their_data_set(write: Any, name: str) -> None:
    path = write.run(name, name)
    (path / "metrics.jsonl").unlink()
    write.evaluation(path, "adaptive", write.both, eps=8 / 255, n_images=4)
    table = table_eighteen([write.read(path)])
    assert OTHER_DATA not in table.notes
    (row,) = ours(table)
    dataset = "CIFAR-100" if "100" in name else "CIFAR-10"
    assert {row.cells[0] for row in table.rows} == {dataset}
    # Not the classifier: Table 18 is about this one.
    assert str(row.trace).endswith("recipe: 4 of 10,000 test images")
    paper = paper_row(load_recipe(name).reproduces, "2")
    assert paper is not None
    assert (paper["dataset"], paper["model"].split()[0].lower()) == (dataset, name.split("-")[1][:-4])


def test_a_run_of_a_scenario_stands_beside_that_scenario_only(write: Any) -> None:
    run = write.run("c100", "cifar100")
    write.evaluation(run, "adaptive", write.both, eps=8 / 255)
    table = table_two([write.read(run)])
    assert {row.cells[1] for row in table.rows} == {"CIFAR-100"}
    assert OTHER_DATA not in table.notes


def test_an_evaluation_at_another_eps_is_no_row_of_table_two(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "adaptive", write.both, eps=0.2)
    write.evaluation(run, "adaptive", write.both, n_samples=1)
    write.evaluation(run, "adaptive", write.both, aggregation="logit-mean")
    assert not ours(table_two([write.read(run)]))


def test_a_single_attack_stands_for_itself(write: Any) -> None:
    # That an image is right less often unperturbed is chance; choosing it would flatter the attacker.
    run = write.run()
    write.evaluation(
        run, "pgd", {("defence", "none", None): [1, 2, 2, 2], ("defence", "pgd", "exact"): [2, 1, 2, 1]}
    )
    write.evaluation(
        run, "quick", {("defence", "none", None): [1, 2, 2, 2], ("defence", "pgd", "exact"): [2, 1, 2, 1]}
    )
    worst = {row.cells[-1]: values(row)[-2] for row in ours(table_two([write.read(run)]))}
    assert worst == {"measured, pgd": 0.75, "measured, quick": 0.625}


def test_random_noise_alone_is_no_row_of_its_own(write: Any) -> None:
    run = write.run()
    noise = {
        job: counts
        for job, counts in write.both.items()
        if job[:2] in (("defence", "none"), ("defence", "noise"))
    }
    write.evaluation(run, "noise", noise)
    attacked = {job: counts for job, counts in write.both.items() if job[1] != "noise"}
    write.evaluation(run, "pgd-eot", attacked)
    for table in (table_two, table_eighteen):
        assert [row.cells[-1] for row in ours(table([write.read(run)]))] == ["measured, pgd-eot"]
    assert len(write.read(run).evaluations) == 2


def test_failed_checks_and_the_published_view_are_never_silent(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "published", write.both, view="released", failed=["nan-gradients"])
    (row,) = ours(table_two([write.read(run)]))
    assert row.cells[-1] == "measured, as published†"
    assert str(row.trace).endswith(
        "† Sanity checks failed: nan-gradients. "
        "The exact view was not attacked by the adaptive protocol on these images"
    )
    exact = write.evaluation(run, "adaptive", write.both)
    rows = ours(table_two([write.read(run)]))
    assert [row.cells[-1] for row in rows] == ["measured, adaptive", "measured, as published†"]
    low, high = wilson(0.5, 4)
    assert str(rows[1].trace).endswith(
        f"Worst case on the exact view: 0.125 [{low:.2f}, {high:.2f}] ({exact.name})"
    )


def test_the_exact_number_of_other_images_does_not_count(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "published", write.both, view="released")
    write.evaluation(run, "adaptive", write.both, images="beef")
    assert "was not attacked" in str(ours(table_two([write.read(run)]))[1].trace)


def test_table_three_from_checks_and_from_an_evaluation_at_that_eps(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "adaptive", write.both, checks={"large-eps-attack": 0.03, "large-eps-noise": 0.9})
    write.evaluation(run, "pgd-eot", write.both, eps=0.95)
    write.evaluation(run, "pgd", write.both)
    table = table_three([write.read(run)])
    assert table.columns[4:] == ("other", "random noise", "chance", "figures")
    assert [values(row)[4:7] for row in ours(table)] == [[0.03, 0.9, 0.1], [0.5, 0.75, 0.1]]
    assert "Chance is 0.1, 0.01 and 0.005" in table.notes[0]


def test_table_eighteen_names_the_classifier(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "adaptive", write.both)
    (row,) = ours(table_eighteen([write.read(run)]))
    assert row.cells[1] == "digits-at (WideResNet-10-1)"
    assert values(row)[2:7] == [0.75, 0.25, 0.875, 0.375, 0.125]


def test_table_nineteen_tells_literature_from_paper_from_measured(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "adaptive", {job: [*counts] * 25 for job, counts in write.both.items()})
    few = write.evaluation(run, "quick", {job: [*counts] * 24 for job, counts in write.both.items()})
    table = table_nineteen([write.read(run)])
    sources = [row.source for row in table.rows]
    assert sources == ["measured", *["literature"] * 10, "paper", *["literature"] * 6, "paper"]
    assert [row.cells[-1] for row in table.rows] == ["measured, adaptive", *sources[1:]]
    assert values(table.rows[0])[3:5] == [0.875, 0.125]
    assert table.rows[11].cells[1:3] == ("Ours, of the paper", "CARSO (WideResNet-28-10)")
    assert str(few) not in str(table.traces)
    assert "Left out, of fewer than 100 images: 1 evaluation." in table.notes


def test_tables_are_chosen_by_the_papers_numbers(write: Any) -> None:
    run = write.run()
    result = report([run], reporter=SilentReporter(), tables=["19", "1", "19"])
    assert [table.number for table in result.tables] == ["19", "1"]
    with pytest.raises(
        UsageError, match="there is no table 'comparision' to draw; did you mean 'comparison'"
    ):
        report([run], reporter=SilentReporter(), tables=["comparision"])


def test_reused_perturbations_are_said_to_depart_from_the_paper(write: Any) -> None:
    run = write.read(write.run("pool", overrides=["training.attack_mix.reuse=4"]))
    (said,) = [note for note in table_one([run]).notes if "perturbed images" in note]
    assert "pool: perturbed images were kept for 4 epochs of training; the paper makes new ones" in said
    plain = write.read(write.run("plain"))
    assert not [note for note in table_one([plain]).notes if "perturbed images" in note]


OUTCOMES = {
    ("defence", "none", None): [2, 2, 2, 2],
    ("defence", "rand-aa", "exact"): [2, 2, 2, 0],
    ("defence", "transfer-logit-mean", "surrogate"): [1, 0, 2, 2],
    ("defence", "transfer-classifier", "surrogate"): [2, 2, 0, 2],
}
"""rand-aa 0.75; over the transfers 1, 0, 0, 2 of 2: 0.375; over everything 1, 0, 0, 0: 0.125."""


@pytest.fixture
def run(write: Any) -> Any:
    path = write.run()
    write.evaluation(path, "adaptive", OUTCOMES)
    write.evaluation(path, "adaptive", OUTCOMES, aggregation="logit-mean")
    flagged = ["zero-gradients"]
    write.evaluation(path, "adaptive", OUTCOMES, aggregation="majority-vote", unusable=1.0, failed=flagged)
    write.evaluation(path, "adaptive", OUTCOMES, aggregation="logit-mean", eps=0.2)
    return write.read(path)


def test_table_four_holds_the_rules_with_gradients_side_by_side(run: Any) -> None:
    table = table_four([run])
    (row,) = ours(table)
    found = dict(zip(table.columns, values(row), strict=True))
    assert found["C/Cl"] == found["C/Cl (L.A.)"] == 1.0
    assert found["C/Cl (P.A.)"] is None
    assert [found[name] for name in ("C/randAA", "transferred", "C worst")] == [0.75, 0.375, 0.125]
    assert "aggregation logit-mean | doubly-exponential" in str(row.trace)
    assert len([row for row in table.rows if row.source == "paper"]) == 2


def test_table_five_sets_transfers_beside_gradients_that_say_nothing(run: Any) -> None:
    table = table_five([run])
    (row,) = ours(table)
    assert row.cells[-1] == "measured, adaptive†"
    assert values(row)[2:7] == [1.0, 0.75, 0.375, 0.125, 1.0]
    assert "zero-gradients" in str(row.trace)
    assert [shown(cell) for cell in table.rows[1].cells[4:]] == ["–", "–", "> 0.99", "paper"]


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [("at", "at", "None"), ("clean", "at", "clean/AT"), ("at", "clean", "AT/clean")],
)
def test_table_seventeen_names_first_and_second(write: Any, first: str, second: str, kind: str) -> None:
    kinds = [f"representation.kind={first}", f"evaluation.second_kind={second}"]
    path = write.run(overrides=kinds)
    write.evaluation(path, "adaptive", OUTCOMES)
    table = table_seventeen([write.read(path)])
    (row,) = ours(table)
    assert row.cells[1] == kind
    assert values(row)[2:5] == [1.0, 0.75, 0.125]
    bound = [str(row.cells[3]) for row in table.rows if row.cells[:2] == ("CIFAR-10", "AT/clean")]
    assert bound == ["< 0.7070"]


def test_transferred_examples_of_the_ablation_count_and_join_the_worst_case(write: Any) -> None:
    path = write.run()
    outcomes = {("defence", "none", None): [2, 2, 2, 2], ("defence", "rand-aa", "exact"): [2, 2, 2, 0]}
    folder = write.evaluation(path, "rand-aa", outcomes, aggregation="majority-vote")
    source = write.transferred(path, {"logit-mean": [0, 0, 0, 0], "majority-vote": [1, 2, 0, 1]})
    row = ("majority-vote", folder, {"transferred": {"source": source}})
    write.ablation(path, "aggregations", [row])
    (measured,) = ours(table_five([write.read(path)]))
    # Transferred 1, 2, 0, 1 of 2; with rand-aa's 2, 2, 2, 0: 1, 2, 0, 0.
    assert values(measured)[2:6] == [1.0, 0.75, 0.5, 0.375]


def test_table_seventeen_takes_the_ablations_rows_and_each_evaluation_once(write: Any) -> None:
    path, other = write.run(), write.run("digits-first-clean", overrides=["representation.kind=clean"])
    own, varied = (write.evaluation(one, "adaptive", OUTCOMES) for one in (path, other))
    rows: list[Any] = [("clean/AT", varied, {}), ("AT/AT", own, {})]
    write.ablation(path, "first-second", rows)
    measured = ours(table_seventeen([write.read(path)]))
    assert [row.cells[1] for row in measured] == ["clean/AT", "None"]
    assert str(measured[0].trace).startswith(str(varied))


def test_what_else_was_attacked_makes_no_second_row(write: Any) -> None:
    path = write.run()
    alone = write.evaluation(path, "adaptive", OUTCOMES)
    both = {**OUTCOMES, ("classifier", "none", None): [1, 1, 1, 1], ("classifier", "aa", None): [0, 1, 1, 1]}
    wide = write.evaluation(path, "adaptive", both)
    for table in (table_two, table_seventeen, table_eighteen):
        (row,) = ours(table([write.read(path)]))
        assert str(row.trace).startswith(str(wide))
    # The row of an ablation comes first, and the run's own does not repeat it.
    write.ablation(path, "first-second", [("AT/AT", alone, {})])
    (row,) = ours(table_seventeen([write.read(path)]))
    assert str(row.trace).startswith(str(alone))


def test_protocols_of_one_ablation_stand_side_by_side(write: Any) -> None:
    path, other = write.run(), write.run("digits-first-clean", overrides=["representation.kind=clean"])
    evaluations = {attack: write.evaluation(other, attack, OUTCOMES) for attack in ("adaptive", "published")}
    for attack, folder in evaluations.items():
        write.ablation(path, "first-second", [("clean/AT", folder, {})], attack=attack)
        write.ablation(path, "eps", [("0.1", folder, {})], attack=attack)
    run = write.read(path)
    measured = ours(table_seventeen([run]))
    assert [row.cells[-1] for row in measured] == ["measured, adaptive", "measured, as published"]
    assert [str(row.trace).split(",")[0] for row in measured] == [str(one) for one in evaluations.values()]
    titles = [table.title for table in further_ablations([run])]
    assert titles == ["About eps, adaptive", "About eps, published"]


def test_every_table_has_an_anchor_of_its_own(write: Any) -> None:
    runs = []
    for name in ("one", "two"):
        path = write.run(name)
        for attack in ("adaptive", "published"):
            folder = write.evaluation(path, attack, OUTCOMES)
            title = "A title that has more words than five"
            write.ablation(path, "eps", [("0.1", folder, {})], attack=attack, title=title)
        runs.append(write.read(path))
    anchors = [table.anchor for table in further_ablations(runs)]
    assert len(set(anchors)) == len(anchors) == 4


def test_evaluations_are_chosen_or_left_out(write: Any) -> None:
    path = write.run()
    adaptive, pgd = (write.evaluation(path, attack, OUTCOMES) for attack in ("adaptive", "pgd"))
    write.ablation(path, "eps", [("0.1", adaptive, {}), ("0.2", pgd, {})])

    def traces(*names: str) -> list[str]:
        found = report([path], reporter=SilentReporter(), evaluations=names).tables
        tables = [table for table in found if table.number in ("", "2")]
        return [str(row.trace).partition(",")[0] for table in tables for row in ours(table)]

    assert traces() == [str(adaptive), str(pgd)] * 2
    assert traces("pgd") == traces("not adaptive") == traces(pgd.name) == [str(pgd)] * 2
    assert traces("not adaptive", f"not {pgd.name}") == []
    with pytest.raises(UsageError, match="no evaluation is named 'adaptiv'; did you mean 'adaptive'"):
        traces("not adaptiv")


def test_further_ablations_become_tables_of_their_own(write: Any) -> None:
    path = write.run()
    folder = write.evaluation(path, "adaptive", OUTCOMES, eps=0.2)
    rows = [("0", folder, {"eps": 0.0}), ("0.2", folder, {"eps": 0.2})]
    write.ablation(path, "eps", rows, note="a tenth of the budget")
    write.ablation(path, "aggregations", [])
    (table,) = further_ablations([write.read(path)])
    assert (table.number, table.title, table.notes) == ("", "About eps, adaptive", ("a tenth of the budget",))
    assert table.anchor == "about-eps-adaptive"
    assert table.columns[2] == "eps"
    assert [(row.cells[2], *values(row)[3:]) for row in table.rows] == [
        ("0", 1.0, 1.0, 1.0),
        ("0.2", 1.0, 0.125, None),
    ]
