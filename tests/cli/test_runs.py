"""`carso runs ls` and `carso attacks ls`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from carso_cli.attacks.registry import ATTACKS, DESCRIPTIONS, PROTOCOLS
from carso_cli.io.json_files import read_json, write_json, write_json_lines
from carso_cli.recipe.load import dump_recipe, load_recipe

STORED = Path(__file__).resolve().parents[1] / "stored_run" / "run"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A measured run, one without an evaluation, an unfinished one, a classifier's, an audit, and no run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    shutil.copytree(STORED, folder / "digits")
    for name in ("trained", "begun", "classifier", "notes"):
        (folder / name).mkdir()
        if name != "notes":
            (folder / name / "recipe.yaml").write_text(dump_recipe(load_recipe("digits", [f"name={name}"])))
    (folder / "trained" / "purifier.safetensors").touch()
    (folder / "begun" / "state.safetensors").touch()
    (folder / "classifier" / "classifier.safetensors").touch()
    write_json_lines(
        folder / "classifier" / "metrics.jsonl",
        [{"clean_accuracy": 0.1}, {"clean_accuracy": 0.9, "pgd_accuracy": 0.25}],
    )
    (folder / "audited").mkdir()
    robust = {"accuracy": 0.3, "ci95": [0.2, 0.4]}
    verdict = "not trusted: the gradients are masked"
    audit = {
        "name": "m.py:f",
        "budget": "quick",
        "n_images": 90,
        "clean": {"accuracy": 0.8, "ci95": [0.7, 0.9]},
    }
    write_json(folder / "audited" / "summary.json", {**audit, "robust": robust, "verdict": verdict})
    # Newest last, whatever the names.
    for age, name in enumerate(("audited", "classifier", "begun", "trained", "digits")):
        for file in (folder / name).rglob("*"):
            os.utime(file, (1_700_000_000 - age * 86400,) * 2)
    return folder


def test_ls_shows_figures_and_verdict_of_every_run(runs: Path, carso: Any) -> None:
    found = {Path(run["run"]).name: run for run in carso("runs", "ls", "--json").json}
    assert [*found] == ["digits", "trained", "begun", "classifier", "audited"]
    # The protocol counts, not the single attacks beside it.
    summary = read_json(runs / "digits" / "evaluation" / "adaptive-df6611b3" / "summary.json")
    assert found["digits"] == {
        "run": "runs/digits",
        "recipe": "digits",
        "when": "2023-11-10T22:13:20+00:00",
        "attack": "adaptive",
        "n_images": 4,
        "clean": {"accuracy": 1.0, "ci95": summary["results"][0]["ci95"]},
        "robust": {"accuracy": 0.0, "ci95": summary["headline"]["ci95"]},
        "verdict": "checks passed",
    }
    assert (found["trained"]["verdict"], found["trained"]["recipe"]) == ("not evaluated", "trained")
    assert found["begun"]["verdict"] == "not finished"
    assert found["classifier"]["clean"]["accuracy"] == 0.9
    assert found["classifier"]["robust"]["accuracy"] == 0.25
    assert found["audited"]["robust"]["accuracy"] == 0.3
    assert found["audited"]["verdict"].startswith("not trusted")


def test_ls_as_a_table_of_80_columns(runs: Path, carso: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = carso("runs", "ls").lines
    assert max(map(len, lines)) <= 80
    (digits,) = [line for line in lines if line.startswith("digits ")]
    assert digits.split()[:6] == ["digits", "2023-11-10", "1.000", "0.000", "[0.00,", "0.49]"]


def test_a_failed_check_stands_in_the_verdict(runs: Path, carso: Any) -> None:
    file = runs / "digits" / "evaluation" / "adaptive-df6611b3" / "summary.json"
    write_json(file, {**read_json(file), "failed": ["gradient-free"]})
    assert carso("runs", "ls", "--json").json[-1]["verdict"] == "not trusted: gradient-free"


def test_a_single_attack_is_an_upper_bound(runs: Path, carso: Any) -> None:
    file = runs / "digits" / "evaluation" / "adaptive-df6611b3" / "summary.json"
    checks = [{"passed": True, "value": 0.0}, {"passed": None, "value": None}, {"passed": None, "value": 1.0}]
    write_json(file, {**read_json(file), "attack": "quick", "failed": [], "checks": checks})
    for single in (runs / "digits" / "evaluation").glob("pgd*/summary.json"):
        single.unlink()
    verdict = carso("runs", "ls", "--json").json[-1]["verdict"]
    assert verdict == "upper bound: no check failed, 1 not run"


def test_a_damaged_run_hides_no_other(runs: Path, carso: Any) -> None:
    (runs / "digits" / "evaluation" / "adaptive-df6611b3" / "summary.json").write_text("{")
    found = {Path(run["run"]).name: run for run in carso("runs", "ls", "--json").json}
    assert found["digits"]["verdict"].startswith("damaged: cannot read")
    assert len(found) == 5


def test_no_runs_are_told(tmp_path: Path, carso: Any) -> None:
    assert carso("runs", "ls", tmp_path / "nowhere").out == f"no runs in {tmp_path / 'nowhere'}\n"


def test_every_attack_and_protocol_is_listed(carso: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert {*DESCRIPTIONS} == {*ATTACKS}
    shown = carso("attacks", "ls")
    assert max(map(len, shown.lines)) <= 80
    assert {*ATTACKS, *PROTOCOLS} <= {line.split()[0] for line in shown.lines if line.strip()}
    listed = {attack["name"]: attack for attack in carso("attacks", "ls", "--json").json["attacks"]}
    assert (listed["aa"]["classifier"], listed["aa"]["defence"]) == (True, False)
    assert listed["pgd-eot"]["protocols"] == ["adaptive", "published", "quick"]
