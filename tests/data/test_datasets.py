"""The one entry: names, splits, places and statements are checked before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carso_cli.data.datasets import DATASETS, find_data, load_split, resolve_source
from carso_cli.data.image_set import ImageSet
from carso_cli.errors import CarsoError, DataError, UsageError
from carso_cli.io.paths import data_home
from carso_cli.recipe.schema import Data
from carso_cli.runtime.reporter import SilentReporter


def load(name: str = "image-folder", split: str = "test", **options: Any) -> ImageSet:
    stated = {"classes": 2, "channels": 3, "image_size": 32, "root": None, "source": None}
    return load_split(name, split, **{**stated, "reporter": SilentReporter(), **options})


def test_the_names_are_those_of_the_recipe() -> None:
    # Images that are handed over have no name.
    assert {*DATASETS, "given"} == set(Data.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]  # a Literal


def test_the_digits_need_nothing() -> None:
    part = load("digits", "train", classes=10)
    assert part.images.shape == (1442, 3, 32, 32)
    assert load("digits", classes=10, channels=1, image_size=28).images.shape == (355, 1, 28, 28)


def test_a_source_is_found_under_the_root_the_home_and_the_working_directory(
    two_splits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(load(root=two_splits, source="test")) == 5
    assert len(load(root=tmp_path / "nowhere", source=str(two_splits / "test"))) == 5
    assert len(load(root=tmp_path / "nowhere", source="two-splits")) == 5
    data_home().mkdir(parents=True)
    two_splits.rename(data_home() / "moved")
    assert len(load(source="moved/test")) == 5


def test_the_root_comes_before_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("root/images", "images"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_source("images", tmp_path / "root") == tmp_path / "root" / "images"


def test_a_source_that_is_nowhere_names_the_places_and_the_nearest_name(
    two_splits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="tset is not there: looked for ") as caught:
        load(root=two_splits, source="tset")
    assert f"{two_splits / 'tset'} or {tmp_path / 'tset'}" in caught.value.message
    assert caught.value.hint == "did you mean 'test'?"
    with pytest.raises(DataError) as caught:
        load(root=two_splits, source="unlike.zip")
    assert "data.root" in caught.value.hint


def test_the_other_split_is_compared_where_it_is_at_hand(
    two_splits: Path, zip_up: Callable[..., Path], tmp_path: Path
) -> None:
    zip_up(two_splits / "test", tmp_path / "test.zip")
    (two_splits / "train" / "cat").rename(two_splits / "train" / "dog")
    zip_up(two_splits / "train", tmp_path / "train.zip")
    with pytest.raises(DataError, match=r"test\.zip lacks 'dog'; .*train\.zip lacks 'cat'"):
        load(root=tmp_path, source="test.zip", other_source="train.zip")
    assert len(load(root=tmp_path, source="test.zip", other_source="absent.zip")) == 5


@pytest.mark.parametrize(
    ("name", "options", "kind", "message", "hint"),
    [
        ("cifar-10", {}, UsageError, "'cifar-10' is no data set; there are digits, ", "mean 'cifar10'"),
        ("digits", {"split": "tests"}, UsageError, "'tests' is no split", "did you mean 'test'?"),
        ("digits", {"classes": 9}, DataError, "digits has 10 classes; 9 are stated", "set data.classes=10"),
        (
            "cifar100",
            {"classes": 10},
            DataError,
            "cifar100 has 100 classes; 10 are stated",
            "data.classes=100",
        ),
        (
            "cifar10",
            {"classes": 10, "image_size": 64},
            DataError,
            "the images of cifar10 are 32x32; 64x64 is stated",
            "set data.image_size=32",
        ),
        (
            "tinyimagenet200",
            {"classes": 200},
            DataError,
            "the images of tinyimagenet200 are 64x64; 32x32 is stated",
            "set data.image_size=64",
        ),
        ("digits", {"classes": 10, "channels": 2}, UsageError, "2 channels were asked for", ""),
        (
            "cifar10",
            {"classes": 10, "source": "a.zip"},
            UsageError,
            "cifar10 takes no data.test",
            "image-folder",
        ),
        ("image-folder", {}, UsageError, "an image-folder needs data.test", ""),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_the_next_step(
    name: str, options: dict[str, Any], kind: type[CarsoError], message: str, hint: str
) -> None:
    with pytest.raises(kind) as caught:
        load(name, **options)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_find_data_says_what_is_here(two_splits: Path, tmp_path: Path) -> None:
    assert find_data("digits", root=None) == data_home()
    assert find_data("cifar10", root=tmp_path) is None
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert find_data("cifar10", root=tmp_path) == tmp_path / "cifar-10-batches-py"
    assert find_data("tinyimagenet200", root=tmp_path) is None
    (tmp_path / "tiny-imagenet-200.zip").touch()
    assert find_data("tinyimagenet200", root=tmp_path) == tmp_path / "tiny-imagenet-200.zip"
    assert find_data("image-folder", root=two_splits, source="test") == two_splits / "test"
    assert find_data("image-folder", root=two_splits, source="absent") is None
    assert find_data("image-folder", root=two_splits) is None


@pytest.mark.slow
@pytest.mark.shared
def test_the_real_zip_files_load_by_name(shared_folder: Path) -> None:
    root = shared_folder / "data"
    part = load(root=root, source="cifar10-test.zip", other_source="cifar10-train.zip", classes=10)
    assert len(part) == 10_000
    tiny = load("tinyimagenet200", root=root, classes=200, image_size=64, channels=1)
    assert tiny.images.shape == (2000, 1, 64, 64)
