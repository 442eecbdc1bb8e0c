"""Recipes that say only where they differ from a shipped one."""

from __future__ import annotations

from pathlib import Path

import pytest

from carso_cli.errors import RecipeError
from carso_cli.recipe import load
from carso_cli.recipe.load import load_recipe, load_recipe_text
from carso_cli.recipe.schema import Weights

HEAD = "extends: digits\nname: mine\ndescription: my own\n"


def test_what_is_left_out_comes_from_the_other() -> None:
    recipe = load_recipe_text(HEAD + "training:\n  attack_mix:\n    pgd_steps: 7\n")
    base = load_recipe("digits", ["name=mine", "description=my own", "training.attack_mix.pgd_steps=7"])
    assert recipe == base
    assert recipe.training.attack_mix.pgd_step_size == 0.04


def test_lists_are_replaced_whole_and_overrides_come_last() -> None:
    text = HEAD + "representation:\n  layers: [layer.0.block.0.conv_0]\nevaluation:\n  n_samples: 3\n"
    recipe = load_recipe_text(text, overrides=["evaluation.n_samples=2"])
    assert recipe.representation.layers == ("layer.0.block.0.conv_0",)
    assert recipe.evaluation.n_samples == 2


def test_weights_of_another_source_take_the_place_of_the_bases() -> None:
    at = "classifier:\n  at: {source: file, file: mine.pt}\n"
    assert load_recipe_text(HEAD + at).classifier.at == Weights(source="file", file="mine.pt")
    named = "classifier:\n  at: {source: robustbench, name: Gowal2020Uncovering_28_10_extra}\n"
    recipe = load_recipe_text(HEAD.replace("digits", "cifar10-small") + named)
    assert recipe.classifier.at == Weights(source="robustbench", name="Gowal2020Uncovering_28_10_extra")
    assert recipe.classifier.depth == 10


def test_what_says_which_recipe_it_is_is_not_handed_on() -> None:
    assert load_recipe("cifar10").reproduces
    recipe = load_recipe_text("extends: cifar10\nname: mine\ndescription: my own\n")
    assert recipe.reproduces == ""
    with pytest.raises(RecipeError) as caught:
        load_recipe_text("extends: digits\n")
    assert "  name: is missing" in caught.value.message
    assert "  description: is missing" in caught.value.message


def test_problems_keep_their_lines() -> None:
    with pytest.raises(
        RecipeError, match=r"line 5, training\.objectve: unknown key; did you mean 'objective'"
    ):
        load_recipe_text(HEAD + "training:\n  objectve: both\n")
    # Epochs alone scale the other's schedules; with a schedule of its own nothing is scaled.
    own = "training:\n  epochs: 3\n  beta_increase: {first_epoch: 0, last_epoch: 1}\n"
    with pytest.raises(RecipeError, match=r"line 4, training: .* last 12 epochs together; epochs is 3"):
        load_recipe_text(HEAD + own)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("digit", "no shipped recipe 'digit'; did you mean 'digits'"),
        ("[digits]", r"\['digits'\] is not allowed; give the name of a shipped recipe"),
        ("null", "null is not allowed; give the name of a shipped recipe"),
    ],
)
def test_only_a_shipped_recipe_is_extended(value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^mine\.yaml, line 2, extends: .*{message}"):
        load_recipe_text(f"name: mine\nextends: {value}\n", source="mine.yaml")


def test_a_circle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {other}\nname: {name}\n")
    monkeypatch.setattr(load, "find_recipe", lambda name: tmp_path / f"{name}.yaml")
    with pytest.raises(RecipeError, match=r"recipe 'b', line 1, extends: 'a' is not allowed.*in a circle"):
        load_recipe_text("extends: a\nname: mine\n")


@pytest.mark.parametrize("base", ["digits", "cifar10-small"])
def test_variants_change_what_they_say_and_nothing_else(base: str) -> None:
    plain, adversarial = load_recipe(base), load_recipe(f"{base}-adversarial")
    own = {"name", "description", "reproduces"}
    assert adversarial.model_dump(exclude={*own, "training"}) == plain.model_dump(exclude={*own, "training"})
    assert adversarial.training.initial == f"{plain.run_folder}/purifier.safetensors"
    for kind, changes in {
        "both": ["training.objective=both"],
        "skip": ["purifier.input_share=0.5"],
        "no-latent": [
            "purifier.latent_features=0",
            f"training.initial=runs/{base}-no-latent-start/purifier.safetensors",
        ],
    }.items():
        expected = load_recipe(f"{base}-adversarial", changes)
        assert load_recipe(f"{base}-{kind}").model_dump(exclude=own) == expected.model_dump(exclude=own)
