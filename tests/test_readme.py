"""What the README shows of Python and YAML is run as it stands there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from carso_cli.cli.app import run as carso
from carso_cli.recipe.load import dump_recipe, load_recipe, read_recipe_file
from carso_cli.runtime.third_party import prepare, quiet
from tests.toys import TINY, OwnClassifier, offer

pytestmark = pytest.mark.slow
README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
Capture = pytest.CaptureFixture[str]


def blocks(section: str, language: str) -> list[str]:
    """Return the code blocks of one language in a section."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


CLASSIFIERS = [yaml.safe_load(block)["classifier"] for block in blocks("Your own classifier", "yaml")[:2]]


def write_recipe(classifier: dict[str, Any], layers: list[str]) -> None:
    """Write `mine.yaml`: a tiny variant of digits with a classifier as the README writes it."""
    values = yaml.safe_load(dump_recipe(load_recipe("digits", TINY)))
    values |= {"name": "mine", "classifier": classifier, "representation": {"layers": layers}}
    Path("mine.yaml").write_text(yaml.safe_dump(values))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def proposed(capsys: Capture) -> list[str]:
    """Return the layers of the block that `carso extract mine.yaml --list` ends with."""
    capsys.readouterr()
    assert carso(["extract", "mine.yaml", "--list"]) == 0
    shown = capsys.readouterr().out
    layers: list[str] = yaml.safe_load(shown[shown.index("representation:") :])["representation"]["layers"]
    return layers


def use(capsys: Capture, classifier: dict[str, Any]) -> list[str]:
    """Go from a classifier section to an evaluated defence by the commands; return the layers chosen."""
    write_recipe(classifier, ["to be chosen"])
    layers = proposed(capsys)
    # Not all, for the sake of time.
    write_recipe(classifier, layers[::6])
    assert carso(["train-purifier", "mine.yaml", "--device", "cpu"]) == 0
    assert carso(["evaluate", "mine.yaml", "--attack", "none", "--limit", "10", "--device", "cpu"]) == 0
    assert "defence" in capsys.readouterr().out
    return layers


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_an_architecture_with_a_weights_file(library: str, capsys: Capture) -> None:
    prepare()
    with quiet():
        import timm
        from torchvision import models
    section = CLASSIFIERS[0] | {"family": library}
    assert CLASSIFIERS[0]["family"] == "torchvision"
    make = models.get_model if library == "torchvision" else timm.create_model
    save_file(make(section["architecture"], num_classes=10).state_dict(), "mine.safetensors")
    layers = use(capsys, section)
    shown = yaml.safe_load(blocks("Your own classifier", "yaml")[2])["representation"]["layers"]
    assert layers[: len(shown)] == shown


def test_an_entry_point(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    project = tomllib.loads(blocks("Your own classifier", "toml")[0])["project"]
    offer(monkeypatch, project["entry-points"])
    assert use(capsys, CLASSIFIERS[1]) == ["stage.0", "stage.2"]


def test_a_module_in_python() -> None:
    digits = yaml.safe_load(read_recipe_file("digits"))["classifier"]
    write_recipe(digits, ["stage.0", "stage.2"])
    names: dict[str, Any] = {"my_model": OwnClassifier()}
    exec(blocks("Your own classifier", "python")[0], names)
    assert {row["target"] for row in names["result"]["results"]} == {"classifier", "defence"}
    assert names["defence"](torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_run_is_a_module() -> None:
    write_recipe(yaml.safe_load(read_recipe_file("digits"))["classifier"], ["layer.0.block.0.conv_0"])
    assert carso(["train-purifier", "mine.yaml", "--run", "runs/digits", "--device", "cpu"]) == 0
    names: dict[str, Any] = {"images": torch.rand(3, 3, 32, 32), "z": torch.zeros(3, 5, 4)}
    exec(blocks("Recipes", "python")[0], names)
    assert names["log_p"].shape == names["logits"].shape == (3, 10)
    assert names["samples"].shape == (3, 8, 3, 32, 32)
