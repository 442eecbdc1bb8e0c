"""What an audit returns: its text, its page, its table."""

from __future__ import annotations

import importlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from carso_cli.cli.audit_tables import audit_tables
from carso_cli.cli.console import output
from carso_cli.evaluation.audit_report import AuditReport
from carso_cli.evaluation.result import EvaluationResult
from carso_cli.runs.records import Record
from carso_cli.runtime.third_party import prepare, quiet

Capture = pytest.CaptureFixture[str]
NASTY = "<script>alert(1)</script>&\x1b[2J"


def check(name: str, passed: bool | None, meaning: str = "what it means") -> dict[str, Any]:
    value = None if passed is None else 0.25
    bound = None if passed is None else "at most"
    return {
        "name": name, "value": value, "threshold": None if passed is None else 0.1, "bound": bound,
        "passed": passed, "meaning": meaning,
    }  # fmt: skip


def summary(**changes: Any) -> dict[str, Any]:
    found = {
        "name": "model.py:build",
        "n_images": 200,
        "eps": 8 / 255,
        "norm": "linf",
        "seed": 0,
        "budget": "standard",
        "clean": {"accuracy": 0.95, "ci95": [0.91, 0.97]},
        "robust": {"accuracy": 0.43, "ci95": [0.36, 0.5]},
        "trusted": False,
        "verdict": "not trusted: the output's gradient is wrong",
        "broken_by": [
            {"attack": "square", "source": None, "images": 4},
            {"attack": "apgd-targeted", "source": "graft conv", "images": 100},
            {"attack": "noise", "source": None, "images": 0},
        ],
        "attacks": [
            {"attack": "apgd-targeted", "source": "graft conv", "accuracy": 0.45, "ci95": [0.38, 0.52],
             "seconds": 12.5},
            {"attack": "square", "source": None, "accuracy": 0.9, "ci95": None, "seconds": 2.0},
        ],
        "checks": [
            check("fine", True), check("unknown", None), check("gradient", False, "it points elsewhere"),
        ],
        "facts": {"random": False, "probabilities": True, "sources": ["output", "graft conv"]},
        "settings": {"carso": "0.1.0", "identity": {"eps": 0.03}},
        "seconds": 15.0,
    }  # fmt: skip
    return {**found, **changes}


def test_numbers_and_first_line() -> None:
    report = AuditReport(summary(), [])
    assert (report.accuracy, report.ci95, report.clean_accuracy) == (0.43, (0.36, 0.5), 0.95)
    assert (report.n_images, report.trusted, report.threat) == (200, False, "linf, eps 8/255")
    first, *rest = repr(report).splitlines()
    assert first == (
        "robust accuracy 0.430 [0.36, 0.50] on 200 images: not trusted: the output's gradient is wrong"
    )
    assert rest[1] == "images broken first by: apgd-targeted on graft conv 100, square 4"
    assert rest[2] == "failed: gradient: it points elsewhere"
    assert [one["name"] for one in report.checks] == ["gradient", "unknown", "fine"]
    assert AuditReport(summary(eps=0.1, norm="l2"), []).threat == "l2, eps 0.1"


def test_the_record_of_robustbenchs_leaderboard(tmp_path: Path) -> None:
    file = tmp_path / "Mine2026.json"
    found = AuditReport(summary(), []).to_robustbench("cifar10", file)
    assert json.loads(file.read_text()) == found
    # The keys of its files, and percentages as texts, of which it takes `external` before AutoAttack's.
    assert set(found) == {
        *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue"),
        *("architecture", "eps", "clean_acc", "reported", "external", "footnote", "unreliable"),
    }
    assert (found["dataset"], found["eps"], found["clean_acc"]) == ("cifar10", "8/255", "95.00")
    assert (found["external"], found["unreliable"]) == ("43.00", True)
    assert "43.00 % [36.00, 50.00] (linf, 200 images, budget standard); not trusted: the" in found["footnote"]
    # RobustBench itself chooses the accuracy that it ranks by.
    prepare()
    with quiet():
        utils = importlib.import_module("robustbench.utils")
    fields = {one.value: names for one, names in utils.ACC_FIELDS.items()}
    assert utils.get_key(found, fields["Linf"]) == 43.0
    assert AuditReport(summary(trusted=True), []).to_robustbench("cifar10")["unreliable"] is False


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or (value or "").startswith("http") for name, value in attrs)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_page_that_opens_offline(tmp_path: Path) -> None:
    report = AuditReport(summary(), [])
    page = report.to_html(tmp_path / "audit.html")
    assert (tmp_path / "audit.html").read_text() == page
    reader = _Reader()
    reader.feed(page)
    assert "default-src 'none'" in page
    assert "script" not in reader.tags
    text = " ".join(" ".join(reader.text).split())
    assert report.headline in text
    assert "1 passed, 1 failed, 1 not run." in text
    assert text.index("What broke it") < text.index("Checks")
    part = report._repr_html_()
    assert "<html" not in part
    assert "it points elsewhere" in part


@pytest.mark.parametrize("where", ["name", "verdict", "attack", "meaning", "facts", "settings"])
def test_texts_are_escaped(where: str) -> None:
    cases: dict[str, dict[str, Any]] = {
        "name": {"name": NASTY},
        "verdict": {"verdict": NASTY},
        "attack": {"broken_by": [{"attack": NASTY, "source": NASTY, "images": 1}]},
        "meaning": {"checks": [check(NASTY, False, NASTY)]},
        "facts": {"facts": {NASTY: [NASTY], "b": NASTY}},
        "settings": {"settings": {"identity": {NASTY: NASTY}}},
    }
    page = AuditReport(summary(**cases[where]), []).to_html()
    assert "<script" not in page
    assert "alert(1)" in page


def test_records_as_a_table() -> None:
    values = {
        "job": "a", "block": 0, "index": 7, "label": 3, "target": "model", "attack": "square",
        "part": "square", "view": None, "aggregation": None, "n_samples": None, "eps": 0.1,
        "norm": "linf", "seed": 0, "draws": 2,
        "correct": 1, "correct_selection": None, "majority_correct": False, "margin": None,
        "clean_margin": None, "loss": 0.5, "distance": 0.1, "disagreements": 0, "certain": False,
        "settled": False, "settled_by": None,
    }  # fmt: skip
    frame = AuditReport(summary(), [Record.from_dict(values)]).to_frame()
    assert frame.loc[0, "index"] == 7
    assert frame.loc[0, "loss"] == 0.5
    assert "broken" in frame.columns
    empty = AuditReport(summary(), []).to_frame()
    assert list(empty.columns) == list(frame.columns)


def test_failed_checks_come_first_and_passed_ones_are_counted(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for part in audit_tables(AuditReport(summary(), [])):
        output().print(part)
    told = capsys.readouterr().out
    assert told.index("apgd-targeted") < told.index("square") < told.index("failed check")
    assert "it points elsewhere" in told
    assert "checks: 1 failed, 1 passed, 1 not run (unknown)" in told
    assert "fine" not in told
    assert max(len(line.rstrip()) for line in told.splitlines()) <= 80


def test_an_evaluation_is_its_summary_with_a_table() -> None:
    row: dict[str, Any] = {
        "target": "defence", "attack": "<b>pgd</b>", "view": None, "n_samples": 8, "eps": 0.1, "norm": "linf",
        "accuracy": 0.25, "ci95": [0.1, 0.5], "n_images": 20, "gradients": {},
    }  # fmt: skip
    stored = {
        "label": "pgd <i>", "n_images": 20, "results": [row],
        "headline": {"accuracy": 0.25, "ci95": [0.1, 0.5]},
        "failed": ["in-ball"], "verdict": "not trusted: an example leaves the ball",
    }  # fmt: skip
    found = EvaluationResult(stored)
    assert found == stored
    assert json.loads(json.dumps(found)) == stored
    assert (found.accuracy, found.ci95, found.trusted) == (0.25, (0.1, 0.5), False)
    assert found.to_frame().loc[0, ["accuracy", "ci95_low", "ci95_high"]].tolist() == [0.25, 0.1, 0.5]
    shown = found._repr_html_()
    assert "0.250 [0.10, 0.50] on 20 images: not trusted: an example leaves the ball" in shown
    assert "<i>" not in shown
    assert "<b>" not in shown
