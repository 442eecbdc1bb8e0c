"""The diagnosis: what is present, missing or damaged, and that it looks where the loaders look."""

from __future__ import annotations

import io
import json
import shutil
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carso_cli.build import build_classifier, load_images
from carso_cli.classifiers.registry import SHIPPED_FOLDER, find_record
from carso_cli.data import cifar
from carso_cli.errors import DataError, RecipeError, WeightsError
from carso_cli.io.paths import data_home, weights_home
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.tools import assets
from carso_cli.tools import doctor as module
from carso_cli.tools.assets import Item, take_stock
from carso_cli.tools.doctor import doctor

PAPER = ("cifar10", "cifar100", "tinyimagenet200", "cifar10-gowal2020", "cifar10-rebuffi2021")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def stock(name: str, role: str, *overrides: str) -> Item:
    return next(item for item in take_stock(load_recipe(name, overrides)) if item.role == role)


# --- the bare machine ---


@pytest.mark.parametrize("name", PAPER)
def test_a_bare_machine_lacks_data_and_weights(name: str) -> None:
    for role in ("data", "at"):
        item = stock(name, role)
        assert (item.state, item.required) == ("missing", True)
        assert item.source.startswith("http")
        assert item.place in item.looked
        assert Path(item.place).is_relative_to(data_home() if role == "data" else weights_home())


def test_digits_needs_nothing() -> None:
    assert [item.state for item in take_stock(load_recipe("digits"))] == ["present"] * 3


@pytest.mark.parametrize("name", ["cifar10", "cifar100-rebuffi2021", "tinyimagenet200", "cifar10-small"])
def test_it_looks_where_the_loader_looks(name: str) -> None:
    item = stock(name, "at")
    with pytest.raises(WeightsError) as caught:
        build_classifier(load_recipe(name), "at")
    assert all(place in caught.value.message for place in item.looked)


def test_clean_classifiers_are_needed_for_the_ablation_only() -> None:
    item = stock("cifar10", "clean")
    assert (item.state, item.required) == ("missing", False)
    assert item.command == "carso train-classifier cifar10 --kind clean"
    assert stock("cifar10", "clean", "representation.kind=clean").required


# --- data ---


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 with the checksums of two tiny files in the place of the published ones."""
    facts = types.SimpleNamespace(
        url="https://example.org/c.tar.gz",
        filename="c.tar.gz",
        tgz_md5="900150983cd24fb0d6963f7d28e17f72",  # of b"abc"
        base_folder="batches",
        train_list=[("one", "900150983cd24fb0d6963f7d28e17f72")],
        test_list=[],
        meta={"filename": "meta", "md5": "900150983cd24fb0d6963f7d28e17f72"},
    )
    monkeypatch.setattr(assets, "cifar_class", lambda _: facts)


def fill(*names: str, content: bytes = b"abc") -> None:
    for name in names:
        path = data_home() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.usefixtures("small_cifar")
def test_cifar_is_held_against_its_checksums() -> None:
    assert stock("cifar10", "data").state == "missing"
    fill("c.tar.gz", content=b"abd")
    assert stock("cifar10", "data").state == "damaged"
    fill("c.tar.gz")
    item = stock("cifar10", "data")
    assert (item.state, item.note) == ("present", "unpacked on first use")
    fill("batches/one", "batches/meta")
    item = stock("cifar10", "data")
    assert (item.state, item.place) == ("present", str(data_home() / "batches"))
    fill("batches/one", content=b"cut")
    item = stock("cifar10", "data")
    assert item.state == "damaged"
    assert item.note.startswith("missing or not of the published checksum: one; ")


def test_torchvision_states_the_facts_that_are_used() -> None:
    for name in cifar.FOLDERS:
        facts = cifar.cifar_class(name)
        assert all(len(md5) == 32 for _, md5 in [*facts.train_list, *facts.test_list])
        assert len(facts.meta["md5"]) == 32
        assert facts.base_folder == cifar.FOLDERS[name]


def archive(damaged: bool = False) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as members:
        members.writestr("tiny-imagenet-200/wnids.txt", "n01443537\n")
    content = stream.getvalue()
    return content.replace(b"n01443537\n", b"n01443538\n") if damaged else content


def test_a_zip_is_read_through() -> None:
    fill("tiny-imagenet-200.zip", content=archive())
    item = stock("tinyimagenet200", "data")
    assert item.state == "present"
    assert "not the published file" in item.note
    fill("tiny-imagenet-200.zip", content=archive(damaged=True))
    assert stock("tinyimagenet200", "data").note == "tiny-imagenet-200/wnids.txt in it is damaged"
    fill("tiny-imagenet-200.zip", content=archive()[:-30])
    item = stock("tinyimagenet200", "data")
    assert item.state == "damaged"
    assert "cannot be read as a zip file" in item.note


def test_an_image_folders_zips_are_looked_for_one_by_one(tmp_path: Path) -> None:
    # As cifar10-small was until it read CIFAR-10 by name, and as runs of it are stored.
    values = ("data.name=image-folder", "data.train=cifar10-train.zip", "data.test=cifar10-test.zip")
    recipe = load_recipe("cifar10-small", values)
    fill("cifar10-train.zip", content=archive())
    items = [item for item in take_stock(recipe) if item.role == "data"]
    states = {item.what: item.state for item in items}
    assert states == {"cifar10-train.zip": "present", "cifar10-test.zip": "missing"}
    with pytest.raises(DataError) as caught:
        load_images(recipe, "test", reporter=SilentReporter())
    assert all(place in caught.value.message for place in items[1].looked)
    elsewhere = stock("cifar10-small", "data", *values, f"data.root={tmp_path}")
    assert (elsewhere.state, elsewhere.place) == ("missing", str(tmp_path / "cifar10-train.zip"))


# --- weights ---


def saved_by_torch(path: Path) -> None:
    torch.save({"weight": torch.arange(100.0)}, path)


def saved_long_ago(path: Path) -> None:
    torch.save({"weight": torch.arange(100.0)}, path, _use_new_zipfile_serialization=False)


def web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>Quota exceeded</html>")


def cut_off(path: Path) -> None:
    saved_by_torch(path)
    path.write_bytes(path.read_bytes()[:-40])


def flipped(path: Path) -> None:
    saved_by_torch(path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor(50.0).numpy().tobytes())] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("make", "state", "note"),
    [
        (saved_by_torch, "present", ""),
        (saved_long_ago, "present", ""),
        (web_page, "damaged", "no PyTorch file; perhaps the web page that offers it"),
        (cut_off, "damaged", "no PyTorch file"),
        (flipped, "damaged", "/data/0 in it is damaged"),
    ],
)
@pytest.mark.parametrize("cache", ["home", "models"])
def test_robustbenchs_cache(make: Callable[[Path], None], state: str, note: str, cache: str) -> None:
    record = find_record("robustbench", "Gowal2020Uncovering_28_10_extra", "cifar10")
    path = (weights_home() if cache == "home" else Path("models")) / record.file
    path.parent.mkdir(parents=True)
    make(path)
    item = stock("cifar10-gowal2020", "at")
    assert (item.state, item.place) == (state, str(path))
    assert (note in item.note) if note else not item.note
    assert (item.source, item.download) == (record.published.page, record.published.url)
    assert item.command == "carso doctor cifar10-gowal2020 --fetch"


def test_the_published_file_of_tinyimagenet() -> None:
    item = stock("tinyimagenet200", "at")
    assert item.source.endswith("/checkpoint/tiny_linf_wrn28-10.pt")
    assert item.place == str(weights_home() / "wang2023_tinyimagenet200_wrn28-10.pt")
    saved_by_torch(Path(item.looked[0]))
    assert stock("tinyimagenet200", "at").state == "present"


def test_our_own_weights_are_held_against_their_checksum() -> None:
    path = Path(stock("cifar10-small", "at").place)
    path.parent.mkdir(parents=True)
    save_tensors(path, {"weight": torch.arange(100.0)}, {"kind": "at"})
    assert stock("cifar10-small", "at").state == "present"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    item = stock("cifar10-small", "at")
    assert item.state == "damaged"
    assert "do not match the checksum" in item.note


def test_a_shipped_classifier_is_held_against_its_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(SHIPPED_FOLDER, tmp_path / "shipped")
    monkeypatch.setattr("carso_cli.classifiers.registry.SHIPPED_FOLDER", tmp_path / "shipped")
    path = tmp_path / "shipped" / "digits-at.safetensors"
    assert stock("digits", "at").state == "present"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert stock("digits", "at").state == "damaged"
    path.unlink()
    assert stock("digits", "at").state == "missing"


def test_an_entry_point_that_no_package_offers() -> None:
    overrides = ("classifier.family=external", "classifier.at.source=entry-point", "classifier.at.name=mine")
    item = stock("digits", "at", *overrides)
    assert (item.state, item.place) == ("missing", "entry point mine of carso.classifiers")


@pytest.mark.usefixtures("quick")
def test_the_next_step_is_one_that_does_something() -> None:
    overrides = ["classifier.family=external", "classifier.at.source=entry-point", "classifier.at.name=mine"]
    (found,) = doctor("digits", overrides)["recipes"]
    assert found["next"].endswith("offers it into this environment: entry point mine of carso.classifiers")
    # What is damaged is not downloaded again over it.
    record = find_record("robustbench", "Gowal2020Uncovering_28_10_extra", "cifar10")
    path = weights_home() / record.file
    path.parent.mkdir(parents=True)
    web_page(path)
    (found,) = doctor("cifar10-gowal2020")["recipes"]
    assert found["next"] == f"remove {path}: it is damaged"


# --- the whole ---


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIBRARIES", {"torch": ("torch", True), "sklearn": ("scikit-learn", False)})


@pytest.mark.usefixtures("quick")
def test_the_diagnosis_is_json() -> None:
    found: dict[str, Any] = json.loads(json.dumps(doctor()))
    assert (found["chosen"], found["ready"]) == ("digits", True)
    ready = {recipe["name"]: recipe["ready"] for recipe in found["recipes"]}
    assert ready.pop("digits")
    assert len(ready) >= 7
    assert [name for name, is_ready in ready.items() if is_ready] == ["digits-clean"]
    assert {fault["name"] for fault in found["faults"]} >= {"autoattack", "zero_gradients"}
    assert found["devices"][0]["threads"] == torch.get_num_threads()
    assert [folder["role"] for folder in found["folders"]] == ["CARSO_HOME", "working folder"]
    assert all(folder["writable"] and folder["free"] > 0 for folder in found["folders"])
    assert found["memory"]["total"] > 0


@pytest.mark.usefixtures("quick")
def test_one_recipe() -> None:
    found = doctor("cifar10", ("classifier.clean=null",))
    assert [recipe["name"] for recipe in found["recipes"]] == ["cifar10"]
    assert (found["chosen"], found["ready"]) == ("cifar10", False)
    with pytest.raises(RecipeError, match="no shipped recipe 'cifar11'"):
        doctor("cifar11")


def test_nothing_is_downloaded_or_written() -> None:
    before = sorted(Path().rglob("*"))
    for name in PAPER:
        take_stock(load_recipe(name))
    assert sorted(Path().rglob("*")) == before
    assert not data_home().exists()
    assert not weights_home().exists()


def test_a_broken_library_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "carso_broken.py").write_text("raise OSError('libcudart.so.13: cannot open\\nmore')")
    monkeypatch.syspath_prepend(str(tmp_path))
    libraries = {"carso_broken": ("carso-broken", True), "torch": ("torch", True)}
    monkeypatch.setattr(module, "_LIBRARIES", libraries)
    found = doctor()
    error = "OSError: libcudart.so.13: cannot open"
    assert found["libraries"][0] == dict(name="carso-broken", version=None, needed=True, error=error)
    assert found["ready"] is False
    errors = {recipe["error"] for recipe in found["recipes"]}
    assert errors == {"not looked at: carso-broken cannot be imported"}


def test_recipes_cannot_be_read_without_their_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIBRARIES", {"carso_absent": ("pyyaml", True)})
    error = "not looked at: pyyaml cannot be imported"
    expected = {"name": "cifar10", "ready": False, "items": [], "error": error, "next": ""}
    assert doctor("cifar10")["recipes"] == [expected]


@pytest.mark.usefixtures("quick")
def test_a_recipe_whose_data_library_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = {recipe["name"]: recipe for recipe in doctor()["recipes"]}
    assert "torchvision" in found["cifar10"]["error"]
    assert found["digits"]["ready"] is True
