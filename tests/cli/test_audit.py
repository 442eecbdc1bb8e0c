"""`carso audit` as a new user runs it: an empty folder, a model that is not ours, one command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from carso_cli.classifiers.robustbench_zoo import find_entry
from carso_cli.cli.app import run as carso
from carso_cli.io.paths import weights_home

pytestmark = pytest.mark.slow  # each audits a model

Capture = pytest.CaptureFixture[str]

MODEL = """
import torch
from torch import nn

class Brightness(nn.Module):
    '''Tells dark images from bright ones.'''
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))
    def forward(self, images):
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1) * self.scale

def build():
    return Brightness().eval()

def blind(images):
    return torch.zeros(len(images), 2) + images.mean() * 0 + torch.tensor([1.0, 0.0])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "model.py").write_text(MODEL)
    labels = np.arange(20) % 2
    # The first half is so far from the border, 0.5, that 0.1 cannot move it across; the second is not.
    distance = np.where(np.arange(20) < 10, 0.2, 0.05)
    mean = np.where(labels == 0, 0.5 - distance, 0.5 + distance)
    noise = np.random.default_rng(0).uniform(-0.02, 0.02, (20, 3, 6, 9))
    images = (mean[:, None, None, None] + noise).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    return tmp_path


ARGUMENTS = ["audit", "model.py:build", "--data", "images.npz", "--eps", "0.1", "--budget", "quick"]


def test_the_first_line_is_the_number(folder: Path, capsys: Capture) -> None:
    assert carso([*ARGUMENTS, "--html"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("robust accuracy 0.500 [0.30, 0.70] on 20 images: trusted")
    assert max(len(line.rstrip()) for line in lines[2:]) <= 80
    assert "apgd-targeted" in "\n".join(lines)
    assert "robust accuracy 0.500" in (folder / "audit.html").read_text()


def test_json_is_the_summary_alone(folder: Path, capsys: Capture) -> None:
    assert carso([*ARGUMENTS, "--json", "--limit", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_images"] == 8
    assert found["name"] == "model.py:build"
    assert found["eps"] == 0.1


def test_strict_ends_with_4_where_the_number_is_not_trusted(folder: Path, capsys: Capture) -> None:
    assert carso([*ARGUMENTS[:1], "model.py:blind", *ARGUMENTS[2:], "--strict"]) == 4
    told = capsys.readouterr()
    assert ": not trusted: " in told.out.splitlines()[0]
    assert "error: not trusted: " in told.err


def test_a_dry_run_attacks_nothing(folder: Path, capsys: Capture) -> None:
    assert carso([*ARGUMENTS, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "20 of images.npz" in told
    assert "in all, about" in told
    assert "robust accuracy" not in told


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["model.py:absent"], 2, "model.py has no 'absent'"),
        (["model.py:build", "--data", "nowhere"], 2, "nowhere is no folder, no file and no data set"),
        (["model.py:build"], 2, "says nothing about its images"),
        (
            ["model.py:build", "--data", "images.npz", "--norm", "linff"],
            2,
            "'linff' is not allowed",
        ),
        (
            ["model.py:build", "--data", "images.npz", "--budget", "huge"],
            2,
            "'huge' is not allowed",
        ),
        (["model.py:build", "--data", "images.npz", "--resume"], 2, "--out DIR"),
        (["model.py:build", "--data", "web.npz"], 3, "web.npz is a web page"),
        (["model.py:build", "--data", "images.npz", "--eps", "-1"], 2, "'-1' is not allowed"),
        (["model.py:build", "--data", "images.npz", "--eps", "8"], 2, "--eps: "),
        (["model.py:build", "--data", "images.npz", "--eps", "20", "--norm", "l2"], 2, "black to white"),
        (["few.pt", "--data", "images.npz"], 2, "few.pt is a file of weights"),
        (["model.py:build", "--data", "empty"], 3, "it holds no folder"),
        (["model.py:build", "--data", "images.npz", "--adversarial", "few.pt"], 3, "(3, 3, 6, 9)"),
    ],
)
def test_what_cannot_be_carried_out(
    folder: Path, capsys: Capture, arguments: list[str], code: int, said: str
) -> None:
    (folder / "web.npz").write_text("<html>404</html>")
    torch.save(torch.rand(3, 3, 6, 9), folder / "few.pt")
    (folder / "empty").mkdir()
    assert carso(["audit", *arguments]) == code
    told = capsys.readouterr().err
    assert said in told
    assert "bug in carso" not in told


def test_channels_that_are_equal_are_reduced_and_that_is_said(folder: Path, capsys: Capture) -> None:
    (folder / "grey.py").write_text(
        MODEL.replace("mean = images", "assert images.shape[1] == 1; mean = images")
    )
    grey = np.random.default_rng(0).uniform(0.2, 0.8, (8, 1, 6, 9)).astype(np.float32).repeat(3, axis=1)
    np.savez(folder / "grey.npz", images=grey, labels=np.arange(8) % 2)
    assert carso(["audit", "grey.py:build", "--data", "grey.npz", "--dry-run"]) == 0
    assert "3 equal ones, of which 1 is kept" in " ".join(capsys.readouterr().err.split())


def test_help_says_that_the_file_is_executed(capsys: Capture) -> None:
    assert carso(["audit", "--help"]) == 0
    assert "EXECUTED" in capsys.readouterr().out


def test_from_python(folder: Path) -> None:
    from carso_cli import audit

    images, labels = torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 0, 1])
    report = audit(lambda pixels: pixels.mean(dim=(2, 3))[:, :2], images, labels, eps=0.1, budget="quick")
    assert report.n_images == 4
    assert report.trusted in (True, False)


@pytest.mark.slow
def test_a_model_of_robustbench(folder: Path, capsys: Capture) -> None:
    found = find_entry("cifar10/Linf/Wong2020Fast")
    path = weights_home() / found.paths()[0]
    path.parent.mkdir(parents=True)
    torch.save(found.build().state_dict(), path)
    torch.save({"images": torch.rand(4, 3, 32, 32), "labels": torch.arange(4)}, "few.pt")
    arguments = ["audit", "robustbench:cifar10/Linf/Wong2020Fast", "--data", "few.pt", "--dry-run", "--json"]
    assert carso(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["target"] == "robustbench:cifar10/Linf/Wong2020Fast"
    assert told["cost"]["n_images"] == 4
