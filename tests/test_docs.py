"""What README and documentation show of commands, Python and YAML works as it stands there."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import save_file

from carso_cli.cli.app import build_app
from carso_cli.cli.app import run as carso
from carso_cli.recipe.load import dump_recipe, load_recipe, read_recipe_file
from carso_cli.runtime.third_party import prepare, quiet
from tests.toys import TINY, OwnClassifier, offer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
Capture = pytest.CaptureFixture[str]


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of one language on a page."""
    return re.findall(rf"```{language}.*?\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the command lines of carso on a page, without the program's name."""
    for block in blocks(page, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.removeprefix("$ ").split(" && "):
                words = shlex.split(part, comments=True)
                if "carso" in words:
                    yield words[words.index("carso") + 1 :]
                elif "carso_cli" in words:
                    yield words[words.index("carso_cli") + 1 :]


YOUR_CLASSIFIER = ROOT / "docs" / "how-to" / "your-classifier.md"
CLASSIFIERS = [yaml.safe_load(block)["classifier"] for block in blocks(YOUR_CLASSIFIER, "yaml")[:2]]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_command_has_the_options_that_are_shown(page: Path) -> None:
    for words in commands(page):
        command = typer.main.get_command(build_app(words))
        for name in itertools.takewhile(lambda word: not word.startswith("-"), list(words)):
            if name not in getattr(command, "commands", {}):
                break
            command = command.commands[name]  # type: ignore[attr-defined]
            words = words[1:]
        # Parsing refuses unknown commands, options and values; nothing is run.
        command.make_context("carso", list(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8 * 1024


@pytest.mark.slow
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
    shown = yaml.safe_load(blocks(YOUR_CLASSIFIER, "yaml")[2])["representation"]["layers"]
    assert layers[: len(shown)] == shown


@pytest.mark.slow
def test_an_entry_point(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    project = tomllib.loads(blocks(YOUR_CLASSIFIER, "toml")[0])["project"]
    offer(monkeypatch, project["entry-points"])
    assert use(capsys, CLASSIFIERS[1]) == ["stage.0", "stage.2"]


@pytest.mark.slow
def test_a_module_in_python() -> None:
    digits = yaml.safe_load(read_recipe_file("digits"))["classifier"]
    write_recipe(digits, ["stage.0", "stage.2"])
    names: dict[str, Any] = {"my_model": OwnClassifier()}
    exec(blocks(YOUR_CLASSIFIER, "python")[0], names)
    assert {row["target"] for row in names["result"]["results"]} == {"classifier", "defence"}
    assert names["defence"](torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.slow
def test_a_run_is_a_module() -> None:
    write_recipe(yaml.safe_load(read_recipe_file("digits"))["classifier"], ["layer.0.block.0.conv_0"])
    assert carso(["train-purifier", "mine.yaml", "--run", "runs/digits", "--device", "cpu"]) == 0
    names: dict[str, Any] = {"images": torch.rand(3, 3, 32, 32), "z": torch.zeros(3, 5, 4)}
    exec(blocks(ROOT / "docs" / "how-to" / "recipes.md", "python")[0], names)
    assert names["log_p"].shape == names["logits"].shape == (3, 10)
    assert names["samples"].shape == (3, 8, 3, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path) -> None:
    found = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout
