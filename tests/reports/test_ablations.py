"""Tables 4, 5 and 17, against small fixed records."""

from __future__ import annotations

from typing import Any

import pytest

from carso_cli.errors import StateError
from carso_cli.io.json_files import read_json, write_json
from carso_cli.reports.ablated import read_ablation
from carso_cli.reports.ablations import further_ablations, table_five, table_four, table_seventeen
from carso_cli.reports.report import read_stored_run
from carso_cli.reports.table import Figure, ReportTable, Row
from carso_cli.runtime.reporter import SilentReporter

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
    return read_stored_run(path, SilentReporter())


def ours(table: ReportTable) -> list[Row]:
    return [row for row in table.rows if row.source == "measured"]


def values(row: Row) -> list[float | None]:
    return [cell.value if isinstance(cell, Figure) else None for cell in row.cells]


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
    table = table_seventeen([read_stored_run(path, SilentReporter())])
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
    (measured,) = ours(table_five([read_stored_run(path, SilentReporter())]))
    # Transferred 1, 2, 0, 1 of 2; with rand-aa's 2, 2, 2, 0: 1, 2, 0, 0.
    assert values(measured)[2:6] == [1.0, 0.75, 0.5, 0.375]


def test_table_seventeen_takes_the_ablations_rows_and_each_evaluation_once(
    write_run: Any, write_evaluation: Any, write_ablation: Any
) -> None:
    path, other = write_run(), write_run("digits-first-clean", overrides=["representation.kind=clean"])
    own, varied = (write_evaluation(one, "adaptive", OUTCOMES) for one in (path, other))
    rows: list[Any] = [("clean/AT", {"first": "clean", "second": "at"}, varied, {}), ("AT/AT", {}, own, {})]
    write_ablation(path, "first-second", rows)
    measured = ours(table_seventeen([read_stored_run(path, SilentReporter())]))
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
    run = read_stored_run(path, SilentReporter())
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
    (table,) = further_ablations([read_stored_run(path, SilentReporter())])
    assert (table.number, table.title, table.notes) == ("", "About eps, adaptive", ("a tenth of the budget",))
    assert table.anchor == "about-eps-adaptive"
    assert table.columns[2] == "eps"
    assert [(row.cells[2], *values(row)[3:]) for row in table.rows] == [
        ("0", 1.0, 1.0, 1.0),
        ("0.2", 1.0, 0.125, None),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 7}, "has schema 7; this carso reads 1"),
        ({"rows": [{"label": "a"}]}, "lacks or misplaces 'evaluation'"),
        (
            {"rows": [{"label": "a", "evaluation": "evaluation/gone"}]},
            "evaluation/gone of row 'a' is not complete",
        ),
    ],
)
def test_a_damaged_ablation_is_named(
    change: dict[str, Any], message: str, write_run: Any, write_ablation: Any
) -> None:
    file = write_ablation(write_run(), "eps", [])
    write_json(file, read_json(file) | change)
    with pytest.raises(StateError, match=message):
        read_ablation(file, {})


def test_transferred_examples_of_other_images_are_refused(
    write_run: Any, write_evaluation: Any, write_ablation: Any, write_transferred: Any
) -> None:
    path = write_run()
    folder = write_evaluation(path, "adaptive", OUTCOMES)
    source = write_transferred(path, {"doubly-exponential": [1, 1]})
    file = write_ablation(path, "aggregations", [("d", {}, folder, {"transferred": {"source": source}})])
    with pytest.raises(StateError, match="holds 2 records of 'doubly-exponential' for 4 images"):
        read_ablation(file, {})
