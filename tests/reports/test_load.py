"""What a report reads, and which contradictions it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from carso_cli.errors import StateError
from carso_cli.io.json_files import read_json, write_json
from carso_cli.reports.load import read_ablation, read_evaluation, read_run
from carso_cli.runtime.reporter import SilentReporter


class Warnings(SilentReporter):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def warning(self, message: str) -> None:
        self.heard.append(message)


def test_reading_changes_nothing_even_of_a_run_in_progress(write: Any) -> None:
    run = write.run()
    path = write.evaluation(run, "adaptive", write.both)
    for log in (run / "metrics.jsonl", path / "records.jsonl"):
        with open(log, "a") as stream:
            stream.write('{"epoch": 2, "lo')
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    found = read_run(run, SilentReporter())
    assert len(found.metrics) == 2
    assert len(found.evaluations) == 1
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_an_evaluation_that_is_not_complete_is_left_out_with_a_warning(write: Any) -> None:
    run = write.run()
    path = write.evaluation(run, "adaptive", write.both)
    (path / "summary.json").unlink()
    warnings = Warnings()
    assert read_run(run, warnings).evaluations == []
    assert warnings.heard == [f"left out: {path} is not complete"]


def test_a_summary_that_its_records_do_not_bear_out_is_refused(write: Any) -> None:
    path = write.evaluation(write.run(), "adaptive", write.both)
    summary = read_json(path / "summary.json")
    summary["results"][4]["accuracy"] = 0.9
    write_json(path / "summary.json", summary)
    with pytest.raises(StateError, match=r"defence/rand-aa an accuracy of 0\.375; its summary says 0\.9$"):
        read_evaluation(path)


def test_missing_records_are_noticed(write: Any) -> None:
    path = write.evaluation(write.run(), "adaptive", write.both)
    lines = (path / "records.jsonl").read_text().splitlines(keepends=True)
    (path / "records.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(StateError, match="3 records of 'defence/pgd-eot/exact' for 4 images"):
        read_evaluation(path)


def test_another_schema_is_refused_by_number(write: Any) -> None:
    path = write.evaluation(write.run(), "adaptive", write.both)
    summary = read_json(path / "summary.json")
    write_json(path / "summary.json", summary | {"schema": 99})
    with pytest.raises(StateError, match=r"has schema 99; this carso reads 1$"):
        read_evaluation(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"schema": 1}'])
def test_damaged_files_cost_one_evaluation_and_a_warning(write: Any, content: str) -> None:
    run = write.run()
    write.evaluation(run, "adaptive", write.both)
    path = write.evaluation(run, "pgd", write.both)
    (path / "summary.json").write_text(content)
    warnings = Warnings()
    assert [one.identity["attack"] for one in read_run(run, warnings).evaluations] == ["adaptive"]
    assert len(warnings.heard) == 1
    assert str(path) in warnings.heard[0]


def test_a_linked_folder_of_evaluations_is_read(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "adaptive", write.both)
    moved = (run / "evaluation").rename(run.parent / "elsewhere")
    (run / "evaluation").symlink_to(moved)
    (linked,) = moved.iterdir()
    (moved / "another").symlink_to(linked.rename(run.parent / "one"))
    found = read_run(run, SilentReporter())
    assert [one.identity["attack"] for one in found.evaluations] == ["adaptive"]


def test_protocols_come_first(write: Any) -> None:
    run = write.run()
    for attack in ("pgd", "apgd-ce", "quick", "published", "adaptive"):
        write.evaluation(run, attack, write.both)
    order = [one.identity["attack"] for one in read_run(run, SilentReporter()).evaluations]
    assert order == ["adaptive", "published", "quick", "apgd-ce", "pgd"]


def test_departures_from_the_recipe(write: Any) -> None:
    run = write.run()
    write.evaluation(run, "pgd", write.both, eps=0.2, n_samples=4)
    write.evaluation(run, "aa", {("classifier", "none", None): [1, 1]}, n_samples=None, aggregation=None)
    found = read_run(run, SilentReporter())
    assert [found.departures(one) for one in found.evaluations] == [set(), {"eps", "n_samples"}]


@pytest.mark.parametrize(("second_kind", "usual"), [("at", "pgd"), ("clean", "quick")])
def test_another_second_instance_is_a_departure(write: Any, second_kind: str, usual: str) -> None:
    run = write.run(overrides=[f"evaluation.second_kind={second_kind}"])
    write.evaluation(run, "pgd", write.both, classifier="cafe", second_classifier="cafe")
    write.evaluation(run, "quick", write.both, classifier="cafe", second_classifier="face")
    stored = read_run(run, SilentReporter())
    assert [one.identity["attack"] for one in stored.plain_evaluations] == [usual]
    assert {key for one in stored.evaluations for key in stored.departures(one)} == {"second_kind"}


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
def test_a_damaged_ablation_is_named(write: Any, change: dict[str, Any], message: str) -> None:
    file = write.ablation(write.run(), "eps", [])
    write_json(file, read_json(file) | change)
    with pytest.raises(StateError, match=message):
        read_ablation(file, {})


def test_transferred_examples_of_other_images_are_refused(write: Any) -> None:
    path = write.run()
    folder = write.evaluation(path, "adaptive", write.both)
    source = write.transferred(path, {"doubly-exponential": [1, 1]})
    file = write.ablation(path, "aggregations", [("d", folder, {"transferred": {"source": source}})])
    with pytest.raises(StateError, match="holds 2 records of 'doubly-exponential' for 4 images"):
        read_ablation(file, {})
