"""Image files to arrays, with the checks that make a damaged or hostile file an error with a name.

- `decode_image`: one encoded image; `looks_like_image`: whether a file without a known ending is one;
- `read_images`: the files that a user names, as a batch of pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from carso_cli.errors import DataError, UsageError
from carso_cli.io.files import read_given

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".avifs", ".qoi", ".ico"),
    }
)
"""File endings, in lower case, that count as images."""

# In RGB these take 200 MB; below the size from which Pillow warns of a decompression bomb.
MAX_PIXELS = 2**26
"""Most pixels an image may claim (about 67 million)."""

# A closed list: some of Pillow's other readers start external programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "QOI", "ICO")
START_BYTES = 16
"""What `looks_like_image` needs of a file."""

# How files of the common formats begin: (offset, bytes).
_SIGNATURES = (
    *((0, b"\xff\xd8\xff"), (0, b"\x89PNG"), (0, b"BM"), (0, b"GIF8"), (8, b"WEBP"), (0, b"II*\x00")),
    *((0, b"MM\x00*"), (0, b"P5\n"), (0, b"P6\n"), (4, b"ftypavi"), (0, b"qoif")),
)
_FEWER_PIXELS = f"at most {MAX_PIXELS} pixels are decoded; make the image smaller or remove it"
_MOST_SHOWN = 5


def looks_like_image(start: bytes) -> bool:
    """Return whether a file's first `START_BYTES` are those of an image of a common format."""
    return any(start.startswith(signature, offset) for offset, signature in _SIGNATURES)


def read_start(path: Path) -> bytes:
    """Return a file's first `START_BYTES`; none if it is no regular file or cannot be read."""
    try:
        # Asked first: to open a pipe may wait for ever.
        if path.is_file():
            with path.open("rb") as stream:
                return stream.read(START_BYTES)
    except OSError:
        pass
    return b""


def read_images(
    paths: Sequence[Path | str], *, channels: int, image_size: int, resize: bool = False
) -> Tensor:
    """Read image files of any common format and colour mode.

    Args:
        paths: The files, in the order wanted.
        channels: 1 or 3; images are converted.
        image_size: Height and width, in pixels.
        resize: Crop images of another size centrally to a square and resize them bicubically.

    Returns:
        float32 (B, channels, image_size, image_size) in [0, 1].

    Raises:
        UsageError: If no file is named.
        DataError: Naming every file that is missing, damaged, or of another size while `resize` is off.
    """
    if not paths:
        raise UsageError("no image file is named; at least one is needed")
    arrays, problems = [], []
    for path in map(Path, paths):
        try:
            arrays.append(
                decode_image(
                    read_given(path),
                    name=str(path),
                    channels=channels,
                    image_size=image_size,
                    resize=resize,
                    size_hint="add --resize to crop and resize it",
                )
            )
        # Gathered, so that one run names every file that has to be mended.
        except DataError as problem:
            problems.append(problem)
    if problems:
        messages = [problem.message for problem in problems[:_MOST_SHOWN]]
        if len(problems) > _MOST_SHOWN:
            messages.append(f"and {len(problems) - _MOST_SHOWN} more files")
        hints = dict.fromkeys(problem.hint for problem in problems if problem.hint)
        raise DataError("\n".join(messages), hint="; ".join(hints))
    return torch.from_numpy(np.stack(arrays)).to(torch.float32).div_(255.0)


def decode_image(
    data: bytes,
    *,
    name: str,
    channels: int,
    image_size: int | None,
    resize: bool = False,
    size_hint: str = "",
) -> NDArray[np.uint8]:
    """Decode one image, whatever its colour mode, to RGB or grey.

    Grey-scale, palette and CMYK images become RGB for 3 channels; colour becomes grey (ITU-R
    601 luma) for 1. Transparency is dropped, the first frame of an animation is taken, and a
    photograph is turned the way its EXIF orientation says.

    Args:
        data: The encoded file.
        name: What to call it in a message.
        channels: 1 or 3.
        image_size: Height and width needed, in pixels; None takes the image as it is, of any aspect.
        resize: Crop centrally to a square and resize bicubically instead of refusing another size.
        size_hint: Next step to give when the size is wrong.

    Returns:
        uint8 (channels, image_size, image_size), or (channels, H, W).

    Raises:
        DataError: If the file is empty, damaged, not an image, of more than 8 bits per channel,
            claims more than `MAX_PIXELS`, or has another size while `resize` is off.
    """
    if not data:
        raise DataError(f"{name} is empty (0 bytes)", hint="replace or remove it")
    try:
        with warnings.catch_warnings():
            # Remarks on metadata, such as damaged EXIF, which leave the pixels alone.
            warnings.simplefilter("ignore", UserWarning)
            # Pillow only warns between its limit and twice that, and would then decode.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Pillow reads the header alone here: size and mode are checked before pixels are decoded.
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_header(image, data, name, image_size, resize, size_hint)
                return _to_array(image, channels, image_size)
    # Or the last clause would call an image of another size damaged.
    except DataError:
        raise
    except UnidentifiedImageError as error:
        allowed = ", ".join(_FORMATS)
        raise DataError(f"{name} is not a readable image ({allowed})", hint="replace or remove it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} claims too many pixels: {error}", hint=_FEWER_PIXELS) from error
    except Exception as error:  # Pillow's readers raise errors of almost every kind on damaged input
        raise DataError(f"{name} is a damaged image: {error}", hint="replace or remove it") from error


def _check_header(
    image: Image.Image, data: bytes, name: str, image_size: int | None, resize: bool, size_hint: str
) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name} claims {width}x{height} pixels, too many to decode", hint=_FEWER_PIXELS)
    if image_size is not None and not resize and image.size != (image_size, image_size):
        raise DataError(f"{name} is {width}x{height}; {image_size}x{image_size} is needed", hint=size_hint)
    # Pillow would clip grey ones to 255 instead of scaling them, and cut colour to 8 bits.
    if image.mode in {"I", "F"} or image.mode.startswith("I;") or _deep_colour(image, data):
        raise DataError(
            f"{name} has more than 8 bits per channel (mode {image.mode})",
            hint="convert it to 8 bits per channel",
        )


def _deep_colour(image: Image.Image, data: bytes) -> bool:
    """Return whether an image that Pillow opens with 8 bits per channel has more in the file."""
    if image.format == "AVIF":
        # The flag `high_bitdepth` in the third byte of the codec's configuration.
        place = data.find(b"av1C")
        return place >= 0 and bool(data[place + 6] & 0x40)
    # How the decoder unpacks pixels: `RGB;16B`, or `RGB` and the largest value of a PPM.
    for tile in getattr(image, "tile", ()):
        for part in tile[3] if isinstance(tile[3], tuple) else (tile[3],):
            if ";16" in part if isinstance(part, str) else image.format == "PPM" and part > 255:
                return True
    return False


def _to_array(image: Image.Image, channels: int, image_size: int | None) -> NDArray[np.uint8]:
    upright: Image.Image = ImageOps.exif_transpose(image) if "exif" in image.info else image
    # Before resizing, since the numbers of palette colours cannot be interpolated.
    converted = upright.convert("RGB" if channels == 3 else "L")
    if image_size is not None and converted.size != (image_size, image_size):
        side = min(converted.size)
        left, top = (converted.width - side) // 2, (converted.height - side) // 2
        square = converted.crop((left, top, left + side, top + side))
        converted = square.resize((image_size, image_size), Image.Resampling.BICUBIC)
    array = np.asarray(converted)
    return array.transpose(2, 0, 1) if channels == 3 else array[None]
