"""Models from code of the user: what may be named, and what is said where it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from carso_cli.errors import UsageError
from carso_cli.runtime.reporter import SILENT
from carso_cli.tools.user_code import load_user_model, split_reference

TORCHVISION = "from torchvision import models\n\n\ndef build():\n    return models.resnet18(num_classes=3)\n"
CODE = """
import torch
from torch import nn
from beside_this import WIDTH

class Net(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.fc = nn.Linear(width, 3)
        self.drop = nn.Dropout()
    def forward(self, images):
        return self.fc(self.drop(images.flatten(1)))
    @classmethod
    def evaluating(cls):
        return cls().eval()

class NeedsWidth(nn.Module):
    def __init__(self, width):
        super().__init__()

class Callable:
    def __call__(self, images):
        return images.flatten(1)[:, :3]

def build(seed=0):
    return Net()

def scores(images, temperature=1.0):
    return images.flatten(1)[:, :3] / temperature

def make_scores():
    return scores

def two(images, labels):
    return images

def fails():
    weights = {}
    return weights["fc"]

def nothing():
    pass

def makes_class():
    return Net

built = Net()
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "model.py").write_text(CODE)
    (tmp_path / "beside_this.py").write_text("WIDTH = 12\n")
    monkeypatch.delitem(sys.modules, "beside_this", raising=False)
    return tmp_path


def load(text: str, reporter: Any = SILENT) -> Any:
    reference = split_reference(text)
    assert reference is not None
    return load_user_model(reference, reporter=reporter)[0]


@pytest.mark.parametrize(
    "name", ["build", "Net", "Net.evaluating", "built", "scores", "make_scores", "Callable"]
)
def test_a_model_or_what_makes_one(folder: Path, name: str) -> None:
    model = load(f"model.py:{name}")
    assert model(torch.rand(2, 3, 2, 2)).shape == (2, 3)
    if isinstance(model, nn.Module):
        assert not any(part.training for part in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_training_mode_is_left_and_said(folder: Path, recorder: Any) -> None:
    load("model.py:build", recorder)
    assert recorder.said == ["model.py:build was in training mode; it is audited in evaluation mode"]
    load("model.py:Net.evaluating", recorder)
    assert len(recorder.said) == 1


def test_a_module_of_a_package_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "audited_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text("import torch\ndef build():\n    return torch.nn.Flatten()\n")
    assert isinstance(load("audited_package.net:build"), nn.Flatten)
    for name in ("audited_package", "audited_package.net"):
        monkeypatch.delitem(sys.modules, name)


def test_two_files_of_one_name_are_two_models(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "m.py").write_text(f"def scores(images):\n    return '{name}'\n")
    assert [load(f"{name}/m.py:scores")(None) for name in ("a", "b", "a")] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model.py:buld", ["model.py has no 'buld'", "did you mean 'build'?", "it has Net, "]),
        ("modell.py:build", ["modell.py does not exist", "did you mean 'model.py'"]),
        ("model.py:fails", ["model.py, line ", "KeyError: 'fc'"]),
        ("model.py:nothing", ["returns None, no model", "(B, classes) scores"]),
        ("model.py:number", ["is a int, no model"]),
        ("model.py:two", ["needs arguments: two(images, labels)", "def build()"]),
        ("model.py:NeedsWidth", ["needs arguments: NeedsWidth(width)"]),
        ("model.py:makes_class", ["returns the class Net"]),
        ("model.py:", ["'' is no name in Python"]),
        ("model.py:build()", ["'build()' is no name in Python", "model.py:NAME"]),
        ("broken.py:build", ["broken.py, line 2", "not valid Python"]),
        ("exits.py:build", ["its code fails in exits.py, line 2: SystemExit: 3"]),
        ("imports.py:build", ["imports.py, line 1: ModuleNotFoundError: No module named 'absent_library'"]),
        ("absent.module:build", ["no module 'absent.module'", "absent/module.py:build"]),
        ("json:x", ["json has no 'x'"]),
    ],
)
def test_what_names_no_model(folder: Path, text: str, said: list[str]) -> None:
    (folder / "broken.py").write_text("import torch\ndef build(:\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "imports.py").write_text("import absent_library\n")
    with pytest.raises(UsageError) as caught:
        load(text)
    told = f"{caught.value.message}\n{caught.value.hint}"
    assert all(part in told for part in said), told
    assert text.partition(":")[0] in told


@pytest.mark.parametrize("text", ["digits", "runs/digits", "model.py", "C\\x:y", "https://a.b/c:d"])
def test_other_texts_name_no_code(text: str) -> None:
    assert split_reference(text) is None


@pytest.mark.slow
def test_code_may_import_torchvision_first(tmp_path: Path) -> None:
    # In a process of its own, where nothing has imported torchvision or mended its import.
    (tmp_path / "tv.py").write_text(TORCHVISION)
    program = (
        "from carso_cli.runtime.reporter import SILENT\n"
        "from carso_cli.tools.user_code import load_user_model, split_reference\n"
        "print(type(load_user_model(split_reference('tv.py:build'), reporter=SILENT)[0]).__name__)"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == "ResNet", found.stderr
