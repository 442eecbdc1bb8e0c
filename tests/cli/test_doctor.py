"""`carso doctor` as a new user runs it: one screen, 80 columns, an exit code."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
import yaml

from carso_cli.classifiers.registry import ClassifierRecord, Published
from carso_cli.recipe.load import load_recipe, read_recipe_file
from carso_cli.recipe.shipped import find_recipe, list_recipes
from carso_cli.tools import assets
from carso_cli.tools import doctor as workflow

CHECKOUT = Path(__file__).resolve().parents[2]


class Site(Protocol):
    url: str
    content: bytes
    cut_after: int | None
    asked: list[str | None]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workflow, "_LIBRARIES", {"torch": ("torch", True)})
    monkeypatch.chdir(tmp_path)
    # A short home, so that the width of the lines is ours.
    monkeypatch.setenv("CARSO_HOME", "home")
    monkeypatch.setenv("COLUMNS", "80")


def test_a_bare_machine_in_one_screen(carso: Any) -> None:
    lines = carso("doctor").lines
    assert len(lines) <= 40
    assert max(len(line.rstrip()) for line in lines) <= 80
    rows = {line.split()[0]: line.partition(" ")[2].strip() for line in lines if line.strip()}
    for recipe in list_recipes():
        name = recipe.path.stem
        if load_recipe(name).training.initial:
            assert name not in rows
        elif not name.startswith("digits"):
            assert rows[name].split("  ")[0] == "data, weights"
            assert rows[name].endswith(f"  carso doctor {name} --fetch")
    assert rows["digits"].split() == ["nothing", "carso", "quickstart"]
    assert lines[-1] == "next:  carso quickstart"


@pytest.mark.parametrize(
    ("recipe", "sources"),
    [
        (
            "cifar10",
            [
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "https://drive.google.com/file/d/1-AaTrYt23WJFR22hXgBd-i6kjpsz6Hf2",
            ],
        ),
        (
            "tinyimagenet200",
            [
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                "https://huggingface.co/wzekai99/DM-Improves-AT/resolve/main/checkpoint/tiny_linf_wrn28-10.pt",
            ],
        ),
    ],
)
def test_what_to_fetch_by_hand(recipe: str, sources: list[str], carso: Any) -> None:
    lines = [line.strip() for line in carso("doctor", recipe, code=3).lines]
    for source in sources:
        place = lines[lines.index(f"from {source}") + 1]
        assert place.startswith("to home/")
        assert f"looked for {place.removeprefix('to ')}" in lines
    assert f"$ carso train-classifier {recipe} --kind clean" in lines
    assert lines[-1] == f"next:  carso doctor {recipe} --fetch"


def test_a_damaged_file_comes_first(carso: Any) -> None:
    archive = Path("home/data/cifar-10-python.tar.gz")
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"half")
    assert carso("doctor", "cifar10", code=3).lines[-1] == f"next:  remove {archive}: it is damaged"


def test_a_recipe_of_ones_own(carso: Any) -> None:
    changes = {"family": "torchvision", "architecture": "resnet18", "at": {"source": "file", "file": "w.pt"}}
    recipe = yaml.safe_load(read_recipe_file("digits")) | {"name": "own", "classifier": changes}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    assert carso("doctor", "mine.yaml", code=3).lines[-1] == "next:  put w.pt into home/weights"
    Path("home/weights").mkdir(parents=True)
    torch.save({"weight": torch.ones(1)}, "home/weights/w.pt")
    assert carso("doctor", "mine.yaml").lines[-1] == "next:  carso train-purifier mine.yaml"
    changes["architecture"] = "resnet19"
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    assert (
        "torchvision has no 'resnet19'; did you mean 'resnet18'" in carso("doctor", "mine.yaml", code=3).out
    )


def test_the_purifier_that_training_starts_from(carso: Any) -> None:
    for recipe, command in (
        ("digits-skip", "carso train-purifier digits"),
        ("digits-no-latent", "carso recipes show digits-no-latent"),
    ):
        assert carso("doctor", recipe, code=3).lines[-1] == f"next:  {command}"
        carso("train-purifier", recipe, "--device", "cpu", code=3, err=f"next: {command}")
    elsewhere = "training.initial=other/digits/purifier.safetensors"
    assert (
        carso("doctor", "digits-skip", "--set", elsewhere, code=3).lines[-1]
        == "next:  carso recipes show digits-skip"
    )
    text = find_recipe("digits-skip").read_text().replace("name: digits-skip", "name: own")
    Path("own.yaml").write_text(f"{text}\ntraining:\n  initial: other/purifier.safetensors\n")
    assert carso("doctor", "own.yaml", code=3).lines[-1] == "next:  put purifier.safetensors into other"


# --- --fetch ---


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, site: Site, tmp_path: Path) -> Site:
    """A server that offers one PyTorch file, as CIFAR-10's archive and as every classifier."""
    torch.save({"weight": torch.arange(100.0)}, tmp_path / "offered.pt")
    site.content = (tmp_path / "offered.pt").read_bytes()
    facts = types.SimpleNamespace(
        url=site.url,
        filename="c.tar.gz",
        tgz_md5=hashlib.md5(site.content).hexdigest(),
        base_folder="batches",
        train_list=[],
        test_list=[],
        meta={"filename": "meta", "md5": ""},
    )
    monkeypatch.setattr(assets, "cifar_class", lambda _: facts)
    offered = property(lambda _: Published(site.url, "https://example.org/page"))
    monkeypatch.setattr(ClassifierRecord, "published", offered)
    return site


def test_fetching_what_a_recipe_lacks(published: Site, carso: Any) -> None:
    captured = carso("doctor", "cifar10", "--fetch", "--json")
    found = json.loads(captured.out)["recipes"][0]
    required = [item["state"] for item in found["items"] if item["required"]]
    assert required == ["present", "present"]
    assert found["next"] == "carso train-purifier cifar10"
    assert "downloaded: CIFAR-10, Cui2023Decoupled_WRN-28-10 (cifar10)" in captured.err
    weights = Path("home/weights/cifar10/Linf/Cui2023Decoupled_WRN-28-10.pt")
    assert weights.read_bytes() == published.content
    assert Path("home/data/c.tar.gz").read_bytes() == published.content
    assert len(published.asked) == 2
    # A second call finds everything there.
    assert "nothing, everything is here already" in carso("doctor", "cifar10", "--fetch").err
    assert len(published.asked) == 2
    # What is changed afterwards is found by the checksum of the download.
    weights.write_bytes(published.content[:-1] + b"?")
    assert (
        "it is not what was downloaded: its SHA-256 is not that in" in carso("doctor", "cifar10", code=3).out
    )


def test_fetching_goes_on_where_it_stopped(published: Site, carso: Any) -> None:
    published.cut_after = 700
    carso("doctor", "cifar10", "--fetch", code=3, err="the connection ended after 700 of")
    assert not Path("home/data/c.tar.gz").exists()
    published.cut_after = None
    carso("doctor", "cifar10", "--fetch")
    assert published.asked == [None, "bytes=700-", None]
    assert Path("home/data/c.tar.gz").read_bytes() == published.content


def test_fetching_needs_a_recipe(carso: Any) -> None:
    carso("doctor", "--fetch", code=2, err="--fetch needs a RECIPE")


# --- the rest ---


def test_json(carso: Any) -> None:
    found: dict[str, Any] = carso("doctor", "tinyimagenet200", "--json", code=3).json
    assert found["ready"] is False
    assert [item["role"] for item in found["recipes"][0]["items"]] == ["data", "at", "clean", "purifier"]


def test_an_unknown_recipe(carso: Any) -> None:
    carso("doctor", "cifar11", code=2, err="no shipped recipe 'cifar11'; did you mean 'cifar10'")


@pytest.mark.slow
def test_a_broken_installation_is_told_and_not_met(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libfoo.so: cannot open shared object file')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(CHECKOUT)))}
    done = subprocess.run(
        [sys.executable, "-m", "carso_cli", "doctor"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert "torch: ImportError: libfoo.so: cannot open shared object file" in " ".join(done.stdout.split())
    assert "tinyimagenet200: not looked at: torch cannot be imported\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "next:  pip install --force-reinstall torch"
    assert "Traceback" not in done.stderr
