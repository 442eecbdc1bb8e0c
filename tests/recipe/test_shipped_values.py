"""Every file of `recipes/` loads, and the paper's recipes hold the values of its Tables 7 to 16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from carso_cli.recipe.load import load_recipe, read_recipe_file
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.shipped import list_recipes

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
PAPER = ("cifar10", "cifar100", "tinyimagenet200")


def test_every_file_is_a_listed_recipe() -> None:
    assert len(FILES) == 24
    assert len({path.stem for path in FILES}) == len(FILES)  # a name leads to one file
    assert [recipe.path for recipe in list_recipes()] == sorted(FILES, key=lambda path: path.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_loads_and_is_named_as_it_is_called(path: Path) -> None:
    assert load_recipe(str(path)).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_opens_with_what_a_user_needs(path: Path) -> None:
    header = path.read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    for word in ("Launch", "Overrides", "Reproduces", "Expects", "Hardware", "Needs"):
        assert any(line.startswith(f"# {word:<11}") for line in header), word
    assert any(f"carso train-purifier {path.stem}" in line for line in header)


def convolutions(blocks: int) -> tuple[str, ...]:
    """Return the layers that Table 7 names in a WideResNet with so many blocks a group.

    The first group's shortcut is left out, whether that group widens or not.
    """
    return tuple(
        f"layer.{group}.block.{block}.{part}"
        for group in range(3)
        for block in range(blocks)
        for part in ("conv_0", "conv_1", *(("shortcut",) if block == 0 and group > 0 else ()))
    )


TABLE_7 = convolutions(4)

# key: values for scenarios (a), (b), (c), in the order of PAPER
TABLES: dict[str, tuple[Any, Any, Any]] = {
    # Section 5.1
    "data.name": ("cifar10", "cifar100", "tinyimagenet200"),
    "data.classes": (10, 100, 200),
    "data.channels": (3, 3, 3),
    "data.image_size": (32, 32, 64),
    "classifier.depth": (28, 28, 28),
    "classifier.width": (10, 10, 10),
    "classifier.at.name": ("Cui2023Decoupled_WRN-28-10", "Cui2023Decoupled_WRN-28-10", None),
    "classifier.at.file": (None, None, "wang2023_tinyimagenet200_wrn28-10.pt"),
    "threat.norm": ("linf",) * 3,
    "threat.eps": (0.03137254901960784,) * 3,
    "representation.kind": ("at",) * 3,
    "representation.layers": (TABLE_7,) * 3,
    # Tables 8 and 9
    "purifier.layer_convolutions": (3, 3, 4),
    # Table 14
    "training.attack_mix.pgd_steps": (40, 40, 40),
    "training.attack_mix.pgd_step_size": (0.01, 0.01, 0.01),
    "evaluation.pgd_eot_steps": (200, 200, 200),
    "evaluation.pgd_eot_step_size": (0.007, 0.007, 0.007),
    "evaluation.eot_draws": (20, 20, 20),
    "evaluation.apgd_steps": (100, 100, 100),
    "evaluation.square_queries": (5000, 5000, 5000),
    # Table 15
    "purifier.condition_features": (512, 512, 768),
    "purifier.latent_features": (128, 128, 192),
    # Table 16
    "training.optimiser.beta1": (0.9, 0.9, 0.9),
    "training.optimiser.beta2": (0.999, 0.999, 0.999),
    "training.optimiser.epsilon": (1e-8, 1e-8, 1e-8),
    "training.optimiser.weight_decay": (0.0, 0.0, 0.0),
    "training.optimiser.lookahead_decay": (0.8, 0.8, 0.8),
    "training.optimiser.lookahead_steps": (6, 6, 6),
    "training.learning_rate.initial": (5e-9, 5e-9, 5e-9),
    "training.learning_rate.plateau": (0.064, 0.064, 0.0128),
    "training.learning_rate.final": (4.346e-4, 4.346e-4, 1.378e-4),
    "training.learning_rate.warmup_epochs": (25, 25, 31),
    "training.learning_rate.plateau_epochs": (25, 25, 31),
    "training.learning_rate.annealing_epochs": (150, 150, 188),
    "training.beta_increase.first_epoch": (25, 25, 32),
    "training.beta_increase.last_epoch": (34, 34, 43),
    "training.epochs": (200, 200, 250),
    "training.batch_size": (5120, 2560, 1024),
    "training.attack_mix.adversarial_fraction": (0.5, 0.15, 0.01),
    "evaluation.n_samples": (8, 8, 8),
    "evaluation.aggregation": ("doubly-exponential",) * 3,
    "evaluation.second_kind": ("at",) * 3,
}


def value_at(recipe: Recipe, dotted: str) -> Any:
    value: Any = recipe
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("dotted", TABLES)
def test_the_papers_values(dotted: str) -> None:
    assert tuple(value_at(load_recipe(name), dotted) for name in PAPER) == TABLES[dotted]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_values_are_written_out(name: str) -> None:
    # A default that changes must not change what the paper's recipes say.
    text = read_recipe_file(name)
    for dotted in TABLES:
        if dotted not in ("classifier.at.name", "classifier.at.file"):
            assert f"{dotted.rpartition('.')[2]}:" in text, dotted


def test_table_7_has_26_layers() -> None:
    assert len(TABLE_7) == len(set(TABLE_7)) == 26
    assert TABLE_7[7:11] == (
        *("layer.0.block.3.conv_1", "layer.1.block.0.conv_0"),
        *("layer.1.block.0.conv_1", "layer.1.block.0.shortcut"),
    )


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("cifar10", ("0.9216", "0.6773", "0.8686", "0.7613", "0.7689", "159 minutes", "8 NVIDIA A100")),
        ("cifar100", ("0.7385", "0.3918", "0.6806", "0.6665", "138 minutes", "4 NVIDIA A100")),
        ("tinyimagenet200", ("0.6519", "0.3130", "0.5632", "0.5356", "213 minutes", "8 NVIDIA A100")),
    ],
)
def test_headers_hold_the_papers_figures(name: str, figures: tuple[str, ...]) -> None:
    header = read_recipe_file(name).split("\n\n")[0]
    assert "the paper's figures, none of them measured by us" in header
    for figure in figures:
        assert figure in header


# name: the recipe it follows, the classifier, figures of Table 18
TABLE_18 = {
    "cifar10-rebuffi2021": ("cifar10", "Rebuffi2021Fixing_28_10_cutmix_ddpm", "0.8733 0.6075 0.8152 0.7070"),
    "cifar10-gowal2020": ("cifar10", "Gowal2020Uncovering_28_10_extra", "0.8948 0.6280 0.8361 0.7335"),
    "cifar100-rebuffi2021": (
        "cifar100",
        "Rebuffi2021Fixing_28_10_cutmix_ddpm",
        "0.6241 0.3206 0.5723 0.5580",
    ),
}


@pytest.mark.parametrize("name", TABLE_18)
def test_table_18_changes_the_classifier_and_nothing_else(name: str) -> None:
    followed, classifier, figures = TABLE_18[name]
    recipe, base = load_recipe(name), load_recipe(followed)
    assert recipe.classifier.at is not None
    assert recipe.classifier.at.name == classifier
    own = {"name", "description", "reproduces", "classifier"}
    assert recipe.model_dump(exclude=own) == base.model_dump(exclude=own)
    apart = {"at", "clean", "training"}
    assert recipe.classifier.model_dump(exclude=apart) == base.classifier.model_dump(exclude=apart)
    assert recipe.reproduces.startswith("Table 18, ")
    header = read_recipe_file(name).split("\n\n")[0]
    for figure in figures.split():
        assert header.count(figure) == 1


@pytest.mark.parametrize("name", ["digits", "cifar10-small"])
def test_small_recipes_name_the_convolutions_of_a_depth_10_network_as_table_7_does(name: str) -> None:
    assert load_recipe(name).representation.layers == convolutions(1)
