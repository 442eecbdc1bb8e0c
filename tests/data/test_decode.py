"""Images: colour modes become what is asked for; whatever cannot is refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, features

from carso_cli.data import decode as decoding
from carso_cli.data.decode import START_BYTES, decode_image, looks_like_image, read_images
from carso_cli.errors import DataError, UsageError
from carso_cli.io import files as given_file

WriteImage = Callable[..., Path]

RAMP = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decode(data: bytes, channels: int = 3, *, resize: bool = False) -> NDArray[np.uint8]:
    return decode_image(data, name="a.png", channels=channels, image_size=32, resize=resize, size_hint="HINT")


def test_colour_is_read_channel_first_and_unchanged() -> None:
    assert np.array_equal(decode(encode(Image.fromarray(RAMP))), RAMP.transpose(2, 0, 1))


def test_grey_and_palette_images_become_rgb() -> None:
    grey = Image.fromarray(RAMP[..., 0])
    assert np.array_equal(decode(encode(grey)), np.stack([RAMP[..., 0]] * 3))
    palette = grey.convert("P")
    palette.putpalette([value for level in range(256) for value in (level, 255 - level, 7)])
    expected = np.stack([RAMP[..., 0], 255 - RAMP[..., 0], np.full((32, 32), 7)])
    assert np.array_equal(decode(encode(palette)), expected)
    assert np.array_equal(decode(encode(palette, transparency=bytes(range(256)))), expected)


def test_colour_becomes_grey_by_its_luma() -> None:
    luma = RAMP.astype(np.float64) @ [0.299, 0.587, 0.114]
    grey = decode(encode(Image.fromarray(RAMP)), channels=1)
    assert grey.shape == (1, 32, 32)
    assert np.abs(grey[0] - luma).max() < 0.51


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("1", "PNG"), ("RGBA", "PNG"), ("L", "GIF")])
def test_other_modes_keep_the_picture(mode: str, kind: str) -> None:
    original = np.zeros((32, 32, 3), np.uint8)
    original[:16] = 255
    array = decode(encode(Image.fromarray(original).convert(mode), kind))
    assert array[:, :15].min() > 240
    assert array[:, 17:].max() < 15


def test_exif_orientation_is_followed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned = decode(encode(Image.fromarray(RAMP), exif=exif))
    assert np.array_equal(turned, np.rot90(RAMP, k=-1).transpose(2, 0, 1))


def test_resizing_crops_the_middle_square() -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 200
    assert np.array_equal(decode(encode(Image.fromarray(wide)), resize=True), np.full((3, 32, 32), 200))


def test_another_size_is_refused_with_its_size_and_the_hint() -> None:
    data = encode(Image.new("RGB", (40, 32)))
    with pytest.raises(DataError, match=r"a\.png is 40x32; 32x32 is needed") as caught:
        decode(data)
    assert caught.value.hint == "HINT"
    assert caught.value.exit_code == 3


def test_damaged_files_are_named() -> None:
    good = encode(Image.fromarray(RAMP))
    with pytest.raises(DataError, match=r"a\.png is empty \(0 bytes\)"):
        decode(b"")
    with pytest.raises(DataError, match=r"a\.png is not a readable image \(JPEG, PNG"):
        decode(b"not an image at all")
    for damaged in (good[:-60], encode(Image.fromarray(RAMP), "JPEG")[:-300]):
        with pytest.raises(DataError, match=r"a\.png is a damaged image: "):
            decode(damaged)


def test_deep_images_are_refused_rather_than_clipped() -> None:
    deep = Image.fromarray(np.full((32, 32), 1000, np.uint16))
    with pytest.raises(DataError, match=r"a\.png has more than 8 bits per channel \(mode I;16\)"):
        decode(encode(deep))


def deep_png() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes(32 * (1 + 32 * 6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def deep_tiff() -> bytes:
    longs = {256: 32, 257: 32, 259: 1, 262: 2, 273: 300, 277: 3, 278: 32, 279: 32 * 32 * 6}
    tags = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in longs.items()]
    # Bits per sample: three values, which lie elsewhere in the file.
    tags.insert(2, struct.pack("<HHII", 258, 3, 3, 200))
    start = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags)
    return (start.ljust(200, b"\0") + struct.pack("<HHH", 16, 16, 16)).ljust(300, b"\0") + bytes(32 * 32 * 6)


@pytest.mark.parametrize(
    "data",
    [deep_png(), deep_tiff(), b"P6\n32 32\n65535\n" + bytes(32 * 32 * 6)],
    ids=["PNG", "TIFF", "PPM"],
)
def test_deep_colour_is_refused_rather_than_cut(data: bytes) -> None:
    # Pillow opens it with 8 bits per channel.
    assert Image.open(io.BytesIO(data)).mode == "RGB"
    with pytest.raises(DataError, match="a has more than 8 bits per channel"):
        decode_image(data, name="a", channels=3, image_size=32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "QOI", "ICO"])
def test_common_formats_are_read_and_known_by_their_first_bytes(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 50)).save(stream, kind)
    found = decode_image(stream.getvalue(), name="a", channels=3, image_size=32)
    assert np.abs(found[:, 5, 5].astype(int) - (200, 100, 50)).max() <= 6
    # An icon begins like many other files.
    assert looks_like_image(stream.getvalue()[:START_BYTES]) == (kind != "ICO")


def claimed(width: int, height: int) -> bytes:
    """A PNG file whose header claims a size that its content does not have."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")]
    parts = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (10_000, 10_000), (60_000, 60_000)])
@pytest.mark.parametrize("resize", [True, False])
def test_a_huge_claim_is_refused_before_decoding(width: int, height: int, resize: bool) -> None:
    with pytest.raises(
        DataError, match=r"a\.png claims .*(81000000|100000000|3600000000|9000x9000)"
    ) as caught:
        decode(claimed(width, height), resize=resize)
    assert str(decoding.MAX_PIXELS) in caught.value.hint


def test_readers_that_start_programs_are_not_used() -> None:
    with pytest.raises(DataError, match="not a readable image"):
        decode(encode(Image.fromarray(RAMP), "EPS"))


# --- a user's own files ---


def test_files_come_in_the_order_named_as_pixels_in_the_unit_interval(
    tmp_path: Path, write_image: WriteImage
) -> None:
    white = write_image(tmp_path / "a.png", 255)
    dark = write_image(tmp_path / "b.png", 51)
    pixels = read_images([dark, str(white)], channels=3, image_size=32)
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[:, 0, 0, 0], torch.tensor([0.2, 1.0]))
    assert read_images([white], channels=1, image_size=32).shape == (1, 1, 32, 32)


def test_another_size_needs_resize(tmp_path: Path, write_image: WriteImage) -> None:
    large = write_image(tmp_path / "large.png", 200, size=48)
    with pytest.raises(DataError, match=r"large\.png is 48x48; 32x32 is needed") as caught:
        read_images([large], channels=3, image_size=32)
    assert "--resize" in caught.value.hint
    resized = read_images([large], channels=3, image_size=32, resize=True)
    assert torch.equal(resized, torch.full((1, 3, 32, 32), 200 / 255))


def test_every_unusable_file_is_named_at_once(tmp_path: Path, write_image: WriteImage) -> None:
    good = write_image(tmp_path / "good.png")
    empty = tmp_path / "empty.png"
    empty.touch()
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(DataError) as caught:
        read_images([good, empty, text, tmp_path / "god.png", tmp_path], channels=3, image_size=32)
    lines = caught.value.message.splitlines()
    assert lines[0] == f"{empty} is empty (0 bytes)"
    assert lines[1].startswith(f"{text} is not a readable image")
    assert lines[2] == f"{tmp_path / 'god.png'} does not exist"
    assert lines[3] == f"{tmp_path} cannot be read: it is a folder; a file is needed"
    assert "did you mean 'good.png'" in caught.value.hint


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"and 3 more files$"):
        read_images([tmp_path / f"{number}.png" for number in range(8)], channels=3, image_size=32)


def test_no_files_and_huge_files_are_refused(
    tmp_path: Path, write_image: WriteImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no image file is named"):
        read_images([], channels=3, image_size=32)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    file = write_image(tmp_path / "a.png", pixels=noise)
    monkeypatch.setattr(given_file, "MAX_BYTES", 100)
    size = f"{file.stat().st_size:,}"
    with pytest.raises(
        DataError, match=rf"a\.png cannot be read: it has {size} bytes; at most 100 are allowed"
    ):
        read_images([file], channels=3, image_size=32)


def test_a_pipe_is_refused_instead_of_waited_for() -> None:
    with pytest.raises(DataError, match="/dev/null cannot be read: it is a pipe or device"):
        read_images(["/dev/null"], channels=3, image_size=32)
