"""The table of variants: what is compared with what, and the paired differences."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from carso_cli.reports.comparison import comparison_tables
from carso_cli.reports.load import read_run
from carso_cli.reports.paper_tables import table_one, table_two
from carso_cli.reports.render import to_csv
from carso_cli.reports.report import draw_tables
from carso_cli.reports.table import Figure, ReportTable
from carso_cli.runs.intervals import paired_difference
from carso_cli.runtime.reporter import SilentReporter

Runs = tuple[Path, Path, Path]
TUNED = {("defence", "none", None): [2, 2, 2, 2], ("defence", "pgd-eot", "exact"): [2, 1, 1, 1]}
LONGER = {("classifier", "none", None): [1, 1, 1, 1], ("classifier", "pgd-eot", None): [1, 0, 1, 0]}
PLAIN = {
    ("classifier", "none", None): [1, 1, 1, 0],
    ("classifier", "pgd-eot", None): [1, 0, 0, 0],
    ("defence", "none", None): [2, 2, 2, 1],
    ("defence", "pgd-eot", "exact"): [0, 1, 0, 0],
}
DEFENCE = {"classifier": "c0", "second_classifier": "c0"}
ALONE = {"second_classifier": None, "purifier": None, "n_samples": None}
START = "training.initial=a.safetensors"
BEYOND = "beyond the paper (adversarial)"


def drawn(*paths: Path) -> ReportTable:
    (table,) = comparison_tables([read_run(path, SilentReporter()) for path in paths])
    return table


def cells(table: ReportTable, row: int) -> list[str]:
    return [
        "–" if cell is None else cell.main if isinstance(cell, Figure) else cell
        for cell in table.rows[row].cells
    ]


def labels(table: ReportTable) -> list[str]:
    return [cells(table, row)[0] for row in range(len(table.rows))]


@pytest.fixture
def runs(write: Any) -> Runs:
    """A plain run with its classifier, a fine-tuned one, and a longer trained classifier."""
    plain, longer = write.run("plain"), write.run("longer")
    tuned = write.run("tuned", overrides=["training.objective=adversarial", START])
    write.evaluation(plain, "pgd-eot", PLAIN, **DEFENCE)
    write.evaluation(tuned, "pgd-eot", TUNED, **DEFENCE, purifier="dcba")
    write.evaluation(longer, "pgd-eot", LONGER, classifier="c1", **ALONE)
    return plain, tuned, longer


def test_every_model_is_compared_with_every_classifier(runs: Runs) -> None:
    table = drawn(*runs)
    assert table.heading == "Comparison 1, image by image: pgd-eot, 4 images, eps 0.1 linf"
    assert table.columns == ("model, measured", "clean", "attacked", "minus [A]", "minus [B]")
    assert [cells(table, row) for row in range(4)] == [
        ["[A] plain: classifier alone", "0.750", "0.250", "–", "-0.250"],
        ["plain: N 8, Z 32, 8 layers", "0.875", "0.125", "-0.125", "-0.375"],
        [f"tuned: N 8, Z 32, 8 layers; {BEYOND}", "1.000", "0.625", "+0.375", "+0.125"],
        ["[B] longer: classifier alone", "1.000", "0.500", "+0.250", "–"],
    ]
    difference = table.rows[2].cells[4]
    _, low, high = paired_difference([1.0, 0.5, 0.5, 0.5], [1.0, 0.0, 1.0, 0.0])
    assert isinstance(difference, Figure)
    assert (difference.low, difference.high) == (low, high)


@pytest.mark.parametrize(
    ("overrides", "phrase"),
    [
        ([START, "training.objective=adversarial"], BEYOND),
        (
            [START, "training.objective=both", "training.adversarial.trades_weight=6"],
            "beyond the paper (both, TRADES weight 6)",
        ),
        (["purifier.input_share=0.5"], "beyond the paper (0.5 of the input)"),
        (["purifier.latent_features=0"], "beyond the paper (no latent)"),
        ([START], "beyond the paper (trained on from another purifier)"),
        (["training.adversarial.trades_weight=6"], ""),
        (["training.attack_mix.adversarial_fraction=0.25"], ""),
    ],
)
def test_what_is_beyond_the_paper_is_named(write: Any, overrides: list[str], phrase: str) -> None:
    path = write.run("other", overrides=overrides)
    write.evaluation(path, "pgd-eot", PLAIN, **DEFENCE)
    run = write.read(path)
    assert run.beyond_the_paper == phrase
    for table, label in ((table_one([run]), "measured"), (table_two([run]), "measured, pgd-eot")):
        (row,) = [row for row in table.rows if row.trace]
        assert row.cells[-1] == f"{label}, {phrase}".removesuffix(", ")
    of_classifier, of_defence = labels(drawn(path))
    assert phrase in of_defence
    assert "beyond" not in of_classifier


def test_the_order_of_images_does_not_matter(write: Any, runs: Runs) -> None:
    turned = write.run("turned")
    records = write.evaluation(turned, "pgd-eot", LONGER, classifier="c2", **ALONE) / "records.jsonl"
    records.write_text("".join(f"{line}\n" for line in reversed(records.read_text().splitlines())))
    table = drawn(runs[1], runs[2], turned)
    assert cells(table, 2)[0] == "[B] turned: classifier alone"
    assert str(table.rows[0].cells[3]) == str(table.rows[0].cells[4])


@pytest.mark.parametrize(
    "other",
    [{"eps": 0.2}, {"images": "beef"}, {"draws": 4}, {"pgd_step_size": 0.5}, {"norm": "l2", "eps": 1.0}],
)
def test_other_images_or_another_attack_are_not_compared(
    write: Any, runs: Runs, other: dict[str, Any]
) -> None:
    threat = [f"threat.{key}={value}" for key, value in other.items() if key in ("eps", "norm")]
    apart = write.run("apart", overrides=threat)
    write.evaluation(apart, "pgd-eot", LONGER, classifier="c2", **ALONE, **other)
    assert drawn(*runs, apart) == drawn(*runs)


def test_a_view_that_saturates_is_not_compared(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "pgd-eot", PLAIN, **DEFENCE, view="released")
    assert not drawn(run).rows


def test_more_samples_are_another_row(write: Any, runs: Runs) -> None:
    write.evaluation(runs[1], "pgd-eot", TUNED, **DEFENCE, purifier="dcba", n_samples=16)
    assert labels(drawn(*runs))[2:4] == [f"tuned: N {count}, Z 32, 8 layers; {BEYOND}" for count in (8, 16)]


def test_it_is_drawn_where_there_is_something_to_compare(write: Any, runs: Runs) -> None:
    plain, tuned, _ = map(write.read, runs)
    titles = [table.title for table in draw_tables([plain])]
    assert titles[-1] == "Comparison 1, image by image: pgd-eot, 4 images, eps 0.1 linf"
    assert titles[:-1] == [table.title for table in draw_tables([tuned])]
    (asked,) = draw_tables([tuned], ["comparison"])
    assert not asked.rows


def test_each_attack_has_its_own_table(write: Any, runs: Runs) -> None:
    by_pgd = {("classifier", "none", None): [1, 1, 1, 1], ("classifier", "pgd", None): [1, 1, 0, 0]}
    for run, classifier in ((runs[2], "c1"), (runs[0], "c0")):
        write.evaluation(run, "pgd", by_pgd, classifier=classifier, **ALONE)
    tables = comparison_tables([write.read(path) for path in runs])
    assert [table.title.split(": ")[1].split(",")[0] for table in tables] == ["pgd", "pgd-eot"]
    assert [len(table.rows) for table in tables] == [2, 4]
    assert len({table.anchor for table in tables}) == 2


def test_defences_that_differ_in_more_than_weights_have_a_row_each(write: Any) -> None:
    others: list[tuple[str, list[str], dict[str, Any]]] = [
        ("plain", [], {}),
        ("share", ["purifier.input_share=0.5"], {}),
        ("rule", ["evaluation.aggregation=logit-mean"], {"aggregation": "logit-mean"}),
        ("second", ["evaluation.second_kind=clean"], {"second_classifier": "c9"}),
    ]
    paths = [write.run(name, overrides=overrides) for name, overrides, _ in others]
    for path, (_, _, facts) in zip(paths, others, strict=True):
        write.evaluation(path, "pgd-eot", PLAIN, **DEFENCE | facts)
    assert [label.split(":")[0] for label in labels(drawn(*paths))] == [
        *("[A] plain", "plain", "share", "rule", "second")
    ]


def test_more_classifiers_than_letters(write: Any) -> None:
    paths = [write.run(f"run-{place}") for place in range(28)]
    for place, path in enumerate(paths):
        write.evaluation(path, "pgd-eot", LONGER, classifier=f"c{place}", **ALONE)
    table = drawn(*paths)
    assert [cells(table, row)[0].split()[0] for row in (0, 25, 26, 27)] == ["[A]", "[Z]", "[AA]", "[AB]"]
    assert len(table.columns) == 3 + 28


def test_only_the_checked_model_bears_a_dagger(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "pgd-eot", PLAIN, **DEFENCE, failed=["zero-gradients"])
    assert [label.endswith("†") for label in labels(drawn(run))] == [False, True]


def test_ends_of_an_interval_keep_their_side_of_zero_and_csv_its_keys(write: Any, runs: Runs) -> None:
    assert str(Figure(0.018, -0.0012, 0.037, text="+0.018", interval_digits=3)) == "+0.018 [-0.001, 0.037]"
    by_pgd = {
        (target, attack.replace("pgd-eot", "pgd"), view): right
        for (target, attack, view), right in PLAIN.items()
    }
    write.evaluation(runs[0], "pgd", by_pgd, **DEFENCE)
    tables = comparison_tables([write.read(path) for path in runs])
    lines = [*csv.DictReader(io.StringIO(to_csv(tables)))]
    keys = [(line["table"], line["row"], line["column"]) for line in lines]
    assert len(set(keys)) == len(keys) == 19
