"""CIFAR: our reading around torchvision's, and its checksums left in force. No test downloads."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from carso_cli.data import cifar
from carso_cli.data.cifar import load_arrays, load_cifar_split
from carso_cli.data.image_set import ImageSet
from carso_cli.errors import DataError, MissingError
from carso_cli.io import download
from carso_cli.runtime.reporter import SilentReporter

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
# A dictionary of an 8-bit text of Python 2, as the published files hold: {'label': 'caf\xe9'}.
OF_PYTHON_2 = b"(dp0\nS'label'\np1\nS'caf\\xe9'\np2\ns."


class FakeCifar:
    """Stands for torchvision's class: one checked file in one folder."""

    url = "https://example.org/fake.tar.gz"
    filename = "fake.tar.gz"
    base_folder = "fake-batches"
    tgz_md5 = ""
    opened: tuple[bool, ...] = ()

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert not download, "torchvision's own download must not be used"
        file = Path(root) / self.base_folder / "batch"
        if not file.is_file() or file.read_bytes() != b"intact":
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        FakeCifar.opened += (train,)
        self.data = PIXELS[:4] if train else PIXELS[4:]
        self.targets = [1, 0, 1, 0] if train else [0, 1]
        self.classes = ["zebra", "ape"]


def archive(target: Path, content: bytes = b"intact") -> str:
    """Write the fake archive, with a member that tries to leave its folder; return its MD5."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:gz") as members:
        for name in ("fake-batches/batch", "../../escaped"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            members.addfile(member, io.BytesIO(content))
    return hashlib.md5(target.read_bytes()).hexdigest()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeCifar]:
    monkeypatch.setattr(cifar, "cifar_class", lambda name: FakeCifar)
    monkeypatch.setattr(FakeCifar, "opened", ())
    return FakeCifar


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(download, "open_url", refuse)


def load(root: Path, split: str = "train", channels: int = 3, name: str = "cifar10") -> ImageSet:
    return load_cifar_split(name, split, channels=channels, root=root, reporter=SilentReporter())


def intact(root: Path) -> Path:
    (root / "fake-batches").mkdir(parents=True)
    (root / "fake-batches" / "batch").write_bytes(b"intact")
    return root


def test_images_labels_and_classes_keep_the_official_order(tmp_path: Path, fake: type[FakeCifar]) -> None:
    train = load(intact(tmp_path))
    assert np.array_equal(train.images.numpy(), PIXELS[:4].transpose(0, 3, 1, 2))
    assert train.images.is_contiguous()
    assert train.labels.tolist() == [1, 0, 1, 0]
    assert train.classes == ("zebra", "ape")
    test = load(tmp_path, "test")
    assert torch.equal(test.indices, torch.arange(2))
    assert fake.opened == (True, False)


def test_grey_agrees_with_what_image_files_become(tmp_path: Path, fake: type[FakeCifar]) -> None:
    part = load(intact(tmp_path), "test", channels=1)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in PIXELS[4:]])
    assert np.array_equal(part.images[:, 0].numpy(), expected)


def test_an_archive_put_in_place_by_hand_is_unpacked(
    tmp_path: Path, fake: type[FakeCifar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "tgz_md5", archive(tmp_path / "data" / "fake.tar.gz"))
    load(tmp_path / "data")
    names = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file())
    assert names == ["data/fake-batches/batch", "data/fake-batches/escaped", "data/fake.tar.gz"]


def test_a_damaged_folder_is_repaired_from_the_archive(
    tmp_path: Path, fake: type[FakeCifar], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = intact(tmp_path)
    (root / "fake-batches" / "batch").write_bytes(b"damaged")
    monkeypatch.setattr(fake, "tgz_md5", archive(root / "fake.tar.gz"))
    load(root)
    assert fake.opened == (True,)


def test_an_archive_with_another_checksum_is_refused(
    tmp_path: Path, fake: type[FakeCifar], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = archive(tmp_path / "fake.tar.gz")
    monkeypatch.setattr(fake, "tgz_md5", "published")
    with pytest.raises(DataError, match=rf"fake\.tar\.gz has the MD5 checksum {seen}; published is the"):
        load(tmp_path)
    assert not (tmp_path / "fake-batches").exists()


def test_files_that_stay_wrong_are_never_opened(
    tmp_path: Path, fake: type[FakeCifar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "tgz_md5", archive(tmp_path / "fake.tar.gz", b"not intact"))
    with pytest.raises(DataError, match="fake-batches does not match the published checksums"):
        load(tmp_path)
    assert fake.opened == ()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_offline_says_what_to_fetch_and_where_to_put_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        MissingError, match=f"{name} is not on this machine .*Network is unreachable"
    ) as caught:
        load(tmp_path, name=name)
    file = f"cifar-{name.removeprefix('cifar')}-python.tar.gz"
    assert f"fetch https://www.cs.toronto.edu/~kriz/{file} " in caught.value.hint
    assert caught.value.hint.endswith(f"put it at {tmp_path / file}")


class _Hostile:
    """A pickle that would make a file when loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.trace,)


def test_a_pickle_that_fails_its_checksum_is_never_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "loaded"
    hostile = pickle.dumps(_Hostile(trace))
    pickle.loads(hostile)
    assert trace.exists(), "the trap itself must work"
    trace.unlink()
    folder = tmp_path / cifar.FOLDERS["cifar10"]
    folder.mkdir()
    for name in ("test_batch", "batches.meta", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(hostile)
    with pytest.raises(MissingError, match="could not be downloaded"):
        load(tmp_path, "test")
    assert not trace.exists()


# --- pickles ---


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_and_containers_come_back(protocol: int) -> None:
    content = {"data": PIXELS, "labels": [1, 2, 3], "names": ("a", b"b"), "scale": 0.5}
    found = load_arrays(io.BytesIO(pickle.dumps(content, protocol=protocol)))
    np.testing.assert_array_equal(found.pop("data"), PIXELS)
    assert found == {"labels": [1, 2, 3], "names": ("a", b"b"), "scale": 0.5}


def test_texts_of_python_2_are_decoded_as_asked() -> None:
    assert load_arrays(io.BytesIO(OF_PYTHON_2), encoding="latin1") == {"label": "caf\xe9"}


@pytest.mark.parametrize("value", [print, np.load, load_arrays, OSError("x")])
def test_all_else_is_refused(value: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="neither an array nor a plain container"):
        load_arrays(io.BytesIO(pickle.dumps({"data": [value]})))
