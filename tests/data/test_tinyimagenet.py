"""TinyImageNet's official layout, unpacked and zipped, and what can be missing from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
import torch
from PIL import Image

from carso_cli.data import tinyimagenet
from carso_cli.data.image_set import ImageSet
from carso_cli.data.tinyimagenet import find_tinyimagenet, load_tinyimagenet_split
from carso_cli.errors import DataError, MissingError
from carso_cli.io import download
from carso_cli.runtime.reporter import Reporter, SilentReporter

WriteImage = Callable[..., Path]
WNIDS = ("n3", "n1", "n2")


class _Recorder(Reporter, Protocol):
    warned: list[str]


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


def load(
    root: Path, split: str = "train", *, source: Path | None = None, reporter: Reporter | None = None
) -> ImageSet:
    return load_tinyimagenet_split(
        split,
        classes=3,
        channels=3,
        image_size=16,
        root=root,
        source=source,
        reporter=reporter or SilentReporter(),
    )


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


def test_a_subset_is_named_as_one(official: Path, recorder: _Recorder) -> None:
    load(official, reporter=recorder)
    assert "holds 6 train images; the official data set has 100000" in recorder.warned[0]


def test_the_unpacked_folder_and_the_full_zip_file_are_preferred(tmp_path: Path) -> None:
    assert find_tinyimagenet(tmp_path) is None
    for name in ("tiny-imagenet-200-subset.zip", "tiny-imagenet-200.zip"):
        (tmp_path / name).touch()
        assert find_tinyimagenet(tmp_path) == tmp_path / name
    (tmp_path / "tiny-imagenet-200").mkdir()
    assert find_tinyimagenet(tmp_path) == tmp_path / "tiny-imagenet-200"


def change(official: Path, what: str) -> None:
    annotations = official / "val" / "val_annotations.txt"
    if what == "no wnids":
        (official / "wnids.txt").unlink()
    elif what == "empty class":
        shutil.rmtree(official / "train" / "n2" / "images")
        (official / "train" / "n2" / "images").mkdir()
    elif what == "missing class":
        shutil.rmtree(official / "train" / "n2")
    elif what == "unknown class":
        (official / "train" / "n2").rename(official / "train" / "n9")
    elif what == "no annotations":
        annotations.unlink()
    elif what == "unknown label":
        annotations.write_text(annotations.read_text().replace("n1", "n7"))
    elif what == "image gone":
        (official / "val" / "images" / "val_0.png").unlink()
    elif what == "image unnamed":
        annotations.write_text(annotations.read_text().partition("\n")[2])
    elif what == "label missing":
        annotations.write_text(annotations.read_text().replace("n1", "n2"))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no wnids", r"tiny-imagenet-200 holds no wnids\.txt.*it holds 'train', 'val'"),
        ("empty class", "train/n2/images holds no images: the class 'n2' is empty"),
        ("missing class", r"train lacks the classes 'n2' of wnids\.txt"),
        ("unknown class", r"train holds 'n9', not named in wnids\.txt"),
        ("no annotations", r"val_annotations\.txt is missing"),
        ("unknown label", r"val_annotations\.txt, line 2: 'n7' is not a class of wnids\.txt"),
        ("image gone", r"val_0\.png is missing, and val_annotations\.txt names it"),
        ("image unnamed", r"val_0\.png has no label"),
        ("label missing", r"val_annotations\.txt names no image of 'n1'"),
    ],
)
def test_what_is_incomplete_is_refused_from_either_split(
    official: Path, what: str, message: str, split: str
) -> None:
    change(official, what)
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
        load_tinyimagenet_split(
            "train",
            classes=200,
            channels=3,
            image_size=16,
            root=official,
            source=None,
            reporter=SilentReporter(),
        )


def test_offline_is_a_sentence_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="tinyimagenet200 is not on this machine") as caught:
        load(tmp_path / "data")
    target = tmp_path / "data" / "tiny-imagenet-200.zip"
    assert caught.value.hint == f"fetch {tinyimagenet.URL} where there is a network and put it at {target}"
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.shared
def test_the_real_subset_is_read_with_its_grey_images(shared_folder: Path, recorder: _Recorder) -> None:
    part = load_tinyimagenet_split(
        "test",
        classes=200,
        channels=3,
        image_size=64,
        root=shared_folder / "data",
        source=None,
        reporter=recorder,
    )
    assert part.images.shape == (2000, 3, 64, 64)
    assert part.labels.bincount().tolist() == [10] * 200
    assert part.classes[0] == "n01443537 goldfish"
    assert part.classes == tuple(sorted(part.classes))
    grey = (part.images[:, 0] == part.images[:, 1]).flatten(1).all(1)
    assert 20 <= int(grey.sum()) <= 100
    assert "holds 2000 test images" in recorder.warned[0]
    assert torch.equal(part.indices, torch.arange(2000))
    assert Image.MAX_IMAGE_PIXELS is not None
