"""`carso report`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from carso_cli.cli.app import run as carso

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(write: Any) -> Path:
    path: Path = write.run()
    write.evaluation(path, "adaptive", write.both, failed=["zero-gradients"])
    write.evaluation(path, "adaptive", write.both, eps=0.2)
    return path


@pytest.mark.parametrize("width", ["60", "80", "140"])
def test_tables_fit_the_terminal_and_lose_no_figure(
    run: Path, width: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert carso(["report", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    own = [line for line in lines if not re.match(r"\(\d", line)]
    assert max(map(len, own)) <= int(width)
    for number in ("1", "2", "3", "4", "5", "17", "18", "19"):
        assert any(line.startswith(f"Table {number}. ") for line in own)
    text = " ".join(" ".join(own).split())
    for figure in ("0.375", "0.7613", "0.9568", "< 0.7070", "> 0.99", "159"):
        assert figure in text
    assert any("Sanity checks failed: zero-gradients" in line for line in lines if line.startswith("("))


@pytest.mark.parametrize("name", ["cifar10-small-longer", "digits-adversarial"])
def test_a_comparison_of_two_classifiers_is_a_table_at_80_columns(
    write: Any, name: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    paths = [write.run(name), write.run(f"{name}-still-longer")]
    for place, path in enumerate(paths):
        alone: dict[tuple[str, str, None], list[int]] = {
            ("classifier", "none", None): [1, 1, 1, 1],
            ("classifier", "pgd", None): [1, 1, 1 - place, 0],
        }
        write.evaluation(
            path, "pgd", alone, classifier=f"c{place}", second_classifier=None, purifier=None, n_samples=None
        )
    assert carso(["report", *map(str, paths), "--table", "comparison"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (place,) = [place for place, line in enumerate(lines) if line.startswith("model, measured")]
    assert lines[place].split()[-4:] == ["minus", "[A]", "minus", "[B]"]
    figures, intervals = lines[place + 2], lines[place + 3]
    assert figures.split()[-4:] == ["1.000", "0.750", "–", "+0.250"]
    assert intervals.count("[") == intervals.count("]") == 3
    assert max(map(len, lines[: place + 8])) <= 80


def test_json_is_all_there_is_on_stdout(run: Path, capsys: Capture) -> None:
    assert carso(["report", str(run), "--table", "2", "--format", "json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["number"] == "2"


@pytest.mark.parametrize(
    ("form", "start"),
    [
        ("markdown", "## Table 2. "),
        ("latex", r"\begin{table}"),
        ("csv", "table,row,"),
        ("html", "<!doctype html>"),
    ],
)
def test_every_format(run: Path, form: str, start: str, capsys: Capture) -> None:
    assert carso(["report", str(run), "--table", "2", "--format", form]) == 0
    assert capsys.readouterr().out.startswith(start)


def test_unknown_format_and_table_are_usage_errors(run: Path, capsys: Capture) -> None:
    assert carso(["report", str(run), "--format", "markdwon"]) == 2
    assert (
        "'markdwon' is not allowed; use rich, markdown, latex, csv, json or html; did you mean 'markdown'?"
        in capsys.readouterr().err
    )
    assert carso(["report", str(run), "--table", "6"]) == 2
    assert "there is no table '6' to draw" in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert carso(["report", "nowhere"]) == 5
    assert "nowhere holds no run" in capsys.readouterr().err
    assert carso(["report"]) == 5
    assert "runs holds no run to report" in capsys.readouterr().err
    assert carso(["report", "nowhere", "--table", "comparision"]) == 2
    assert "did you mean 'comparison'?" in capsys.readouterr().err


def test_all_runs_are_reported_where_none_is_named(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run.parent / "runs"
    folder.mkdir()
    run.rename(folder / "mine")
    (folder / "notes").mkdir()
    monkeypatch.chdir(run.parent)
    assert carso(["report", "--table", "1", "--format", "csv"]) == 0
    assert "runs/mine/metrics.jsonl" in capsys.readouterr().out


def test_a_run_without_training_takes_the_recipe_its_evaluation_names(run: Path, capsys: Capture) -> None:
    (run / "recipe.yaml").unlink()
    assert carso(["report", str(run), "--table", "2", "--format", "csv"]) == 0
    assert "digits; measured, adaptive†" in capsys.readouterr().out


def test_a_folder_of_ablations_alone_is_reported(
    write: Any, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As `carso ablate --first clean` leaves it where the recipe's own purifier is not trained.
    root = tmp_path / "runs" / "digits"
    root.mkdir(parents=True)
    variant = write.run("runs/digits-first-clean", overrides=["representation.kind=clean"])
    row: Any = (
        "clean/AT",
        write.evaluation(variant, "adaptive", write.both),
        {},
    )
    write.ablation(root, "first-second", [row], recipe="digits")
    page = tmp_path / "page.html"
    assert carso(["report", str(root), "--table", "17", "--format", "csv", "--html", str(page)]) == 0
    assert "digits; clean/AT; measured, adaptive" in capsys.readouterr().out
    assert "clean/AT" in page.read_text()
    (variant / "recipe.yaml").unlink()
    monkeypatch.chdir(tmp_path)
    assert carso(["report", "--table", "17", "--format", "csv"]) == 0
    assert "digits; clean/AT; measured, adaptive" in capsys.readouterr().out
    write.ablation(root, "first-second", [row], recipe="mine")
    assert carso(["report", str(root)]) == 5
    assert "the recipe 'mine' of" in capsys.readouterr().err


@pytest.mark.slow
def test_page_and_pictures(run: Path, tmp_path: Path, capsys: Capture) -> None:
    page, pictures = tmp_path / "new" / "page.html", tmp_path / "pictures"
    assert carso(["report", str(run), "--html", str(page), "--pictures", str(pictures)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"written: {page}" in shown.err
    assert sorted(path.name for path in pictures.iterdir()) == [
        *("eps.pdf", "eps.png", "eps.svg", "training.pdf", "training.png", "training.svg")
    ]
    text = page.read_text()
    for part in (
        "Accuracy against eps, linf",
        "Table 19. ",
        "zero-gradients",
        "recipe.yaml",
        "defence, clean",
    ):
        assert part in text
    assert text.count("data:image/svg+xml;base64,") == 2 * 6
    assert "http" not in text.replace("http-equiv", "")


def test_a_page_heads_a_run_with_what_it_has(write: Any, tmp_path: Path) -> None:
    run, page = write.run(), tmp_path / "page.html"
    alone = {("classifier", "none", None): [1, 1, 1, 0], ("classifier", "pgd", None): [1, 0, 0, 0]}
    facts = {"classifier": "c0", "second_classifier": None, "purifier": None, "n_samples": None}
    write.evaluation(run, "pgd", alone, eps=0.2, **facts)
    noise = {("defence", "none", None): [2, 2, 2, 2], ("defence", "noise", None): [2, 2, 2, 0]}
    write.evaluation(run, "noise", noise, eps=0.2)
    assert carso(["report", str(run), "--html", str(page)]) == 0
    text = page.read_text()
    assert "classifier alone, worst case of pgd" in text
    assert "4 images, eps 0.2, pgd-" in text
    assert "defence, clean" not in text


def test_pictures_of_two_runs_of_one_name_are_refused(run: Path, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "elsewhere" / run.name
    shutil.copytree(run, other)
    assert carso(["report", str(run), str(other), "--pictures", str(tmp_path / "pictures")]) == 2
    assert f"would both go to a folder {run.name}" in " ".join(
        capsys.readouterr().err.replace("│", "").split()
    )
    assert not (tmp_path / "pictures").exists()


def test_a_page_that_cannot_be_written_is_an_error_before_anything_is_drawn(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("")
    assert carso(["report", str(run), "--html", str(tmp_path / "file" / "page.html")]) == 1
    assert "cannot write to the folder" in capsys.readouterr().err
