from __future__ import annotations

from pathlib import Path

import pytest

from carso_cli.errors import StateError
from carso_cli.evaluation.models import run_recipe
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.folder import RunFolder


def test_a_purifier_whose_recipe_is_lost_is_not_evaluated_by_another(tmp_path: Path) -> None:
    recipe = load_recipe("digits")
    assert run_recipe(recipe, RunFolder(tmp_path)) is recipe
    (tmp_path / "purifier.safetensors").write_bytes(b"")
    with pytest.raises(StateError, match=r"recipe\.yaml is missing: how the purifier beside it was trained"):
        run_recipe(recipe, RunFolder(tmp_path))
