"""Images of every kind of damage: a tensor of the right shape, or a message that names the file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from carso_cli.data.decode import read_images
from carso_cli.errors import DataError
from tests.hostile.conftest import Bounded

NAME = "odd.png"
_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("1", "L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "RGB", "CMYK", "I;16", "F", "I"),
    "PPM": ("L", "RGB", "I;16"),
}
_KINDS = [(form, mode) for form, modes in _MODES.items() for mode in modes]


def encode(form: str, mode: str, size: tuple[int, int], frames: int = 1) -> bytes:
    images = [Image.new(mode, size, number) for number in range(frames)]
    stream = io.BytesIO()
    more: dict[str, Any] = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(stream, form, **more)
    return stream.getvalue()


def named(error: DataError) -> str:
    assert NAME in error.message
    return error.message


def check(place: Path, content: bytes, channels: int, resize: bool, bounded: Bounded) -> str:
    """Read one file; return `read`, or what was said about it."""
    place.write_bytes(content)
    try:
        with bounded():
            found = read_images([place], channels=channels, image_size=32, resize=resize)
    except DataError as error:
        return named(error)
    assert found.shape == (1, channels, 32, 32)
    assert 0.0 <= float(found.min()) <= float(found.max()) <= 1.0
    return "read"


@given(
    kind=st.sampled_from(_KINDS),
    size=st.sampled_from([(32, 32), (1, 1), (33, 32), (64, 48), (5, 300)]),
    reading=st.tuples(st.sampled_from([1, 3]), st.booleans()),
    frames=st.integers(1, 3),
    damage=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6)), max_size=4),
    cut=st.floats(0, 1) | st.just(1.0),
)
def test_damaged_images_are_read_or_named(
    place: Path,
    bounded: Bounded,
    kind: tuple[str, str],
    size: tuple[int, int],
    reading: tuple[int, bool],
    frames: int,
    damage: list[tuple[float, bytes]],
    cut: float,
) -> None:
    channels, resize = reading
    content = bytearray(encode(*kind, size, frames if kind[0] in ("GIF", "TIFF", "WEBP") else 1))
    for where, piece in damage:
        start = int(where * len(content))
        content[start : start + len(piece)] = piece
    said = check(place, bytes(content[: int(cut * len(content))]), channels, resize, bounded)
    if not damage and cut == 1.0:
        deep = kind[1] in ("I;16", "F", "I")
        fits = resize or size == (32, 32)
        assert (said == "read") == (fits and not deep), said
        assert not (deep and fits) or "more than 8 bits" in said


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@given(width=st.integers(0, 2**32 - 1), height=st.integers(0, 2**32 - 1))
def test_claimed_dimensions_cost_nothing(place: Path, bounded: Bounded, width: int, height: int) -> None:
    said = check(place, png(width, height, zlib.compress(b"")), 3, True, bounded)
    assert said != "read"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n", "not a readable image"),
        (png(60_000, 60_000, zlib.compress(bytes(10_000_000))), "too many"),
        (png(32, 32, zlib.compress(bytes(50_000_000))), "read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "not a readable image"),
        (b"P6\n99999999 99999999\n255\n", "too many"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable image"),
    ],
    ids=["empty", "header only", "pixel bomb", "too much data", "program", "huge ppm", "svg"],
)
def test_bombs(place: Path, bounded: Bounded, content: bytes, message: str) -> None:
    assert message in check(place, content, 3, True, bounded)


def test_an_animation_gives_its_first_frame(place: Path, bounded: Bounded) -> None:
    place.write_bytes(encode("GIF", "L", (32, 32), frames=3))
    assert torch.equal(read_images([place], channels=1, image_size=32), torch.zeros(1, 1, 32, 32))
