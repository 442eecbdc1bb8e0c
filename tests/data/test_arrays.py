"""Files of arrays: which array is which, ranges, layouts, and files that are not what their name says."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from carso_cli.data.arrays import read_arrays
from carso_cli.errors import DataError
from carso_cli.runtime.reporter import SILENT

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 7), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("x_test", "y_test"), ("Data", "Targets"), ("p", "q")]
)
def test_names_and_shapes_tell_images_from_labels(tmp_path: Path, images: str, labels: str) -> None:
    found = read_arrays(npz(tmp_path, **{images: IMAGES, labels: LABELS}), reporter=SILENT)
    assert found.images.dtype == torch.uint8
    assert found.images.tolist() == IMAGES.tolist()
    assert found.labels is not None
    assert found.labels.tolist() == LABELS.tolist()


def test_the_test_split_is_taken_where_a_file_holds_several(tmp_path: Path) -> None:
    column = LABELS[:, None].astype(np.uint8)
    path = npz(
        tmp_path, train_images=IMAGES[:1], train_labels=column[:1], test_images=IMAGES, test_labels=column
    )
    found = read_arrays(path, reporter=SILENT)
    assert len(found.images) == 6
    assert found.labels is not None
    assert found.labels.tolist() == LABELS.tolist()


def test_torch_and_safetensors_files(tmp_path: Path) -> None:
    pair = {"images": torch.from_numpy(IMAGES) / 255, "labels": torch.from_numpy(LABELS)}
    torch.save(pair, tmp_path / "a.pt")
    torch.save((pair["images"], pair["labels"]), tmp_path / "b.pt")
    save_file(pair, tmp_path / "c.safetensors")
    for name in ("a.pt", "b.pt", "c.safetensors"):
        found = read_arrays(tmp_path / name, reporter=SILENT)
        assert torch.equal(found.images, pair["images"])
        assert found.labels is not None
        assert torch.equal(found.labels, pair["labels"])


def test_channels_last_and_grey_are_read_and_said(tmp_path: Path, recorder: Any) -> None:
    last = read_arrays(npz(tmp_path, images=IMAGES.transpose(0, 2, 3, 1), labels=LABELS), reporter=recorder)
    assert last.images.tolist() == IMAGES.tolist()
    assert "channels last (NHWC)" in recorder.said[0]
    assert "(6, 5, 7, 3)" in recorder.said[0]
    grey = read_arrays(npz(tmp_path, images=IMAGES[:, 0], labels=LABELS), reporter=recorder)
    assert grey.images.shape == (6, 1, 5, 7)
    small = read_arrays(npz(tmp_path, images=IMAGES[..., :3], labels=LABELS), reporter=recorder)
    assert small.images.shape == (6, 3, 5, 3)
    assert "channels first (NCHW)" in recorder.warned[0]


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (IMAGES.astype(np.float32), ["float32 pixels from 0 to 255", "divide them by 255"]),
        ((IMAGES / 255 - 0.5) / 0.25, ["[0, 1] is needed", "undo the standardisation"]),
        (IMAGES // 255, ["uint8 pixels of at most 1", "multiply them by 255"]),
        (IMAGES.astype(np.int64), ["int64 numbers", "astype('uint8')"]),
        (np.where(IMAGES > 250, np.nan, 0.5), ["NaN or infinite"]),
        (IMAGES[:, [0, 1, 2, 0]], ["(6, 4, 5, 7)", "1 or 3 channels"]),
        (IMAGES[:0], ["no image"]),
    ],
)
def test_images_that_are_refused(tmp_path: Path, images: Any, said: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_arrays(npz(tmp_path, images=images, labels=LABELS[: len(images)]), reporter=SILENT)
    text = f"{caught.value.message}\n{caught.value.hint}"
    assert all(part in text for part in [*said, "a.npz", "'images'"])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS[:4], "(4,) for 6 images"),
        (np.eye(3)[LABELS], "labels.argmax(1)"),
        (LABELS - 1, "goes down to -1"),
        (LABELS + 0.5, "whole numbers from 0"),
    ],
)
def test_labels_that_are_refused(tmp_path: Path, labels: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_arrays(npz(tmp_path, images=IMAGES, labels=labels), reporter=SILENT)
    assert said in f"{caught.value.message}\n{caught.value.hint}"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


def _pickled_npz(path: Path) -> None:
    objects = np.empty(2, dtype=object)
    objects[:] = [Evil(), Evil()]
    np.savez(path, images=objects, labels=LABELS[:2])


HOSTILE = {
    "objects.npz": (_pickled_npz, "reading them could run code"),
    "bare.npz": (lambda path: path.write_bytes(pickle.dumps(Evil())), "is no .npz file"),
    "code.pt": (lambda path: torch.save({"images": Evil()}, path), "reading it could run code"),
    "module.pt": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "reading it could run code"),
    "page.npz": (lambda path: path.write_text("<!DOCTYPE html><html>"), "is a web page"),
    "lfs.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"),
        "is a Git LFS pointer",
    ),
    "empty.pt": (lambda path: path.write_bytes(b""), "is empty"),
    "folder.npz": (lambda path: path.mkdir(), "cannot be read"),
    "junk.safetensors": (lambda path: path.write_bytes(b"junk" * 9), "is not a readable .safetensors file"),
    "cut.pt": (lambda path: path.write_bytes(b"PK\x03\x04" + b"0" * 50), "is not a readable .pt file"),
    "other.csv": (lambda path: path.write_text("1,2"), "is none of .npz"),
    "text.npz": (lambda path: np.savez(path, images=np.array(["a"])), "it holds no arrays"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_not_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = HOSTILE[name]
    make(tmp_path / name)
    with pytest.raises(DataError) as caught:
        read_arrays(tmp_path / name, reporter=SILENT)
    assert said in caught.value.message
    assert name in caught.value.message
    assert not (tmp_path / "harmed").exists()


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    npz(tmp_path, images=IMAGES, labels=LABELS)
    with pytest.raises(DataError) as caught:
        read_arrays(tmp_path / "b.npz", reporter=SILENT)
    assert "a.npz" in caught.value.hint
