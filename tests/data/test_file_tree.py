"""Folders and zip files look alike, and a fingerprint tells when either changed."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from carso_cli.data.file_tree import open_tree
from carso_cli.errors import DataError


def test_a_folder_and_its_zip_file_list_the_same(
    two_splits: Path, zip_up: Callable[..., Path], tmp_path: Path
) -> None:
    packed = zip_up(two_splits, tmp_path / "packed.zip")
    with open_tree(two_splits) as folder, open_tree(packed) as archive:
        assert folder.files == archive.files
        for tree in (folder, archive):
            assert tree.subfolders("") == ["test", "train"]
            assert tree.subfolders("train") == ["bird", "cat"]
            assert tree.images("train/cat") == [f"train/cat/{number}.png" for number in range(3)]
        assert folder.read("test/cat/2.png") == archive.read("test/cat/2.png")
        assert archive.where("test/cat/2.png") == f"{packed}: test/cat/2.png"
        assert folder.where("test/cat/2.png") == str(two_splits / "test/cat/2.png")


def test_clutter_is_not_listed_and_empty_folders_are(two_splits: Path) -> None:
    (two_splits / "train" / ".DS_Store").touch()
    (two_splits / "__MACOSX").mkdir()
    (two_splits / "__MACOSX" / "1.png").touch()
    (two_splits / "train" / "dog").mkdir()
    with open_tree(two_splits) as tree:
        assert tree.subfolders("") == ["test", "train"]
        assert tree.subfolders("train") == ["bird", "cat", "dog"]
        assert not any(".DS_Store" in name for name in tree.files)


def test_empty_folders_in_a_zip_file_are_listed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train/dog/", b"")
    with open_tree(tmp_path / "a.zip") as tree:
        assert tree.subfolders("train") == ["dog"]


def test_linked_folders_are_followed_and_loops_end(two_splits: Path) -> None:
    (two_splits / "train" / "loop").symlink_to(two_splits, target_is_directory=True)
    with open_tree(two_splits) as tree:
        assert "train/loop/train/cat/1.png" in tree.files


def test_the_fingerprint_changes_with_content_order_and_place(
    two_splits: Path, zip_up: Callable[..., Path], tmp_path: Path
) -> None:
    names = ["train/cat/0.png", "train/cat/1.png"]

    def prints(path: Path) -> str:
        with open_tree(path) as tree:
            return tree.fingerprint(names)

    before = prints(two_splits)
    assert prints(two_splits) == before
    with open_tree(two_splits) as tree:
        assert tree.fingerprint(names[::-1]) != before
        assert tree.fingerprint(names[:1]) != before
    shutil.copytree(two_splits, tmp_path / "copy")
    assert prints(tmp_path / "copy") != before
    os.utime(two_splits / names[0], ns=(1, 1))
    assert prints(two_splits) != before


def test_a_zip_file_repacked_in_place_has_another_fingerprint(
    two_splits: Path, zip_up: Callable[..., Path], tmp_path: Path
) -> None:
    file = zip_up(two_splits, tmp_path / "a.zip")
    status = file.stat()
    with open_tree(file) as tree:
        before = tree.fingerprint(["train/cat/0.png"])
    # Same size and time, one byte of the stored CRC's content changed.
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"train/cat/0.png") - 46
    content[entry + 16] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with open_tree(file) as tree:
        assert tree.fingerprint(["train/cat/0.png"]) != before


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"half of a zip file")
    with pytest.raises(DataError, match=r"images\.zip is neither a folder nor a complete zip file"):
        open_tree(tmp_path / "images.zip").__enter__()
    with pytest.raises(DataError, match=r"image\.zip does not exist") as caught:
        open_tree(tmp_path / "image.zip").__enter__()
    assert caught.value.hint == "did you mean 'images.zip'?"
