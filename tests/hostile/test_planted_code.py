"""Code planted wherever a file is read: it never runs, and the file is named."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carso_cli.build import build_classifier, build_purifier, classifier_fingerprint
from carso_cli.classifiers.registry import RECORDS
from carso_cli.data import cache as decoded_cache
from carso_cli.data.cifar import cifar_class
from carso_cli.errors import CarsoError
from carso_cli.io.json_files import write_json
from carso_cli.io.paths import data_home, weights_home
from carso_cli.recipe.load import dump_recipe, load_recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runtime.reporter import SilentReporter
from tests.hostile.conftest import Call


class Planted:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(autouse=True)
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Path]:
    """What planted code would make. Each test works in `tmp_path`, and ends without it but for the first."""
    monkeypatch.chdir(tmp_path)
    yield (made := tmp_path / "planted-code-ran")
    assert made.exists() == (request.function is test_the_plant_is_alive)


KINDS = ("pickle", "torch zip", "torch legacy", "numpy")


def plant(kind: str, mark: Path) -> bytes:
    """Return a file that runs code where it is unpickled without care."""
    stream = io.BytesIO()
    content = {"state_dict": {"weight": Planted(mark)}}
    if kind == "pickle":
        pickle.dump(content, stream)
    elif kind == "numpy":
        np.save(stream, np.array([Planted(mark)], dtype=object), allow_pickle=True)
    else:
        torch.save(content, stream, _use_new_zipfile_serialization=kind == "torch zip")
    return stream.getvalue()


@pytest.fixture(params=KINDS)
def planted(request: pytest.FixtureRequest, mark: Path) -> bytes:
    return plant(request.param, mark)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plant_is_alive(kind: str, mark: Path) -> None:
    # Without this, every other test here could pass for a plant that is dead.
    stream = io.BytesIO(plant(kind, mark))
    if kind == "pickle":
        pickle.load(stream)
    elif kind == "numpy":
        np.load(stream, allow_pickle=True)
    else:
        torch.load(stream, weights_only=False)


PLACES = (
    *("purifier.safetensors", "state.safetensors", "previous-state.safetensors"),
    *("recipe.yaml", "environment.json", "metrics.jsonl"),
    *(f"evaluation/pgd-1/{name}" for name in ("settings.json", "records.jsonl", "summary.json")),
    *("attacks/pgd-defence.safetensors", "ablations/first-second-pgd.json"),
)


@pytest.mark.parametrize(("number", "place"), list(enumerate(PLACES)), ids=PLACES)
def test_in_every_file_of_a_run(carso: Call, mark: Path, number: int, place: str) -> None:
    _make_run(Path("runs/x"))
    path = Path("runs/x", place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plant(KINDS[number % len(KINDS)], mark))
    for argv in (
        ["report", "runs/x", "--html", "page.html"],
        ["evaluate", "--run", "runs/x", "--attack", "none", "--limit", "2"],
        ["train-purifier", "digits", "--run", "runs/x", "--resume"],
        ["predict", "runs/x", "--run", "runs/x"],
    ):
        code, said = carso(argv)
        assert code in (0, 2, 3, 5), said
        assert not mark.exists(), argv
    if place.endswith(("purifier.safetensors", "recipe.yaml")):
        assert code
        assert Path(place).name in said


def _make_run(run: Path) -> None:
    recipe = load_recipe("digits")
    classifier = build_classifier(recipe, "at")
    run.mkdir(parents=True)
    metadata = {
        "layers": list(recipe.representation.layers),
        "classifier": classifier_fingerprint(classifier),
    }
    save_tensors(run / "purifier.safetensors", build_purifier(recipe, classifier).state_dict(), metadata)
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    write_json(run / "environment.json", {"classes": [str(label) for label in range(10)]})


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "weights"])
def test_in_weights_that_a_recipe_names(carso: Call, planted: bytes, name: str) -> None:
    Path(name).write_bytes(planted)
    chosen = f"classifier.at={{source: file, file: {name}}}"
    code, said = carso(["train-purifier", "digits", "--set", chosen, "--run", "run"])
    assert code == 3
    assert name in said


@pytest.mark.parametrize("home", ["weights", "cache of robustbench"])
def test_in_robustbench_s_cache(carso: Call, planted: bytes, home: str) -> None:
    folder = weights_home() if home == "weights" else Path("models")
    for dataset in ("cifar10", "cifar100"):
        place = folder / dataset / "Linf"
        place.mkdir(parents=True)
        for name in (record.name for record in RECORDS if record.source == "robustbench"):
            (place / f"{name}.pt").write_bytes(planted)
    for recipe in ("cifar10", "cifar100-rebuffi2021"):
        code, said = carso(["evaluate", recipe, "--target", "classifier", "--attack", "none", "--run", "run"])
        assert code == 3, said
        assert ".pt" in said
        told = ("holds more than tensors", "not a readable PyTorch file", "is a NumPy array")
        assert any(words in said for words in told)
        carso(["doctor", recipe])


def test_in_cifar_s_batches(carso: Call, planted: bytes) -> None:
    folder = data_home() / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(planted)
    (data_home() / "cifar-10-python.tar.gz").write_bytes(planted)
    code, said = carso(["train-classifier", "cifar10", "--run", "run"])
    assert code == 3, said
    assert "checksum" in said


def test_in_cifar_s_batches_were_their_checksums_forged(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = cifar_class("cifar10")
    names = [name for name, _ in (*dataset.train_list, *dataset.test_list)]
    (tmp_path / dataset.base_folder).mkdir()
    for name in (*names, "batches.meta"):
        (tmp_path / dataset.base_folder / name).write_bytes(plant("pickle", mark))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    with pytest.raises(pickle.UnpicklingError, match="neither an array nor a plain container"):
        dataset(root=str(tmp_path), train=True, download=False)


def test_in_the_cache_of_decoded_images(planted: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "images.npz"
    with zipfile.ZipFile(archive, "w") as members:
        for name in ("key.npy", "images.npy", "checksum.npy"):
            members.writestr(name, planted)
    for path in (archive, Path(shutil.copy(archive, tmp_path / "bare.npz"))):
        assert decoded_cache._read(path, "key", (1, 1, 28, 28), SilentReporter()) is None
    archive.write_bytes(planted)
    assert decoded_cache._read(archive, "key", (1, 1, 28, 28), SilentReporter()) is None


@pytest.fixture
def planted_module(mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("planted_module.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(mark.parent))


def _texts(value: Any, path: tuple[str, ...] = ()) -> list[str]:
    if isinstance(value, dict):
        return [place for key, item in value.items() for place in _texts(item, (*path, key))]
    return [".".join(path)]


@pytest.mark.parametrize("key", _texts(load_recipe("digits").model_dump(mode="json")))
@pytest.mark.usefixtures("planted_module")
def test_no_key_of_a_recipe_names_code_to_import(key: str) -> None:
    for name in ("planted_module:main", "planted_module.main"):
        with suppress(CarsoError):
            recipe = load_recipe("digits", [f"{key}={name}"])
            # The part of a run that code could hide behind.
            build_classifier(recipe, recipe.representation.kind)
        assert "planted_module" not in sys.modules


@pytest.mark.usefixtures("planted_module")
@pytest.mark.parametrize("name", ["planted_module:x", "os:system"])
def test_an_entry_point_is_looked_up_among_installed_packages_only(carso: Call, name: str) -> None:
    chosen = f"classifier.at={{source: entry-point, name: {name}}}"
    change = ["--set", "classifier.family=external", "--set", chosen]
    code, said = carso(["train-purifier", "digits", "--run", "run", *change])
    assert code == 2
    assert "no installed package offers" in said


@pytest.mark.parametrize("tag", ["!!python/object/apply:builtins.open", "!!python/object/new:builtins.open"])
def test_recipes_are_plain_values(carso: Call, mark: Path, tag: str) -> None:
    text = dump_recipe(load_recipe("digits"))
    Path("mine.yaml").write_text(text.replace("seed: 0", f"seed: {tag} [{mark}, w]"))
    code, said = carso(["recipes", "validate", "mine.yaml"])
    assert code == 2
    assert "seed" in said
