"""The paper's tables and further ablations, against small fixed records."""

from __future__ import annotations

from typing import Any

import pytest

from carso_cli.errors import UsageError
from carso_cli.reports.paper_tables import (
    NOTHING,
    OTHER_DATA,
    further_ablations,
    table_eighteen,
    table_five,
    table_four,
    table_nineteen,
    table_one,
    table_seventeen,
    table_three,
    table_two,
)
from carso_cli.reports.report import report
from carso_cli.reports.table import Figure, ReportTable, Row
from carso_cli.runs.intervals import wilson
from carso_cli.runtime.reporter import SilentReporter


def ours(table: ReportTable) -> list[Row]:
    return [row for row in table.rows if row.source == "measured"]


def values(row: Row) -> list[float | None]:
    return [cell.value if isinstance(cell, Figure) else None for cell in row.cells]


def test_table_one_is_the_runs_own_clock_beside_the_papers_minutes(write: Any) -> None:
    run = write.read(write.run())
    table = table_one([run])
    (row,) = ours(table)
    assert row.cells[0] == "digits"
    assert row.cells[2] == Figure(1.5, digits=1, unit="minutes")
    assert row.cells[3:] == ("2 of 2", "x86_64 CPU, 2 threads")
    assert str(row.trace) == f"{run.path}/metrics.jsonl, seed 0, images per epoch 10"
    assert [(row.cells[0], str(row.cells[2])) for row in table.rows[1:]] == [
        ("CIFAR-10", "159"),
        ("CIFAR-100", "138"),
        ("TinyImageNet-200", "213"),
    ]
    assert OTHER_DATA in table.notes


def test_table_two_holds_every_quantity_with_interval_and_record(write: Any) -> None:
    run = write.run()
    path = write.evaluation(run, "adaptive", write.both)
    table = table_two([write.read(run)])
    assert table.columns == (
        *("data", "figures", "AT/Cl", "C/Cl", "AT/AA", "C/randAA", "PGD+EoT", "AT worst", "C worst"),
    )
    (row,) = ours(table)
    assert row.cells[:2] == ("digits", "measured, adaptive")
    # Worst case by the selection draws of each image: 0, 1, 0, 0 of 2.
    assert values(row)[2:] == [0.75, 0.875, 0.25, 0.375, 0.5, 0.25, 0.125]
    low, high = wilson(0.5, 4)
    assert str(row.cells[8]) == f"0.125 [{low:.2f}, {high:.2f}]"
    assert str(row.trace) == (
        f"{path}, images 4, seed 3, eps 0.1 under linf, protocol adaptive (label of adaptive), view exact, "
        "N 8, aggregation doubly-exponential, draws 2"
    )


def test_table_two_quotes_the_paper_and_the_literature_as_such(write: Any) -> None:
    table = table_two([write.read(write.run())])
    assert NOTHING in table.notes
    assert not ours(table)
    shown = [(row.source, *map(str, row.cells[:2]), *map(str, row.cells[2:7])) for row in table.rows[:3]]
    assert shown == [
        ("paper", "CIFAR-10", "paper", "0.9216", "0.8686", "0.6773", "0.7613", "0.7689"),
        ("literature", "CIFAR-10", "literature, best AT", "None", "None", "0.7371", "None", "None"),
        (
            "literature",
            "CIFAR-10",
            "literature, best purification",
            "None",
            "None",
            "None",
            "0.7812",
            "0.6641",
        ),
    ]


def test_a_run_of_a_scenario_stands_beside_that_scenario_only(write: Any) -> None:
    run = write.run("c100", "cifar100")
    write.evaluation(run, "adaptive", write.both, eps=8 / 255)
    table = table_two([write.read(run)])
    assert {row.cells[0] for row in table.rows} == {"CIFAR-100"}
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
    worst = {row.cells[1]: values(row)[-1] for row in ours(table_two([write.read(run)]))}
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
        assert [row.cells[1] for row in ours(table([write.read(run)]))] == ["measured, pgd-eot"]
    assert len(write.read(run).evaluations) == 2


def test_failed_checks_and_the_published_view_are_never_silent(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "published", write.both, view="released", failed=["nan-gradients"])
    (row,) = ours(table_two([write.read(run)]))
    assert row.cells[1] == "measured, as published†"
    assert str(row.trace).endswith(
        "† Sanity checks failed: nan-gradients. "
        "The exact view was not attacked by the adaptive protocol on these images"
    )
    exact = write.evaluation(run, "adaptive", write.both)
    rows = ours(table_two([write.read(run)]))
    assert [row.cells[1] for row in rows] == ["measured, adaptive", "measured, as published†"]
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
    assert [values(row)[2:] for row in ours(table)] == [[0.03, 0.9, 0.1], [0.5, 0.75, 0.1]]
    assert [row.cells[2] for row in table.rows[2:]] == [
        Figure(None, text=text) for text in ("< 0.047", "< 0.010", "about 0.0")
    ]


def test_table_eighteen_names_the_classifier(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "adaptive", write.both)
    table = table_eighteen([write.read(run)])
    (row,) = ours(table)
    assert row.cells[2] == "digits-at (WideResNet-10-1)"
    assert values(row)[3:] == [0.75, 0.25, 0.875, 0.375, 0.125]
    assert [str(cell) for cell in table.rows[1].cells] == [
        *("CIFAR-10", "paper", "Rebuffi et al. (2021)", "0.8733", "0.6075", "0.8152", "0.7070", "None")
    ]


def test_table_nineteen_tells_literature_from_paper_from_measured(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "adaptive", write.both)
    table = table_nineteen([write.read(run)])
    sources = [row.source for row in table.rows]
    assert sources == ["measured", *["literature"] * 10, "paper", *["literature"] * 6, "paper"]
    assert [row.cells[1] for row in table.rows] == ["measured, adaptive", *sources[1:]]
    assert values(table.rows[0])[4:6] == [0.875, 0.125]
    assert [str(cell) for cell in table.rows[1].cells[2:]] == [
        *("Bartoldson et al. (2024)", "WideResNet-94-16", "0.9368", "0.7371", "AT")
    ]


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


def test_table_four_holds_the_rules_with_gradients_at_the_recipes_eps(run: Any) -> None:
    table = table_four([run])
    assert {row.cells[2] for row in ours(table)} == {"doubly-exponential", "logit-mean"}
    assert len(ours(table)) == 2
    assert values(ours(table)[0])[3:] == [1.0, 0.75, 0.375, 0.125]
    paper = [tuple(map(str, row.cells)) for row in table.rows if row.source == "paper"]
    assert paper[0] == ("CIFAR-10", "paper", "logit-mean", "0.8688", "0.0086", "None", "None")
    assert len(paper) == 6


def test_table_five_sets_transfers_beside_gradients_that_say_nothing(run: Any) -> None:
    table = table_five([run])
    (row,) = ours(table)
    assert row.cells[1] == "measured, adaptive†"
    assert values(row)[2:] == [1.0, 0.75, 0.375, 0.125, 1.0]
    assert "zero-gradients" in str(row.trace)
    assert [str(cell) for cell in table.rows[1].cells] == [
        *("CIFAR-10", "paper", "0.8691", "0.8602", "None", "None", "> 0.99")
    ]


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [("at", "at", "AT/AT"), ("clean", "at", "clean/AT"), ("at", "clean", "AT/clean")],
)
def test_table_seventeen_names_first_and_second(write: Any, first: str, second: str, shown: str) -> None:
    kinds = [f"representation.kind={first}", f"evaluation.second_kind={second}"]
    path = write.run(overrides=kinds)
    write.evaluation(path, "adaptive", OUTCOMES)
    table = table_seventeen([write.read(path)])
    (row,) = ours(table)
    assert row.cells[2] == shown
    assert values(row)[3:] == [1.0, 0.75, 0.125]
    bound = [str(row.cells[4]) for row in table.rows if row.cells[:3] == ("CIFAR-10", "paper", "AT/clean")]
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
    assert [row.cells[2] for row in measured] == ["clean/AT", "AT/AT"]
    assert str(measured[0].trace).startswith(str(varied))


def test_protocols_of_one_ablation_stand_side_by_side(write: Any) -> None:
    path, other = write.run(), write.run("digits-first-clean", overrides=["representation.kind=clean"])
    evaluations = {attack: write.evaluation(other, attack, OUTCOMES) for attack in ("adaptive", "published")}
    for attack, folder in evaluations.items():
        write.ablation(path, "first-second", [("clean/AT", folder, {})], attack=attack)
        write.ablation(path, "eps", [("0.1", folder, {})], attack=attack)
    run = write.read(path)
    measured = ours(table_seventeen([run]))
    assert [row.cells[1] for row in measured] == ["measured, adaptive", "measured, as published"]
    assert [str(row.trace).split(",")[0] for row in measured] == [str(one) for one in evaluations.values()]
    titles = [table.title for table in further_ablations([run])]
    assert titles == ["About eps, adaptive", "About eps, published"]


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
