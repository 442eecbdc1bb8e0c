"""Tables 1, 2, 3, 18 and 19, against small fixed records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from carso_cli.errors import UsageError
from carso_cli.reports.load import StoredRun, read_run
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


@pytest.fixture
def read() -> Any:
    return lambda path: read_run(path, SilentReporter())


def ours(table: ReportTable) -> list[Row]:
    return [row for row in table.rows if row.source == "measured"]


def values(row: Row) -> list[float | None]:
    return [cell.value if isinstance(cell, Figure) else None for cell in row.cells]


def test_table_one_is_the_runs_own_clock_beside_the_papers_minutes(write_run: Any, read: Any) -> None:
    run: StoredRun = read(write_run())
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


def test_table_two_holds_every_quantity_with_interval_and_record(
    write_run: Any, write_evaluation: Any, read: Any, both: Any
) -> None:
    run = write_run()
    path: Path = write_evaluation(run, "adaptive", both)
    table = table_two([read(run)])
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


def test_table_two_quotes_the_paper_and_the_literature_as_such(write_run: Any, read: Any) -> None:
    table = table_two([read(write_run())])
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


def test_a_run_of_a_scenario_stands_beside_that_scenario_only(
    write_run: Any, write_evaluation: Any, read: Any, both: Any
) -> None:
    run = write_run("c100", "cifar100")
    write_evaluation(run, "adaptive", both, eps=8 / 255)
    table = table_two([read(run)])
    assert {row.cells[0] for row in table.rows} == {"CIFAR-100"}
    assert OTHER_DATA not in table.notes


def test_an_evaluation_at_another_eps_is_no_row_of_table_two(
    write_run: Any, write_evaluation: Any, read: Any, both: Any
) -> None:
    run = write_run()
    write_evaluation(run, "adaptive", both, eps=0.2)
    write_evaluation(run, "adaptive", both, n_samples=1)
    write_evaluation(run, "adaptive", both, aggregation="logit-mean")
    assert not ours(table_two([read(run)]))


def test_a_single_attack_stands_for_itself(write_run: Any, write_evaluation: Any, read: Any) -> None:
    # That an image is right less often unperturbed is chance; choosing it would flatter the attacker.
    run = write_run()
    write_evaluation(
        run, "pgd", {("defence", "none", None): [1, 2, 2, 2], ("defence", "pgd", "exact"): [2, 1, 2, 1]}
    )
    write_evaluation(
        run, "quick", {("defence", "none", None): [1, 2, 2, 2], ("defence", "pgd", "exact"): [2, 1, 2, 1]}
    )
    worst = {row.cells[1]: values(row)[-1] for row in ours(table_two([read(run)]))}
    assert worst == {"measured, pgd": 0.75, "measured, quick": 0.625}


def test_random_noise_alone_is_no_row_of_its_own(
    write_run: Any, write_evaluation: Any, read: Any, both: Any
) -> None:
    run = write_run()
    noise = {
        job: counts for job, counts in both.items() if job[:2] in (("defence", "none"), ("defence", "noise"))
    }
    write_evaluation(run, "noise", noise)
    attacked = {job: counts for job, counts in both.items() if job[1] != "noise"}
    write_evaluation(run, "pgd-eot", attacked)
    for table in (table_two, table_eighteen):
        assert [row.cells[1] for row in ours(table([read(run)]))] == ["measured, pgd-eot"]
    assert len(read(run).evaluations) == 2


def test_failed_checks_and_the_published_view_are_never_silent(
    write_run: Any, write_evaluation: Any, read: Any, both: Any
) -> None:
    run = write_run()
    write_evaluation(run, "published", both, view="released", failed=["nan-gradients"])
    (row,) = ours(table_two([read(run)]))
    assert row.cells[1] == "measured, as published†"
    assert str(row.trace).endswith(
        "† Sanity checks failed: nan-gradients. "
        "The exact view was not attacked by the adaptive protocol on these images"
    )
    exact: Path = write_evaluation(run, "adaptive", both)
    rows = ours(table_two([read(run)]))
    assert [row.cells[1] for row in rows] == ["measured, adaptive", "measured, as published†"]
    low, high = wilson(0.5, 4)
    assert str(rows[1].trace).endswith(
        f"Worst case on the exact view: 0.125 [{low:.2f}, {high:.2f}] ({exact.name})"
    )


def test_the_exact_number_of_other_images_does_not_count(
    write_run: Any, write_evaluation: Any, read: Any, both: Any
) -> None:
    run = write_run()
    write_evaluation(run, "published", both, view="released")
    write_evaluation(run, "adaptive", both, images="beef")
    assert "was not attacked" in str(ours(table_two([read(run)]))[1].trace)


def test_table_three_from_checks_and_from_an_evaluation_at_that_eps(
    write_run: Any, write_evaluation: Any, read: Any, both: Any
) -> None:
    run = write_run()
    write_evaluation(run, "adaptive", both, checks={"large-eps-attack": 0.03, "large-eps-noise": 0.9})
    write_evaluation(run, "pgd-eot", both, eps=0.95)
    write_evaluation(run, "pgd", both)
    table = table_three([read(run)])
    assert [values(row)[2:] for row in ours(table)] == [[0.03, 0.9, 0.1], [0.5, 0.75, 0.1]]
    assert [row.cells[2] for row in table.rows[2:]] == [
        Figure(None, text=text) for text in ("< 0.047", "< 0.010", "about 0.0")
    ]


def test_table_eighteen_names_the_classifier(
    write_run: Any, write_evaluation: Any, read: Any, both: Any
) -> None:
    run = write_run()
    write_evaluation(run, "adaptive", both)
    table = table_eighteen([read(run)])
    (row,) = ours(table)
    assert row.cells[2] == "digits-at (WideResNet-10-1)"
    assert values(row)[3:] == [0.75, 0.25, 0.875, 0.375, 0.125]
    assert [str(cell) for cell in table.rows[1].cells] == [
        *("CIFAR-10", "paper", "Rebuffi et al. (2021)", "0.8733", "0.6075", "0.8152", "0.7070", "None")
    ]


def test_table_nineteen_tells_literature_from_paper_from_measured(
    write_run: Any, write_evaluation: Any, read: Any, both: Any
) -> None:
    run = write_run()
    write_evaluation(run, "adaptive", both)
    table = table_nineteen([read(run)])
    sources = [row.source for row in table.rows]
    assert sources == ["measured", *["literature"] * 10, "paper", *["literature"] * 6, "paper"]
    assert [row.cells[1] for row in table.rows] == ["measured, adaptive", *sources[1:]]
    assert values(table.rows[0])[4:6] == [0.875, 0.125]
    assert [str(cell) for cell in table.rows[1].cells[2:]] == [
        *("Bartoldson et al. (2024)", "WideResNet-94-16", "0.9368", "0.7371", "AT")
    ]


def test_tables_are_chosen_by_the_papers_numbers(write_run: Any) -> None:
    run = write_run()
    result = report([run], reporter=SilentReporter(), tables=["19", "1", "19"])
    assert [table.number for table in result.tables] == ["19", "1"]
    with pytest.raises(
        UsageError, match="there is no table 'comparision' to draw; did you mean 'comparison'"
    ):
        report([run], reporter=SilentReporter(), tables=["comparision"])


def test_reused_perturbations_are_said_to_depart_from_the_paper(write_run: Any, read: Any) -> None:
    run = read(write_run("pool", overrides=["training.attack_mix.reuse=4"]))
    (said,) = [note for note in table_one([run]).notes if "perturbed images" in note]
    assert "pool: perturbed images were kept for 4 epochs of training; the paper makes new ones" in said
    plain = read(write_run("plain"))
    assert not [note for note in table_one([plain]).notes if "perturbed images" in note]


OUTCOMES = {
    ("defence", "none", None): [2, 2, 2, 2],
    ("defence", "rand-aa", "exact"): [2, 2, 2, 0],
    ("defence", "transfer-logit-mean", "surrogate"): [1, 0, 2, 2],
    ("defence", "transfer-classifier", "surrogate"): [2, 2, 0, 2],
}
"""rand-aa 0.75; over the transfers 1, 0, 0, 2 of 2: 0.375; over everything 1, 0, 0, 0: 0.125."""


@pytest.fixture
def run(write_run: Any, write_evaluation: Any) -> Any:
    path = write_run()
    write_evaluation(path, "adaptive", OUTCOMES)
    write_evaluation(path, "adaptive", OUTCOMES, aggregation="logit-mean")
    flagged = ["zero-gradients"]
    write_evaluation(path, "adaptive", OUTCOMES, aggregation="majority-vote", unusable=1.0, failed=flagged)
    write_evaluation(path, "adaptive", OUTCOMES, aggregation="logit-mean", eps=0.2)
    return read_run(path, SilentReporter())


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
def test_table_seventeen_names_first_and_second(
    first: str, second: str, shown: str, write_run: Any, write_evaluation: Any
) -> None:
    kinds = [f"representation.kind={first}", f"evaluation.second_kind={second}"]
    path = write_run(overrides=kinds)
    write_evaluation(path, "adaptive", OUTCOMES)
    table = table_seventeen([read_run(path, SilentReporter())])
    (row,) = ours(table)
    assert row.cells[2] == shown
    assert values(row)[3:] == [1.0, 0.75, 0.125]
    bound = [str(row.cells[4]) for row in table.rows if row.cells[:3] == ("CIFAR-10", "paper", "AT/clean")]
    assert bound == ["< 0.7070"]


def test_transferred_examples_of_the_ablation_count_and_join_the_worst_case(
    write_run: Any, write_evaluation: Any, write_ablation: Any, write_transferred: Any
) -> None:
    path = write_run()
    outcomes = {("defence", "none", None): [2, 2, 2, 2], ("defence", "rand-aa", "exact"): [2, 2, 2, 0]}
    folder = write_evaluation(path, "rand-aa", outcomes, aggregation="majority-vote")
    source = write_transferred(path, {"logit-mean": [0, 0, 0, 0], "majority-vote": [1, 2, 0, 1]})
    row = ("majority-vote", {"aggregation": "majority-vote"}, folder, {"transferred": {"source": source}})
    write_ablation(path, "aggregations", [row])
    (measured,) = ours(table_five([read_run(path, SilentReporter())]))
    # Transferred 1, 2, 0, 1 of 2; with rand-aa's 2, 2, 2, 0: 1, 2, 0, 0.
    assert values(measured)[2:6] == [1.0, 0.75, 0.5, 0.375]


def test_table_seventeen_takes_the_ablations_rows_and_each_evaluation_once(
    write_run: Any, write_evaluation: Any, write_ablation: Any
) -> None:
    path, other = write_run(), write_run("digits-first-clean", overrides=["representation.kind=clean"])
    own, varied = (write_evaluation(one, "adaptive", OUTCOMES) for one in (path, other))
    rows: list[Any] = [("clean/AT", {"first": "clean", "second": "at"}, varied, {}), ("AT/AT", {}, own, {})]
    write_ablation(path, "first-second", rows)
    measured = ours(table_seventeen([read_run(path, SilentReporter())]))
    assert [row.cells[2] for row in measured] == ["clean/AT", "AT/AT"]
    assert str(measured[0].trace).startswith(str(varied))


def test_protocols_of_one_ablation_stand_side_by_side(
    write_run: Any, write_evaluation: Any, write_ablation: Any
) -> None:
    path, other = write_run(), write_run("digits-first-clean", overrides=["representation.kind=clean"])
    evaluations = {attack: write_evaluation(other, attack, OUTCOMES) for attack in ("adaptive", "published")}
    for attack, folder in evaluations.items():
        write_ablation(path, "first-second", [("clean/AT", {}, folder, {})], attack=attack)
        write_ablation(path, "eps", [("0.1", {"eps": 0.1}, folder, {})], attack=attack)
    run = read_run(path, SilentReporter())
    measured = ours(table_seventeen([run]))
    assert [row.cells[1] for row in measured] == ["measured, adaptive", "measured, as published"]
    assert [str(row.trace).split(",")[0] for row in measured] == [str(one) for one in evaluations.values()]
    titles = [table.title for table in further_ablations([run])]
    assert titles == ["About eps, adaptive", "About eps, published"]


def test_further_ablations_become_tables_of_their_own(
    write_run: Any, write_evaluation: Any, write_ablation: Any
) -> None:
    path = write_run()
    folder = write_evaluation(path, "adaptive", OUTCOMES, eps=0.2)
    rows = [("0", {"eps": 0.0}, folder, {"eps": 0.0}), ("0.2", {"eps": 0.2}, folder, {"eps": 0.2})]
    write_ablation(path, "eps", rows, note="a tenth of the budget")
    write_ablation(path, "aggregations", [])
    (table,) = further_ablations([read_run(path, SilentReporter())])
    assert (table.number, table.title, table.notes) == ("", "About eps, adaptive", ("a tenth of the budget",))
    assert table.anchor == "about-eps-adaptive"
    assert table.columns[2] == "eps"
    assert [(row.cells[2], *values(row)[3:]) for row in table.rows] == [
        ("0", 1.0, 1.0, 1.0),
        ("0.2", 1.0, 0.125, None),
    ]
