"""`carso doctor` as a new user runs it: one screen, 80 columns, an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from carso_cli.cli.app import run as carso
from carso_cli.workflows import doctor as workflow

CHECKOUT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workflow, "_LIBRARIES", {"torch": ("torch", True)})
    monkeypatch.chdir(tmp_path)
    # A short home, so that the width of the lines is ours.
    monkeypatch.setenv("CARSO_HOME", "home")
    monkeypatch.setenv("COLUMNS", "80")


def test_a_bare_machine_in_one_screen(capsys: Capture) -> None:
    assert carso(["doctor"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 50
    assert max(len(line) for line in lines) <= 80
    for source in (
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "https://drive.google.com/file/d/1-AaTrYt23WJFR22hXgBd-i6kjpsz6Hf2",
        "https://drive.google.com/file/d/1MBAWGxiZxKt-GfqEqtLcXcd3tAxPhvV2",
        "https://huggingface.co/wzekai99/DM-Improves-AT",
        "$ carso train-classifier cifar10-small --kind at",
    ):
        assert source in text
    rows = {
        line.split()[0]: line.split()[1:] for line in lines if line.startswith(("cifar", "digits", "tiny"))
    }
    assert rows["digits"] == ["present", "present", "present"]
    assert rows["cifar10"] == ["missing", "(1)", "missing", "(2)", "missing"]
    assert rows["cifar10-gowal2020"] == ["missing", "(1)", "missing", "(3)", "–"]
    assert lines[-1] == "next:  carso quickstart"


def test_a_recipe_that_cannot_run(capsys: Capture) -> None:
    assert carso(["doctor", "cifar10"]) == 3
    text = capsys.readouterr().out
    assert "looked for models/cifar10/Linf/Cui2023Decoupled_WRN-28-10.pt" in text
    assert (
        "$ curl -L --create-dirs -o home/data/cifar-10-python.tar.gz \\\n"
        "     https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz\n"
    ) in text
    assert "; only `carso ablate` needs it" in text
    assert "next:" not in text


def test_json(capsys: Capture) -> None:
    assert carso(["doctor", "tinyimagenet200", "--json"]) == 3
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["ready"] is False
    assert [item["role"] for item in found["recipes"][0]["items"]] == ["data", "at", "clean"]


def test_an_unknown_recipe(capsys: Capture) -> None:
    assert carso(["doctor", "cifar11"]) == 2
    assert "no shipped recipe 'cifar11'; did you mean 'cifar10'" in capsys.readouterr().err


def test_a_broken_installation_is_told_and_not_met(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libfoo.so: cannot open shared object file')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(CHECKOUT)))}
    done = subprocess.run(
        [sys.executable, "-m", "carso_cli", "doctor"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert "torch: ImportError: libfoo.so: cannot open shared object file" in " ".join(done.stdout.split())
    assert "tinyimagenet200: not looked at: torch cannot be imported\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "next:  pip install --force-reinstall torch"
    assert "Traceback" not in done.stderr
