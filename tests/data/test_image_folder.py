"""Image folders and zip files: layouts, class order, and every fault before any work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carso_cli.data.image_folder import check_class_count, check_same_classes, load_folder_split, name_some
from carso_cli.data.image_set import ImageSet
from carso_cli.errors import DataError
from carso_cli.runtime.reporter import SilentReporter

WriteImage = Callable[..., Path]


def load(path: Path, split: str = "train", **options: Any) -> ImageSet:
    stated = {"classes": 2, "channels": 3, "image_size": 32, "reporter": SilentReporter()}
    return load_folder_split(path, split, **{**stated, **options})


def assert_is_two_splits(part: ImageSet) -> None:
    assert part.classes == ("bird", "cat")
    assert part.labels.tolist() == [0, 0, 1, 1, 1]
    assert part.images[:, 1, 5, 5].tolist() == [0, 1, 10, 11, 12]
    assert part.images.shape == (5, 3, 32, 32)
    assert torch.equal(part.indices, torch.arange(5))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("inside", ["", "train"])
@pytest.mark.parametrize("lead", ["", "birds-and-cats/"])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_layout_is_read(
    two_splits: Path,
    zip_up: Callable[..., Path],
    tmp_path: Path,
    split: str,
    inside: str,
    lead: str,
    zipped: bool,
) -> None:
    source = two_splits / inside
    if zipped:
        path = zip_up(source, tmp_path / "a.zip", lead)
    else:
        path = tmp_path / "unpacked"
        shutil.copytree(source, path / lead)
    assert_is_two_splits(load(path, split))


def test_the_split_asked_for_is_the_one_read(two_splits: Path, write_image: WriteImage) -> None:
    write_image(two_splits / "test" / "cat" / "3.png", 99)
    assert len(load(two_splits, "train")) == 5
    assert load(two_splits, "test").images[5, 0, 0, 0] == 99


def test_val_serves_as_the_test_split_and_says_so(two_splits: Path, recorder: Any) -> None:
    (two_splits / "test").rename(two_splits / "val")
    assert_is_two_splits(load(two_splits, "test", reporter=recorder))
    assert recorder.said == [f"{two_splits / 'val'} is used as the test split"]
    assert recorder.steps == 5


def test_a_class_may_be_called_train(tmp_path: Path, write_image: WriteImage) -> None:
    for name in ("bus", "train"):
        write_image(tmp_path / "vehicles" / name / "0.png")
    assert load(tmp_path / "vehicles", "test").classes == ("bus", "train")


def test_grey_and_palette_files_become_rgb_and_colour_becomes_grey(tmp_path: Path) -> None:
    for name, image in (
        ("a/grey.png", Image.new("L", (32, 32), 77)),
        ("b/palette.gif", Image.new("RGB", (32, 32), (255, 0, 0)).convert("P")),
    ):
        (tmp_path / name).parent.mkdir()
        image.save(tmp_path / name)
    part = load(tmp_path)
    assert part.images[:, :, 0, 0].tolist() == [[77, 77, 77], [255, 0, 0]]
    assert load(tmp_path, channels=1).images[:, :, 0, 0].tolist() == [[77], [76]]


@pytest.mark.parametrize("zipped", [False, True])
def test_images_are_known_by_any_ending_or_none_and_other_files_counted(
    two_splits: Path, zip_up: Callable[..., Path], tmp_path: Path, recorder: Any, zipped: bool
) -> None:
    cats = two_splits / "train" / "cat"
    for name, kind in (
        ("a.jfif", "JPEG"),
        ("b.JPE", "JPEG"),
        ("c", "PNG"),
        ("4f0a", "JPEG"),
        ("d.pnm", "PPM"),
    ):
        Image.new("RGB", (32, 32)).save(cats / name, kind)
    for name in ("notes.txt", "more.TXT", "LICENSE", "photo.heic", "Thumbs.db", ".hidden"):
        (cats / name).write_bytes(b"no image")
    source = zip_up(two_splits, tmp_path / "a.zip") if zipped else two_splits
    assert len(load(source, reporter=recorder)) == 5 + 5
    (said,) = recorder.warned
    assert "4 of 14 files are left out" in said
    assert "(2 .txt, 1 without ending, 1 .heic; such as 'train/cat/LICENSE')" in said


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAINING", "Valid"), ("train", "valid")])
def test_splits_are_found_in_any_case(two_splits: Path, names: tuple[str, str]) -> None:
    for before, after in zip(("train", "test"), names, strict=True):
        (two_splits / before).rename(two_splits / "moved")
        (two_splits / "moved").rename(two_splits / after)
    assert_is_two_splits(load(two_splits))
    assert_is_two_splits(load(two_splits, "test"))


def test_a_missing_split_lists_what_is_there(two_splits: Path) -> None:
    shutil.rmtree(two_splits / "test")
    with pytest.raises(DataError, match=r"holds no test split; it holds the folders 'train'$"):
        load(two_splits, "test")


def test_an_empty_source_has_no_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no train split; it holds no folder") as caught:
        load(tmp_path)
    assert "<split>/<class>/<image>" in caught.value.hint


def test_a_wrong_number_of_classes_is_refused_before_decoding(two_splits: Path, recorder: Any) -> None:
    with pytest.raises(DataError, match=r"train holds 2 classes \('bird', 'cat'\); 10 are stated"):
        load(two_splits, classes=10, reporter=recorder)
    assert recorder.steps == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_is_named_from_either_split(two_splits: Path, split: str) -> None:
    for file in (two_splits / "test" / "cat").iterdir():
        file.unlink()
    (two_splits / "test" / "cat" / "notes.txt").touch()
    with pytest.raises(DataError, match="test/cat holds no images: the class 'cat' is empty"):
        load(two_splits, split)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_missing_from_one_split_is_named(
    two_splits: Path, write_image: WriteImage, split: str
) -> None:
    (two_splits / "test" / "cat").rename(two_splits / "test" / "dog")
    with pytest.raises(DataError, match=r"test lacks 'cat'; .*train lacks 'dog'"):
        load(two_splits, split)


def test_splits_in_two_zip_files_are_compared(
    two_splits: Path, zip_up: Callable[..., Path], tmp_path: Path
) -> None:
    train = zip_up(two_splits / "train", tmp_path / "train.zip")
    test = zip_up(two_splits / "test", tmp_path / "test.zip")
    assert_is_two_splits(load(test, "test", other_path=train))
    (two_splits / "test" / "cat").rename(two_splits / "test" / "dog")
    test = zip_up(two_splits / "test", tmp_path / "test.zip")
    with pytest.raises(DataError, match=r"test\.zip lacks 'cat'; .*train\.zip lacks 'dog'"):
        load(test, "test", other_path=train)


def test_stray_and_nested_images_are_named(two_splits: Path, write_image: WriteImage) -> None:
    stray = write_image(two_splits / "train" / "cover.png")
    with pytest.raises(DataError, match=r"train/cover\.png lies beside the class folders"):
        load(two_splits)
    stray.unlink()
    write_image(two_splits / "train" / "cat" / "images" / "0.png")
    with pytest.raises(DataError, match="train/cat holds the folder 'images'"):
        load(two_splits)


def test_a_wrong_size_and_mixed_sizes_are_told_apart(two_splits: Path, write_image: WriteImage) -> None:
    with pytest.raises(DataError, match=r"bird/0\.png is 32x32; 64x64 is needed") as caught:
        load(two_splits, image_size=64)
    assert "data.image_size" in caught.value.hint
    write_image(two_splits / "train" / "cat" / "1.png", size=40)
    with pytest.raises(DataError, match=r"cat/1\.png is 40x40; 32x32 is needed") as caught:
        load(two_splits)
    assert "mixed sizes are refused" in caught.value.hint


def test_a_corrupt_and_an_empty_image_are_named(
    two_splits: Path, zip_up: Callable[..., Path], tmp_path: Path
) -> None:
    damaged = two_splits / "train" / "cat" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    for path in (two_splits, zip_up(two_splits, tmp_path / "a.zip")):
        with pytest.raises(DataError, match=r"train/cat/2\.png is a damaged image") as caught:
            load(path)
        assert caught.value.exit_code == 3
    damaged.write_bytes(b"")
    with pytest.raises(DataError, match=r"train/cat/2\.png is empty \(0 bytes\)"):
        load(two_splits)


def test_a_wrong_class_count_names_place_and_both_numbers() -> None:
    check_class_count(("a", "b"), 2, where="images/test")
    with pytest.raises(DataError, match=r"images/test holds 2 classes \('a', 'b'\); 10 are stated") as caught:
        check_class_count(("a", "b"), 10, where="images/test")
    assert caught.value.hint.startswith("set data.classes=2")


def test_classes_missing_from_either_split_are_named() -> None:
    check_same_classes((("a", "b"), "train/"), (("a", "b"), "test/"))
    for test, message in (
        (("ape", "dog", "eel"), r"test/ lacks 'cat'; train/ lacks 'dog', 'eel'$"),
        (("ape",), r"test/ lacks 'cat'$"),
        (("cat", "ape"), "the same names in another order"),
    ):
        with pytest.raises(DataError, match=message):
            check_same_classes((("ape", "cat"), "train/"), (test, "test/"))


def test_long_lists_are_cut() -> None:
    assert name_some([]) == "none"
    assert name_some(list("abc"), limit=2) == "'a', 'b' and 1 more"


@pytest.mark.slow
@pytest.mark.shared
def test_the_cifar10_zip_file_is_used_as_it_lies(shared_folder: Path, recorder: Any) -> None:
    path = shared_folder / "data" / "cifar10-test.zip"
    part = load(path, "test", classes=10, reporter=recorder)
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert part.classes == names
    assert part.images.shape == (10_000, 3, 32, 32)
    assert part.labels.bincount().tolist() == [1000] * 10
    assert recorder.steps == 10_000
    # The test set's own channel means, within what JPEG changes (0.4942, 0.4851, 0.4504).
    mean = part.images.to(torch.float32).mean(dim=(0, 2, 3)) / 255
    assert np.allclose(mean.numpy(), [0.4942, 0.4851, 0.4504], atol=2e-3)
