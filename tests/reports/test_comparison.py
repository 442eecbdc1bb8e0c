"""The table of variants: what is compared with what, and the paired differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from carso_cli.reporter import SilentReporter
from carso_cli.reports.comparison import comparison_table
from carso_cli.reports.results import table_two
from carso_cli.reports.table import Figure, ReportTable
from carso_cli.reports.tables import draw_tables
from carso_cli.runs.intervals import paired_difference
from carso_cli.workflows.report import read_stored_run

FINE_TUNED = {
    ("defence", "none", None): [2, 2, 2, 2],
    ("defence", "pgd-eot", "exact"): [2, 1, 1, 1],
}
LONGER = {("classifier", "none", None): [1, 1, 1, 1], ("classifier", "pgd-eot", None): [1, 0, 1, 0]}
PLAIN = {
    ("classifier", "none", None): [1, 1, 1, 0],
    ("classifier", "pgd-eot", None): [1, 0, 0, 0],
    ("defence", "none", None): [2, 2, 2, 1],
    ("defence", "pgd-eot", "exact"): [0, 1, 0, 0],
}


def drawn(*paths: Path) -> ReportTable:
    return comparison_table([read_stored_run(path, SilentReporter()) for path in paths])


def cells(table: ReportTable, row: int) -> list[str]:
    return [
        "–" if cell is None else cell.main if isinstance(cell, Figure) else cell
        for cell in table.rows[row].cells
    ]


@pytest.fixture
def runs(write_run: Any, write_evaluation: Any) -> tuple[Path, Path, Path]:
    """A plain run with its classifier, a fine-tuned one, and a longer trained classifier."""
    plain = write_run("plain")
    write_evaluation(plain, "pgd-eot", PLAIN, classifier="c0", second_classifier="c0")
    tuned = write_run("tuned", overrides=["training.objective=adversarial", "training.initial=a.safetensors"])
    write_evaluation(tuned, "pgd-eot", FINE_TUNED, classifier="c0", second_classifier="c0", purifier="dcba")
    longer = write_run("longer")
    write_evaluation(
        longer, "pgd-eot", LONGER, classifier="c1", second_classifier=None, purifier=None, n_samples=None
    )
    return plain, tuned, longer


def test_every_model_is_set_against_every_classifier(runs: tuple[Path, Path, Path]) -> None:
    table = drawn(*runs)
    assert table.columns[2:] == ("model", "clean", "attacked", "minus plain", "minus longer")
    found = [cells(table, row)[2:] for row in range(4)]
    assert found == [
        ["classifier of plain, alone", "0.750", "0.250", "–", "-0.250"],
        ["plain, N 8, Z 32, 8 layers", "0.875", "0.125", "-0.125", "-0.375"],
        ["tuned, N 8, Z 32, 8 layers", "1.000", "0.625", "+0.375", "+0.125"],
        ["classifier of longer, alone", "1.000", "0.500", "+0.250", "–"],
    ]
    difference = table.rows[2].cells[6]
    _, low, high = paired_difference([1.0, 0.5, 0.5, 0.5], [1.0, 0.0, 1.0, 0.0])
    assert isinstance(difference, Figure)
    assert (difference.low, difference.high) == (low, high)


def test_what_is_beyond_the_paper_is_labelled_so(runs: tuple[Path, Path, Path]) -> None:
    table = drawn(*runs)
    beyond = "measured, pgd-eot, trained beyond the paper (adversarial)"
    assert [cells(table, row)[1] for row in range(4)] == [
        *("measured, pgd-eot", "measured, pgd-eot", beyond, "measured, pgd-eot")
    ]
    (row,) = [row for row in table_two([read_stored_run(runs[1], SilentReporter())]).rows if row.trace]
    assert row.cells[1] == beyond


def test_the_order_of_images_does_not_matter(
    runs: tuple[Path, Path, Path], write_run: Any, write_evaluation: Any
) -> None:
    turned = write_run("turned")
    path = write_evaluation(
        turned, "pgd-eot", LONGER, classifier="c2", second_classifier=None, purifier=None, n_samples=None
    )
    records = path / "records.jsonl"
    records.write_text("".join(f"{line}\n" for line in reversed(records.read_text().splitlines())))
    table = drawn(runs[1], runs[2], turned)
    assert table.columns[5:] == ("minus longer", "minus turned")
    assert str(table.rows[0].cells[5]) == str(table.rows[0].cells[6])


@pytest.mark.parametrize(
    "other", [{"eps": 0.2}, {"images": "beef"}, {"draws": 4}, {"pgd_step_size": 0.5}, {"norm": "l2"}]
)
def test_other_images_or_another_attack_are_not_compared(
    runs: tuple[Path, Path, Path], write_run: Any, write_evaluation: Any, other: dict[str, Any]
) -> None:
    apart = write_run(
        "apart", overrides=[f"threat.{key}={value}" for key, value in other.items() if key in ("eps", "norm")]
    )
    write_evaluation(
        apart,
        "pgd-eot",
        LONGER,
        classifier="c2",
        second_classifier=None,
        purifier=None,
        n_samples=None,
        **other,
    )
    table = drawn(*runs, apart)
    assert table == drawn(*runs)


def test_a_view_that_saturates_is_not_compared(write_run: Any, write_evaluation: Any) -> None:
    run = write_run()
    write_evaluation(run, "pgd-eot", PLAIN, classifier="c0", second_classifier="c0", view="released")
    assert not drawn(run).rows


def test_more_samples_are_another_row(runs: tuple[Path, Path, Path], write_evaluation: Any) -> None:
    write_evaluation(
        runs[1], "pgd-eot", FINE_TUNED, classifier="c0", second_classifier="c0", purifier="dcba", n_samples=16
    )
    labels = [cells(drawn(*runs), row)[2] for row in range(5)]
    assert labels[2:4] == ["tuned, N 8, Z 32, 8 layers", "tuned, N 16, Z 32, 8 layers"]


def test_it_is_drawn_where_there_is_something_to_compare(runs: tuple[Path, Path, Path]) -> None:
    plain, tuned, _ = (read_stored_run(path, SilentReporter()) for path in runs)
    titles = [table.title for table in draw_tables([plain])]
    assert titles[-1] == "Variants and classifiers, compared image by image"
    assert titles[:-1] == [table.title for table in draw_tables([tuned])]
    (asked,) = draw_tables([tuned], ["comparison"])
    assert not asked.rows
