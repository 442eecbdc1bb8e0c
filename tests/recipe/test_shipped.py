"""Finding shipped recipes: in the wheel, in a checkout, in subfolders."""

from __future__ import annotations

from pathlib import Path

import pytest

import carso_cli
from carso_cli.errors import RecipeError
from carso_cli.recipe.shipped import find_recipe, list_recipes, recipes_folder

CHECKOUT = Path(__file__).resolve().parents[2]


def install(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = root / "site" / "carso_cli"
    package.mkdir(parents=True)
    monkeypatch.setattr(carso_cli, "__file__", str(package / "__init__.py"))
    return package


def test_a_checkout_uses_its_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = install(tmp_path, monkeypatch)
    (package.parent / "recipes").mkdir()
    assert recipes_folder() == package.parent / "recipes"


def test_a_wheel_uses_its_own_and_not_a_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = install(tmp_path, monkeypatch)
    (package.parent / "recipes").mkdir()
    (package / "shipped_recipes" / "ablations").mkdir(parents=True)
    (package / "shipped_recipes" / "b.yaml").touch()
    (package / "shipped_recipes" / "notes.txt").touch()
    (package / "shipped_recipes" / "ablations" / "a.yaml").touch()
    assert [recipe.name for recipe in list_recipes()] == ["a", "b"]
    assert (
        find_recipe("a") == find_recipe("ablations/a") == package / "shipped_recipes" / "ablations" / "a.yaml"
    )


def test_an_incomplete_installation_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = install(tmp_path, monkeypatch)
    with pytest.raises(RecipeError, match="the shipped recipes are missing") as caught:
        list_recipes()
    assert str(package) in caught.value.message
    assert "install carso again" in caught.value.hint


def test_the_wheel_is_told_to_hold_the_recipes() -> None:
    text = (CHECKOUT / "pyproject.toml").read_text()
    assert '"recipes" = "carso_cli/shipped_recipes"' in text
