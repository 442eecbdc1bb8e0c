"""MNIST and Fashion-MNIST: small files in torchvision's layout, packed or not. No test downloads."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carso_cli.data import mnist
from carso_cli.data.datasets import find_data, load_split
from carso_cli.data.image_set import ImageSet
from carso_cli.errors import DataError, MissingError
from carso_cli.recipe.load import load_recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.tools.assets import take_stock

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 0, 9, 3, 1], dtype=np.uint8)
NAMES = ["mnist", "fashion-mnist"]


def idx(array: np.ndarray) -> bytes:
    """The format of the published files: big-endian sizes, then bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def raw(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / mnist.FOLDERS[name]
    folder.mkdir(parents=True)
    for part, count in (("train", 5), ("t10k", 2)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(PIXELS[:count]))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(LABELS[:count]))
    return folder


def load(name: str, root: Path, split: str = "train", channels: int = 1) -> ImageSet:
    options: dict[str, Any] = {"classes": 10, "channels": channels, "image_size": 28, "source": None}
    return load_split(name, split, root=root, reporter=SILENT, **options)


def test_files_are_read_in_their_order(name: str, raw: Path, tmp_path: Path) -> None:
    found = load(name, tmp_path)
    assert torch.equal(found.images[:, 0], torch.from_numpy(PIXELS))
    assert found.labels.tolist() == LABELS.tolist()
    assert len(found.classes) == 10
    assert len(load(name, tmp_path, "test")) == 2
    grey = load(name, tmp_path, channels=3)
    assert torch.equal(grey.images, found.images.expand(-1, 3, -1, -1))
    assert find_data(name, root=tmp_path) == raw


def test_torchvision_reads_the_same(name: str, raw: Path, tmp_path: Path) -> None:
    _, dataset_class = mnist.torchvision_mnist(name)
    theirs = dataset_class(str(tmp_path), train=True)
    ours = load(name, tmp_path)
    assert torch.equal(theirs.data, ours.images[:, 0])
    assert torch.equal(theirs.targets, ours.labels)


def test_packed_files_are_checked_and_unpacked(
    name: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, file = load(name, tmp_path), raw / "train-images-idx3-ubyte"
    packed = gzip.compress(file.read_bytes())
    file.with_name(f"{file.name}.gz").write_bytes(packed)
    file.unlink()
    with pytest.raises(DataError, match=r"MD5 checksum .* is the published one"):
        load(name, tmp_path)
    _, dataset_class = mnist.torchvision_mnist(name)
    md5 = hashlib.md5(packed).hexdigest()
    monkeypatch.setattr(dataset_class, "resources", [(f"{file.name}.gz", md5)])
    assert torch.equal(load(name, tmp_path).images, expected.images)
    assert file.is_file()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", b"<html>no such file</html>"),
        ("train-images-idx3-ubyte", idx(PIXELS)[:100]),
        ("train-images-idx3-ubyte", idx(PIXELS[:, :20])),
        ("train-labels-idx1-ubyte", idx(LABELS[:3])),
        ("train-labels-idx1-ubyte", idx(PIXELS)),
        ("train-labels-idx1-ubyte", idx(LABELS + 8)),
    ],
)
def test_what_is_no_such_file_is_said(
    raw: Path, name: str, tmp_path: Path, file: str, content: bytes
) -> None:
    (raw / file).write_bytes(content)
    with pytest.raises(DataError):
        load(name, tmp_path)


def test_a_pickle_of_an_old_version_is_not_opened(name: str, raw: Path, tmp_path: Path) -> None:
    # torchvision's own class loads these, and runs what they ask for.
    processed = raw.with_name("processed")
    processed.mkdir()
    for file in ("training.pt", "test.pt"):
        (processed / file).write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit'\ntR.")
    assert len(load(name, tmp_path)) == 5


def test_absent_files_name_their_address(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is not on this machine") as caught:
        load(name, tmp_path)
    assert f"{mnist._ADDRESSES[name]}train-images-idx3-ubyte.gz" in (caught.value.hint or "")


def test_doctor_lists_the_four_files(name: str, raw: Path, tmp_path: Path) -> None:
    (raw / "t10k-labels-idx1-ubyte").unlink()
    (raw / "t10k-images-idx3-ubyte").unlink()
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(b"cut short")
    items = take_stock(load_recipe(name, [f"data.root={tmp_path}"]))
    states = [item.state for item in items if item.role == "data"]
    assert states == ["present", "present", "damaged", "missing"]
