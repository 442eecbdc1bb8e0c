"""Every system of the paper: its sizes, and the way from published files to a defence.

The files are fabricated in the layouts in which they are published, of small networks: the real ones have
36 million parameters and more.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from carso_cli import load_defence
from carso_cli.build import build_purifier, load_images, untrained_classifier
from carso_cli.classifiers import registry
from carso_cli.cli.app import run as carso
from carso_cli.data.cifar import cifar_class
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.release_format import PUBLISHED_PARTS, to_release
from carso_cli.defence.vae import Purifier
from carso_cli.io.paths import data_home, weights_home
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.shipped import list_recipes

SMALL = (
    "classifier.depth=10",
    "classifier.width=1",
    "purifier.condition_features=16",
    "purifier.latent_features=4",
    "representation.layers=[layer.0.block.0.conv_0, layer.1.block.0.shortcut, layer.2.block.0.conv_1]",
)
SHORT = ("--set=evaluation.scoring_draws=2", "--set=evaluation.n_samples=2")
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


# --- files as they are published, of small networks and random images ---


def classifier_files(recipe: Recipe) -> dict[str, nn.Module]:
    """Write each classifier where it is looked for, in the form in which it is published; return them."""
    made: dict[str, nn.Module] = {}
    for kind, weights in (("at", recipe.classifier.at), ("clean", recipe.classifier.clean)):
        if weights is None:
            continue
        torch.manual_seed(len(made))
        made[kind] = untrained_classifier(recipe).eval()
        state = made[kind].state_dict()
        if weights.source == "robustbench":
            # RobustBench's cache, whose models were saved in parallel wrappers.
            path = weights_home() / recipe.data.name / "Linf" / f"{weights.name}.pt"
            content = {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
        elif str(weights.file).endswith(".pt"):
            path = weights_home() / str(weights.file)
            content = {"model_state_dict": {f"module.0.{key}": tensor for key, tensor in state.items()}}
        else:
            path, content = Path(str(weights.file)), {}
        path.parent.mkdir(parents=True)
        torch.save(content, path) if content else save_file(state, path)
    return made


def release_files(recipe: Recipe, classifier: nn.Module, folder: Path) -> Purifier:
    """Write a purifier as its authors do; return it."""
    purifier = build_purifier(recipe, classifier)
    folder.mkdir()
    for part in PUBLISHED_PARTS:
        save_file(
            to_release(part, purifier.state_dict()), folder / f"wrn_28_10_data_author_{part}.safetensors"
        )
    return purifier


def pixels(count: int, size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def png(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def cifar_files(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write torchvision's folder: pickled batches, held against checksums that are made these files'."""
    facts: Any = cifar_class(recipe.data.name)
    folder = data_home() / facts.base_folder
    folder.mkdir(parents=True)
    labels, names = (
        ("labels", "label_names") if recipe.data.name == "cifar10" else ("fine_labels", "fine_label_names")
    )
    count = 2 * recipe.data.classes
    rows = pixels(count, 32).transpose(0, 3, 1, 2).reshape(count, -1)
    batch = {"data": rows, labels: [number % recipe.data.classes for number in range(count)]}

    def written(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        monkeypatch.setattr(facts, part, [[name, written(name, batch)] for name, _ in getattr(facts, part)])
    classes = [f"class {number}" for number in range(recipe.data.classes)]
    file = facts.meta["filename"]
    monkeypatch.setattr(facts, "meta", {**facts.meta, "md5": written(file, {names: classes})})


def tinyimagenet_file() -> None:
    """Write the official zip, with one validation image a class."""
    wnids = [f"n{number:08}" for number in range(200)]
    data_home().mkdir(parents=True)
    with zipfile.ZipFile(data_home() / "tiny-imagenet-200.zip", "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "\n".join(wnids))
        lines = []
        for number, image in enumerate(pixels(200, 64)):
            archive.writestr(f"tiny-imagenet-200/val/images/val_{number}.PNG", png(image))
            lines.append(f"val_{number}.PNG\t{wnids[number]}\t0\t0\t62\t62")
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "\n".join(lines))


def call(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert carso([str(word) for word in (*words, "--json")]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def accuracies(result: dict[str, Any]) -> dict[str, float]:
    return {row["target"]: row["accuracy"] for row in result["results"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ROBUSTBENCH, "tinyimagenet200", "cifar10-small"])
def test_published_files_give_a_defence_that_is_evaluated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tuple(replace(record, depth=10, width=1) for record in registry.RECORDS)
    monkeypatch.setattr(registry, "RECORDS", small)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name, SMALL)
    if recipe.data.name == "tinyimagenet200":
        tinyimagenet_file()
    else:
        cifar_files(recipe, monkeypatch)
    made = classifier_files(recipe)
    values = [f"--set={value}" for value in SMALL]
    found = call(capsys, "doctor", name, *values)["recipes"][0]
    # The authors' own purifier is for `carso reproduce` alone.
    assert {item["role"] for item in found["items"] if item["state"] != "present"} <= {"purifier"}
    test = load_images(recipe, "test", limit=20)
    images, labels = test.pixels(slice(None)), test.labels

    for kind, classifier in made.items():
        # The first classifier instance of Table 17: the one that the purifier is conditional on.
        first = [*values, f"--set=representation.kind={kind}"]
        purifier = release_files(recipe, classifier, tmp_path / f"release-{kind}")
        run = tmp_path / f"run-{kind}"
        call(capsys, "import-release", f"release-{kind}", "--recipe", name, "--run", run, *first)
        expected = Defence(classifier, purifier, recipe.representation.layers, second_classifier=made["at"])
        latents = expected.draw_latents(len(images), 2)
        output = load_defence(run, device="cpu")(images, latents=latents)
        torch.testing.assert_close(output, expected(images, latents=latents), rtol=1e-5, atol=1e-5)
        for second in made:
            options = ["--attack", "none", "--limit", 20, "--device", "cpu", *first]
            budget = [f"--set=evaluation.second_kind={second}", *SHORT]
            measured = accuracies(call(capsys, "evaluate", name, "--run", run, *options, *budget))
            right = (classifier(images).argmax(dim=1) == labels).float().mean().item()
            assert measured["classifier"] == pytest.approx(right)
            assert set(measured) == {"classifier", "defence"}


def test_the_names_are_those_of_the_registry() -> None:
    known = {(record.name, record.dataset) for record in registry.RECORDS if record.source == "robustbench"}
    used = {
        (str(recipe.classifier.at.name), recipe.data.name)
        for recipe in map(load_recipe, ROBUSTBENCH)
        if recipe.classifier.at is not None
    }
    assert used == known
