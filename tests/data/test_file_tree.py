"""Folders and zip files look alike; a fingerprint tells when either changed; unsafe members are refused."""

from __future__ import annotations

import os
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from carso_cli.data import file_tree
from carso_cli.data.file_tree import ZipStore, open_tree
from carso_cli.errors import DataError
from carso_cli.io.files import MAX_BYTES


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


# --- zip files from elsewhere ---


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "name", ["../outside.png", "a/../../outside.png", "/etc/outside.png", "C:/outside.png", "..\\outside.png"]
)
def test_members_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    file = archive(tmp_path / "a.zip", {"fine.png": b"", name: b""})
    with pytest.raises(DataError, match="which points outside the archive") as caught:
        ZipStore(file)
    assert repr(name) in caught.value.message
    assert str(file) in caught.value.message


def test_names_with_two_dots_inside_a_part_are_fine(tmp_path: Path) -> None:
    assert list(ZipStore(archive(tmp_path / "a.zip", {"a..b.png": b""})).files) == ["a..b.png"]


def test_backslashes_separate_folders(tmp_path: Path) -> None:
    store = ZipStore(archive(tmp_path / "a.zip", {"cat\\1.png": b"x"}))
    assert list(store.files) == ["cat/1.png"]
    assert store.read("cat/1.png") == b"x"


def test_a_name_in_use_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 'cat/1\.png' twice"):
        ZipStore(archive(tmp_path / "a.zip", {"cat/1.png": b"", "cat\\1.png": b""}))


def test_absurd_sizes_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = b"\0" * (MAX_BYTES + 1)
    file = archive(tmp_path / "a.zip", {"cat/bomb.png": bomb}, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 100_000
    with pytest.raises(DataError, match=rf"cat/bomb\.png would unpack to {len(bomb)} bytes"):
        ZipStore(file).read("cat/bomb.png")
    monkeypatch.setattr(file_tree, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(DataError, match=rf"a\.zip would unpack to {len(bomb)} bytes; at most 1000"):
        ZipStore(file)


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.zip", {"cat/1.png": b"x"})
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flags of its entry in the central directory
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"the encrypted member 'cat/1\.png'"):
        ZipStore(file)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_unpacks_without_a_bound_is_refused(tmp_path: Path, compression: int) -> None:
    file = archive(tmp_path / "a.zip", {"cat/1.png": b"x"}, compression)
    with pytest.raises(DataError, match=r"the member 'cat/1\.png', compressed otherwise than by deflate"):
        ZipStore(file)


def test_a_member_that_unpacks_to_more_than_it_claims_takes_no_more_memory(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.zip", {"cat/1.png": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    content = bytearray(file.read_bytes())
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.index(signature) + place
        content[start : start + 4] = (1000).to_bytes(4, "little")
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"cat/1\.png is damaged: Bad CRC-32"):
            ZipStore(file).read("cat/1.png")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_damage_is_found_by_the_crc(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.zip", {"cat/1.png": b"some content"})
    file.write_bytes(file.read_bytes().replace(b"some content", b"sore content"))
    with pytest.raises(DataError, match=r"cat/1\.png is damaged: Bad CRC-32"):
        ZipStore(file).read("cat/1.png")


def test_what_is_no_zip_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    file.write_bytes(b"nothing of the sort")
    with pytest.raises(DataError, match=r"a\.zip cannot be read as a zip file: File is not a zip file"):
        ZipStore(file)
