"""A run that version 0.1.0 wrote is read, reported and evaluated as it was then.

`stored_run/run` is that version's folder but for the states of training; the large tensors of its purifier
were rounded to three values per channel and trained on, so that they compress. `expected.json` is what that
version made of it: log P of the first four test images under stored latents, and the figures of its report.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from carso_cli import load_defence
from carso_cli.build import load_images
from carso_cli.cli.app import run as carso
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.recipe.load import load_recipe

EXPECTED: dict[str, Any] = json.loads(
    Path(__file__).with_name("stored_run").joinpath("expected.json").read_text()
)
ADAPTIVE = "evaluation/adaptive-df6611b3"
# What the rounding of another processor can change, where the sign of a small gradient decides. The rest of
# a record says which image was attacked how, and is the same everywhere.
MEASURED = {
    *("correct", "correct_selection", "majority_correct", "margin", "clean_margin", "loss", "distance"),
    *("disagreements", "certain", "settled", "settled_by"),
}


@pytest.fixture
def run(stored_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(stored_run, tmp_path / "run")


def call(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert carso([*words]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def evaluate(capsys: pytest.CaptureFixture[str], attack: str, *more: str) -> dict[str, Any]:
    words = ("evaluate", "--run", "run", "--limit", "4", "--device", "cpu", "--json", "--attack", attack)
    return call(capsys, *words, *more)


def test_the_defence_gives_the_stored_log_p(run: Path) -> None:
    images = load_images(load_recipe(str(run / "recipe.yaml")), "test", limit=4).pixels(slice(None))
    log_p = load_defence(run, device="cpu")(images, latents=torch.tensor(EXPECTED["latents"]))
    torch.testing.assert_close(log_p, torch.tensor(EXPECTED["log_p"]), rtol=1e-3, atol=1e-3)


def test_its_report_holds_the_same_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Columns have moved since, and rows of Table 4 stand side by side: it is the figures that must stay.
    found: dict[str, set[tuple[Any, ...]]] = {}
    for table in call(capsys, "report", "run", "--format", "json")["tables"]:
        cells = [cell for row in table["rows"] if row["source"] == "measured" for cell in row["cells"]]
        both = [one for cell in cells if type(cell) is dict for one in (cell, cell["beside"])]
        figures = {
            tuple(one[key] for key in ("value", "low", "high", "unit"))
            for one in both
            if one is not None and one["value"] is not None
        }
        if figures:
            found.setdefault(str(table["number"]), set()).update(figures)
    expected = {
        number: {tuple(cell) for rows in tables for row in rows for cell in row}
        for number, tables in EXPECTED["tables"].items()
        # Four images are too few to stand among the literature's figures.
        if number != "19"
    }
    assert found == expected


def test_an_older_result_is_not_taken_for_a_new_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.read_bytes() for path in (run / ADAPTIVE).iterdir()}
    assert carso(["evaluate", "--run", "run", "--limit", "4", "--device", "cpu", "--resume"]) == 5
    shown = capsys.readouterr().err
    assert "version was None, now 3" in shown
    assert "stored by an earlier version" in shown
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.slow
def test_evaluated_again_its_attacks_find_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = read_json(run / ADAPTIVE / "summary.json")
    new = evaluate(capsys, "adaptive")
    (folder,) = set((run / "evaluation").glob("adaptive-*")) - {run / ADAPTIVE}
    assert read_json(folder / "summary.json")["label"].endswith("version 3")
    # Attacks that came later break some images before these are reached.
    found = {(one["job"], one["index"]): one for one in read_json_lines(folder / "records.jsonl")}
    stored = {(one["job"], one["index"]): one for one in read_json_lines(run / ADAPTIVE / "records.jsonl")}
    assert set(stored) <= set(found)
    for place, before in stored.items():
        record = found[place]
        if record["settled"] != before["settled"]:
            continue
        # AutoAttack names the part that fooled an image.
        record["part"] = before["part"] if record["attack"] == "aa" else record["part"]
        assert record.keys() == before.keys()
        assert {key: record[key] for key in record.keys() - MEASURED} == {
            key: before[key] for key in before.keys() - MEASURED
        }
        assert 0 <= record["correct"] <= record["draws"]
        assert record["distance"] <= record["eps"] + 1e-6
        assert record["clean_margin"] == pytest.approx(before["clean_margin"], rel=1e-3, abs=1e-3)
        if record["attack"] == "none":
            assert record["correct"] == before["correct"]
            assert record["loss"] == pytest.approx(before["loss"], rel=1e-3, abs=1e-3)
    # Every image is right without an attack and fooled by many of them, far from where rounding decides.
    after = {(row["target"], row["attack"]): row["accuracy"] for row in new["results"]}
    for row in old["results"]:
        assert after[row["target"], row["attack"]] <= row["accuracy"]
