"""Tables 1, 2, 3, 18 and 19, against small fixed records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from carso_cli.errors import UsageError
from carso_cli.reports.report import read_stored_run, report
from carso_cli.reports.results import (
    NOTHING,
    OTHER_DATA,
    table_eighteen,
    table_nineteen,
    table_one,
    table_three,
    table_two,
)
from carso_cli.reports.stored import StoredRun
from carso_cli.reports.table import Figure, ReportTable, Row
from carso_cli.runs.intervals import wilson
from carso_cli.runtime.reporter import SilentReporter


@pytest.fixture
def read() -> Any:
    return lambda path: read_stored_run(path, SilentReporter())


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
    assert str(row.trace) == f"{run.path}/metrics.jsonl, seed 0, images an epoch 10"
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
        "† Trust checks failed: nan-gradients. "
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
    assert "pool: perturbed images were kept for 4 epochs of training; the paper makes them anew" in said
    plain = read(write_run("plain"))
    assert not [note for note in table_one([plain]).notes if "perturbed images" in note]
