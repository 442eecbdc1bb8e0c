"""The cache of decoded images: used when right, made again when not, never in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from carso_cli.data import cache as decoded_cache
from carso_cli.data.cache import load_images
from carso_cli.data.decode import decode_image
from carso_cli.data.file_tree import open_tree
from carso_cli.io.paths import home
from carso_cli.runtime.reporter import Reporter

WriteImage = Callable[..., Path]


class Decoding:
    """Loads the cats of the training split and counts how many images were decoded."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self.folder = folder
        self.reporter = reporter
        self.decoded = 0

    def load(self, channels: int = 3, slot: str = "train") -> tuple[Tensor, int]:
        """Return the images and the number decoded by this call."""
        before = self.decoded
        with open_tree(self.folder) as tree:
            cats, form = tree.images("train/cat"), {"channels": channels, "image_size": 32}
            images = load_images(tree, cats, slot=slot, reporter=self.reporter, **form)
        return images, self.decoded - before


@pytest.fixture
def decoding(two_splits: Path, recorder: Reporter, monkeypatch: pytest.MonkeyPatch) -> Decoding:
    real = decode_image
    counted = Decoding(two_splits, recorder)

    def decode_and_count(*args: object, **options: object) -> object:
        counted.decoded += 1
        return real(*args, **options)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(decoded_cache, "decode_image", decode_and_count)
    monkeypatch.setattr(decoded_cache, "FEWEST_KEPT", 3)
    return counted


def kept() -> list[Path]:
    return sorted((home() / "cache").iterdir())


def test_the_second_load_decodes_nothing(decoding: Decoding, recorder: Any) -> None:
    first, decoded = decoding.load()
    assert decoded == 3
    second, decoded = decoding.load()
    assert decoded == 0
    assert torch.equal(first, second)
    assert first[:, 0, 0, 0].tolist() == [10, 11, 12]
    assert [task[1:] for task in recorder.tasks] == [(3, "images")]
    assert recorder.warned == []
    assert len(kept()) == 1


def test_a_changed_image_replaces_the_file(
    decoding: Decoding, two_splits: Path, write_image: WriteImage, recorder: Any
) -> None:
    decoding.load()
    write_image(two_splits / "train" / "cat" / "1.png", 200)
    os.utime(two_splits / "train" / "cat" / "1.png", ns=(1, 1))
    images, decoded = decoding.load()
    assert decoded == 3
    assert images[1, 0, 0, 0] == 200
    assert len(kept()) == 1
    assert recorder.warned == []


def test_other_shapes_and_slots_have_files_of_their_own(decoding: Decoding) -> None:
    decoding.load()
    assert decoding.load(channels=1)[1] == 3
    assert decoding.load(slot="test")[1] == 3
    assert [decoding.load()[1], decoding.load(channels=1)[1], decoding.load(slot="test")[1]] == [0, 0, 0]
    assert len(kept()) == 3


@pytest.mark.parametrize("damage", ["pixels", "cut", "empty", "text"])
def test_a_damaged_file_is_made_again_with_a_warning(decoding: Decoding, recorder: Any, damage: str) -> None:
    good, _ = decoding.load()
    file = kept()[0]
    content = bytearray(file.read_bytes())
    position = content.index(bytes([11]) * 100)
    content[position] = 99
    changed = {"pixels": bytes(content), "cut": bytes(content[:-2000]), "empty": b"", "text": b"text"}
    file.write_bytes(changed[damage])
    again, decoded = decoding.load()
    assert decoded == 3
    assert torch.equal(good, again)
    assert recorder.warned == [f"{file} is damaged: decoding the images again"]
    assert decoding.load()[1] == 0


def test_a_consistent_file_with_other_pixels_is_found_by_its_checksum(
    decoding: Decoding, recorder: Any
) -> None:
    good, _ = decoding.load()
    with np.load(kept()[0]) as content:
        parts = dict(content)
    parts["images"] = parts["images"] + 1
    np.savez(kept()[0], **parts)
    again, decoded = decoding.load()
    assert decoded == 3
    assert torch.equal(good, again)
    assert len(recorder.warned) == 1


def test_a_folder_that_cannot_be_written_to_costs_only_a_warning(decoding: Decoding, recorder: Any) -> None:
    home().mkdir(parents=True, exist_ok=True)
    (home() / "cache").write_text("a file in the way")
    images, decoded = decoding.load()
    assert (len(images), decoded) == (3, 3)
    assert "decoded images cannot be kept in" in recorder.warned[-1]


def test_small_sets_are_not_kept(decoding: Decoding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_cache, "FEWEST_KEPT", 4)
    assert [decoding.load()[1], decoding.load()[1]] == [3, 3]
    assert not (home() / "cache").exists()
