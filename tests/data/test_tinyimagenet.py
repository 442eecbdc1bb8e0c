"""TinyImageNet's official layout, unpacked and zipped, and what can be missing from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from carso_cli.data import tinyimagenet
from carso_cli.data.image_set import ImageSet
from carso_cli.data.tinyimagenet import find_tinyimagenet, load_tinyimagenet_split
from carso_cli.errors import DataError, MissingError
from carso_cli.io import download
from carso_cli.runtime.reporter import SilentReporter

WriteImage = Callable[..., Path]
WNIDS = ("n3", "n1", "n2")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, *_: object) -> None:
        raise OSError(f"no network in tests: {url}")

    monkeypatch.setattr(download, "open_url", refuse)


@pytest.fixture
def official(tmp_path: Path, write_image: WriteImage) -> Path:
    """Three classes, two training images and one validation image each; pixel = 10 * label + number."""
    root = tmp_path / "tiny-imagenet-200"
    annotations = []
    for wnid in WNIDS:
        label = sorted(WNIDS).index(wnid)
        for number in range(2):
            write_image(
                root / "train" / wnid / "images" / f"{wnid}_{number}.png", 10 * label + number, size=16
            )
        (root / "train" / wnid / f"{wnid}_boxes.txt").touch()
        write_image(root / "val" / "images" / f"val_{2 - label}.png", 10 * label + 5, size=16)
        annotations.append(f"val_{2 - label}.png\t{wnid}\t0\t0\t15\t15\n")
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("n0\tentity\nn1\tgoldfish, Carassius auratus\nn2\ttench\n")
    return root


def load(root: Path, split: str = "train", **options: Any) -> ImageSet:
    stated = {"classes": 3, "channels": 3, "image_size": 16, "reporter": SilentReporter()}
    return load_tinyimagenet_split(split, root=root, **{**stated, **options})


@pytest.mark.parametrize("form", ["root", "folder", "zip", "zip without lead", "source"])
def test_every_form_gives_the_same_images(
    official: Path, zip_up: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    root, source = tmp_path, None
    if form == "folder":
        root = official
    elif form != "root":
        lead = "" if form == "zip without lead" else "tiny-imagenet-200/"
        packed = zip_up(official, tmp_path / "tiny-imagenet-200-cut.zip", lead)
        shutil.rmtree(official)
        if form == "source":
            root, source = tmp_path / "elsewhere", packed
    train, test = load(root, "train", source=source), load(root, "test", source=source)
    assert train.classes == test.classes == ("n1 goldfish", "n2 tench", "n3")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11, 20, 21]
    assert test.labels.tolist() == [2, 1, 0]
    assert test.images[:, 0, 0, 0].tolist() == [25, 15, 5]


def test_a_subset_is_named_as_one(official: Path, recorder: Any) -> None:
    load(official, reporter=recorder)
    assert "holds 6 train images; the official data set has 100000" in recorder.warned[0]


def test_the_unpacked_folder_and_the_full_zip_file_are_preferred(tmp_path: Path) -> None:
    assert find_tinyimagenet(tmp_path) is None
    for name in ("tiny-imagenet-200-subset.zip", "tiny-imagenet-200.zip"):
        (tmp_path / name).touch()
        assert find_tinyimagenet(tmp_path) == tmp_path / name
    (tmp_path / "tiny-imagenet-200").mkdir()
    assert find_tinyimagenet(tmp_path) == tmp_path / "tiny-imagenet-200"


def rewrite(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


LABELS = "val/val_annotations.txt"
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: (root / "wnids.txt").unlink(), r"200 holds no wnids\.txt.*it holds 'train', 'val'"),
    (
        lambda root: empty(root / "train/n2/images"),
        "train/n2/images holds no images: the class 'n2' is empty",
    ),
    (lambda root: shutil.rmtree(root / "train/n2"), r"train lacks the classes 'n2' of wnids\.txt"),
    (
        lambda root: (root / "train/n2").rename(root / "train/n9"),
        r"train holds 'n9', not named in wnids\.txt",
    ),
    (lambda root: (root / LABELS).unlink(), r"val_annotations\.txt is missing"),
    (
        lambda root: rewrite(root / LABELS, "n1", "n7"),
        r"val_annotations\.txt, line 2: 'n7' is not a class of wnids\.txt",
    ),
    (
        lambda root: (root / "val/images/val_0.png").unlink(),
        r"val_0\.png is missing, and val_annotations\.txt names it",
    ),
    (lambda root: rewrite(root / LABELS, "val_0.png\tn3\t0\t0\t15\t15\n", ""), r"val_0\.png has no label"),
    (lambda root: rewrite(root / LABELS, "n1", "n2"), r"val_annotations\.txt names no image of 'n1'"),
    (lambda root: rewrite(root / "wnids.txt", "n1", "n2"), r"wnids\.txt names a class twice"),
    (lambda root: (root / "wnids.txt").write_text("\n"), r"wnids\.txt names no class"),
]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_what_is_incomplete_is_refused_from_either_split(
    official: Path, damage: Callable[[Path], object], message: str, split: str
) -> None:
    damage(official)
    with pytest.raises(DataError, match=message):
        load(official.parent, split)


def test_one_split_alone_is_enough(official: Path) -> None:
    shutil.copytree(official, official.parent / "copy")
    shutil.rmtree(official / "val")
    assert len(load(official, "train")) == 6
    shutil.rmtree(official.parent / "copy" / "train")
    assert len(load(official.parent / "copy", "test")) == 3


def test_a_wrong_number_of_classes_is_refused(official: Path) -> None:
    with pytest.raises(DataError, match=r"tiny-imagenet-200 holds 3 classes .*; 200 are stated"):
        load(official, classes=200)


def test_offline_is_a_sentence_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="tinyimagenet200 is not on this machine") as caught:
        load(tmp_path / "data")
    target = tmp_path / "data" / "tiny-imagenet-200.zip"
    assert caught.value.hint == f"fetch {tinyimagenet.URL} where there is a network and put it at {target}"
    # The lock stays: a file that is removed is no lock for who waits at it.
    assert [path.suffix for path in (tmp_path / "data").iterdir()] in ([], [".lock"])


@pytest.mark.shared
def test_the_real_subset_is_read_with_its_grey_images(shared_folder: Path, recorder: Any) -> None:
    part = load(shared_folder / "data", "test", classes=200, image_size=64, reporter=recorder)
    assert part.images.shape == (2000, 3, 64, 64)
    assert part.labels.bincount().tolist() == [10] * 200
    assert part.classes[0] == "n01443537 goldfish"
    assert part.classes == tuple(sorted(part.classes))
    grey = (part.images[:, 0] == part.images[:, 1]).flatten(1).all(1)
    assert 20 <= int(grey.sum()) <= 100
    assert "holds 2000 test images" in recorder.warned[0]
    assert torch.equal(part.indices, torch.arange(2000))
    assert Image.MAX_IMAGE_PIXELS is not None
