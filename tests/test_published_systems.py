"""Every system of the paper: its sizes, and the way from published files to a defence.

The files are fabricated in the layouts in which they are published, of small networks: the real ones have
36 million parameters and more.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from carso_cli import load_defence
from carso_cli.build import build_purifier, untrained_classifier
from carso_cli.classifiers import registry
from carso_cli.defence import Defence
from carso_cli.home import weights_home
from carso_cli.purifier.release import PUBLISHED_PARTS, to_release
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.shipped import list_recipes
from carso_cli.reporter import SilentReporter
from carso_cli.workflows.import_release import import_release
from carso_cli.workflows.inventory import take_stock

SMALL = (
    "classifier.depth=10",
    "classifier.width=1",
    "purifier.condition_features=16",
    "purifier.latent_features=4",
    "representation.layers=[layer.0.block.0.conv_0, layer.1.block.0.shortcut, layer.2.block.0.conv_1]",
)
ROBUSTBENCH = ("cifar10", "cifar100", "cifar10-rebuffi2021", "cifar10-gowal2020", "cifar100-rebuffi2021")

# Parameters: layer encoders, representation FC, joint FC, heads, decoder; the sizes of Appendix C
SIZES_32 = (28_442_960, 75_285_504, 164_096, 33_024, 2_455_107)
SIZES_64 = (28_782_600, 289_998_336, 737_664, 74_112, 4_914_979)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", [recipe.name for recipe in list_recipes()])
def test_every_recipe_builds_on_the_meta_device(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        classifier = untrained_classifier(recipe)
        purifier = build_purifier(recipe, classifier)
    if (recipe.classifier.depth, recipe.classifier.width) != (28, 10):
        return
    heads = count(purifier.to_mean) + count(purifier.to_log_variance)
    encoder = purifier.representation_encoder
    assert count(purifier.input_encoder) == 846
    assert (
        count(encoder.layer_encoders),
        count(encoder.compressor),
        count(purifier.joint_encoder),
        heads,
        count(purifier.decoder),
    ) == (SIZES_64 if recipe.data.image_size == 64 else SIZES_32)


def fabricate(recipe: Recipe, folder: Path) -> Defence:
    """Write the classifier where it is published to, the purifier into `folder`; return both, as they are."""
    torch.manual_seed(7)
    classifier = untrained_classifier(recipe).eval()
    weights = recipe.classifier.at
    assert weights is not None
    state = classifier.state_dict()
    if weights.source == "robustbench":
        path = weights_home() / recipe.data.name / "Linf" / f"{weights.name}.pt"
        content = {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
    else:
        path = weights_home() / str(weights.file)
        content = {"model_state_dict": {f"module.0.{key}": tensor for key, tensor in state.items()}}
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    purifier = build_purifier(recipe, classifier)
    folder.mkdir()
    for part in PUBLISHED_PARTS:
        save_file(
            to_release(part, purifier.state_dict()), folder / f"wrn_28_10_data_author_{part}.safetensors"
        )
    return Defence(classifier, purifier, recipe.representation.layers)


@pytest.mark.parametrize("name", [*ROBUSTBENCH, "tinyimagenet200"])
def test_published_files_give_a_defence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tuple(replace(record, depth=10, width=1) for record in registry.RECORDS)
    monkeypatch.setattr(registry, "RECORDS", small)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name, SMALL)
    expected = fabricate(recipe, tmp_path / "release")
    at = next(item for item in take_stock(recipe) if item.role == "at")
    assert (at.state, at.what.split(" ")[0]) == (
        "present",
        Path(at.place).name.removesuffix(".pt") + ("" if name in ROBUSTBENCH else ".pt"),
    )
    import_release(tmp_path / "release", recipe, run=tmp_path / "run", reporter=SilentReporter())
    defence = load_defence(tmp_path / "run", device="cpu")
    size = recipe.data.image_size
    images = torch.rand(2, 3, size, size)
    latents = expected.draw_latents(2)
    output = defence(images, latents=latents)
    assert output.shape == (2, recipe.data.classes)
    torch.testing.assert_close(output, expected(images, latents=latents), rtol=1e-5, atol=1e-5)


def test_the_names_are_those_of_the_registry() -> None:
    known = {(record.name, record.dataset) for record in registry.RECORDS if record.source == "robustbench"}
    used = {
        (str(recipe.classifier.at.name), recipe.data.name)
        for recipe in map(load_recipe, ROBUSTBENCH)
        if recipe.classifier.at is not None
    }
    assert used == known
