"""`carso recipes`."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from carso_cli.recipe.load import load_recipe, load_recipe_text, read_recipe_file

NAMES = [
    "cifar10",
    "cifar10-gowal2020",
    "cifar10-rebuffi2021",
    "cifar10-small",
    *(f"cifar10-small-{kind}" for kind in ("adversarial", "augmented", "both", "clean", "no-latent")),
    *(f"cifar10-small-{kind}" for kind in ("skip", "skip-longer", "skip-pgd")),
    "cifar100",
    "cifar100-rebuffi2021",
    "digits",
    *(f"digits-{kind}" for kind in ("adversarial", "both", "clean", "no-latent", "skip")),
    "fashion-mnist",
    "mnist",
    "tinyimagenet-small",
    "tinyimagenet200",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_ls_shows_every_recipe_uncut_at_80_columns(carso: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = carso("recipes", "ls").lines
    assert max(len(line) for line in lines) <= 80
    starts = {name: next(n for n, line in enumerate(lines) if line.split()[:1] == [name]) for name in NAMES}
    for name, end in zip(NAMES, [*list(starts.values())[1:], len(lines) - 1], strict=True):
        # The third column begins where its heading does.
        column, block = lines[0].index("description"), lines[starts[name] : end]
        recipe = load_recipe(name)
        assert block[0].split()[:2] == [name, recipe.data.name]
        assert f"WRN-{recipe.classifier.depth}-{recipe.classifier.width}" in block[1][:column]
        text = " ".join(line[column:].strip() for line in block)
        assert recipe.description in text
        assert recipe.reproduces in text


def test_ls_as_json(carso: Any) -> None:
    shown = carso("recipes", "ls", "--json")
    assert [recipe["name"] for recipe in shown.json] == NAMES
    assert shown.json[0] | {"path": "", "description": ""} == {
        **{"name": "cifar10", "path": "", "data": "cifar10", "images": "3x32x32", "classes": 10},
        **{"classifier": "WRN-28-10", "reproduces": "Table 2, scenario (a)", "description": ""},
    }
    assert shown.err == ""


@pytest.mark.parametrize("name", NAMES)
def test_show_prints_the_file_as_it_is(name: str, carso: Any) -> None:
    assert carso("recipes", "show", name).out == read_recipe_file(name)


@pytest.mark.parametrize(
    "arguments", [["--resolved"], ["--set", "threat.eps=1/4"], ["--resolved", "--set", "seed=3"]]
)
def test_show_resolved_prints_a_recipe_that_loads_equal(carso: Any, arguments: list[str]) -> None:
    shown = carso("recipes", "show", "digits", *arguments).out
    overrides = [value for value in arguments if "=" in value]
    assert load_recipe_text(shown) == load_recipe("digits", overrides)


def test_show_takes_a_path(tmp_path: Path, carso: Any) -> None:
    (tmp_path / "mine.yaml").write_text(read_recipe_file("digits") + "# mine\n")
    assert carso("recipes", "show", "mine.yaml").out.endswith("# mine\n")


def test_cp_writes_beside_the_user_and_says_where(tmp_path: Path, carso: Any) -> None:
    assert carso("recipes", "cp", "cifar10").out == "cifar10.yaml\n"
    assert (tmp_path / "cifar10.yaml").read_text() == read_recipe_file("cifar10")


def test_cp_takes_a_folder_or_a_name(tmp_path: Path, carso: Any) -> None:
    (tmp_path / "folder").mkdir()
    carso("recipes", "cp", "digits", "folder")
    carso("recipes", "cp", "digits", "folder/mine.yaml")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["digits.yaml", "mine.yaml"]


def test_cp_overwrites_only_when_forced(tmp_path: Path, carso: Any) -> None:
    path = tmp_path / "digits.yaml"
    path.write_text("precious")
    shown = carso("recipes", "cp", "digits", str(path), code=2).err
    assert f"{path} exists already" in shown
    assert "--force" in shown
    assert path.read_text() == "precious"
    carso("recipes", "cp", "digits", str(path), "--force")
    assert path.read_text() == read_recipe_file("digits")


def test_cp_onto_itself_is_refused_even_when_forced(tmp_path: Path, carso: Any) -> None:
    (tmp_path / "mine.yaml").write_text(read_recipe_file("digits"))
    carso("recipes", "cp", "mine.yaml", "mine.yaml", "--force", code=2, err="mine.yaml is the recipe itself")
    assert (tmp_path / "mine.yaml").read_text() == read_recipe_file("digits")


def test_cp_into_nowhere_says_so(carso: Any) -> None:
    carso(
        "recipes",
        "cp",
        "digits",
        "nowhere/mine.yaml",
        code=1,
        err="to nowhere/mine.yaml: No such file or directory",
    )


def test_cp_that_fails_halfway_leaves_what_was_there(
    tmp_path: Path, carso: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "digits.yaml"
    path.write_text("precious")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    carso("recipes", "cp", "digits", "--force", code=1, err="to digits.yaml: No space left on device")
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits.yaml"]
    assert path.read_text() == "precious"


def test_cp_of_an_unknown_recipe_names_the_nearest(carso: Any) -> None:
    carso("recipes", "cp", "digit", code=2, err="no shipped recipe 'digit'; did you mean 'digits' or ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = read_recipe_file("digits")
    deeper = tmp_path / "all" / "deeper"
    deeper.mkdir(parents=True)
    (deeper.parent / "good.yaml").write_text(text)
    (deeper.parent / "notes.txt").write_text("no recipe")
    (deeper.parent / "two.yml").write_text(
        text.replace("  eps:", "  epss:").replace("classes: 10", "classes: 1")
    )
    (deeper / "broken.yaml").write_text("a: [")
    return tmp_path


def test_validate_shows_every_problem_of_every_file(folder: Path, carso: Any) -> None:
    shown = carso("recipes", "validate", "all", "cifar10", "missing.yaml", code=2)
    assert shown.lines == ["all/good.yaml: valid", "cifar10: valid"]
    assert "all/deeper/broken.yaml, line 1" in shown.err
    assert "all/two.yml has 2 problems" in shown.err
    assert "threat.epss: unknown key; did you mean 'eps'?" in shown.err
    assert "data.classes: 1 is not allowed; use an integer from 2" in shown.err
    assert "'missing.yaml'" in shown.err


def test_validate_as_json(folder: Path, carso: Any) -> None:
    listed = {entry["path"]: entry for entry in carso("recipes", "validate", "all", "--json", code=2).json}
    assert {path: entry["valid"] for path, entry in listed.items()} == {
        "all/good.yaml": True,
        "all/two.yml": False,
        "all/deeper/broken.yaml": False,
    }
    assert listed["all/good.yaml"]["error"] is None
    assert listed["all/two.yml"]["error"].startswith("all/two.yml has 2 problems:")


def test_validate_of_good_recipes_is_zero(carso: Any) -> None:
    assert carso("recipes", "validate", *NAMES).lines == [f"{name}: valid" for name in NAMES]


def test_validate_of_a_folder_without_recipes_is_refused(tmp_path: Path, carso: Any) -> None:
    (tmp_path / "empty").mkdir()
    carso("recipes", "validate", "empty", code=2, err="the folder empty holds no recipe")


def test_validate_looks_for_the_layers_in_the_architecture(carso: Any, tmp_path: Path) -> None:
    text = "extends: digits\nname: mine\ndescription: mine\n"
    (tmp_path / "typo.yaml").write_text(f"{text}representation: {{layers: [layer.0.block.0.conf_0]}}\n")
    shown = carso("recipes", "validate", "typo.yaml", code=2).err
    assert "the classifier has no layer 'layer.0.block.0.conf_0'; did you mean" in shown
    assert "carso extract typo.yaml --list" in shown
    net = "{family: torchvision, architecture: resnet18, at: {source: file, file: absent.pth}, clean: null}"
    (tmp_path / "theirs.yaml").write_text(
        f"{text}classifier: {net}\nrepresentation: {{layers: [network.layer1.0.conv1]}}\n"
    )
    assert carso("recipes", "validate", "theirs.yaml").lines == ["theirs.yaml: valid"]
    own = "{family: external, at: {source: entry-point, name: mine}, clean: null}"
    (tmp_path / "own.yaml").write_text(f"{text}classifier: {own}\nrepresentation: {{layers: [any]}}\n")
    (line,) = carso("recipes", "validate", "own.yaml").lines
    assert line.startswith("own.yaml: valid; its layers are not checked")
    (found,) = carso("recipes", "validate", "own.yaml", "--json").json
    assert found["valid"]
    assert "not checked" in found["note"]
