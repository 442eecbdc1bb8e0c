"""One encoded image to an array: the checks that make a damaged or hostile file an error with a name."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from carso_cli.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
"""File endings, in lower case, that count as images."""

MAX_PIXELS = 2**26
"""Most pixels an image may claim (about 67 million)."""

# A closed list: some of Pillow's other readers start external programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")

# What Pillow's readers raise on damaged input.
_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    KeyError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def decode_image(
    data: bytes, *, name: str, channels: int, image_size: int, resize: bool = False, size_hint: str = ""
) -> NDArray[np.uint8]:
    """Decode one image, whatever its colour mode, to RGB or grey.

    Grey-scale, palette and CMYK images become RGB for 3 channels; colour becomes grey (ITU-R
    601 luma) for 1. Transparency is dropped, the first frame of an animation is taken, and a
    photograph is turned the way its EXIF orientation says.

    Args:
        data: The encoded file.
        name: What to call it in a message.
        channels: 1 or 3.
        image_size: Height and width needed, in pixels.
        resize: Crop centrally to a square and resize bicubically instead of refusing another size.
        size_hint: Next step to give when the size is wrong.

    Returns:
        uint8 (channels, image_size, image_size).

    Raises:
        DataError: If the file is empty, damaged, not an image, of more than 8 bits a channel,
            claims more than `MAX_PIXELS`, or has another size while `resize` is off.
    """
    if not data:
        raise DataError(f"{name} is empty (0 bytes)", hint="replace or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_size(image.size, name, image_size, resize, size_hint)
                return _to_array(image, name, channels, image_size)
    except UnidentifiedImageError as error:
        allowed = ", ".join(_FORMATS)
        raise DataError(f"{name} is not a readable image ({allowed})", hint="replace or remove it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} claims too many pixels: {error}", hint=_FEWER_PIXELS) from error
    except _FAULTS as error:
        raise DataError(f"{name} is a damaged image: {error}", hint="replace or remove it") from error


_FEWER_PIXELS = f"at most {MAX_PIXELS} pixels are decoded; make the image smaller or remove it"


def _check_size(size: tuple[int, int], name: str, image_size: int, resize: bool, size_hint: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name} claims {width}x{height} pixels, too many to decode", hint=_FEWER_PIXELS)
    if not resize and size != (image_size, image_size):
        raise DataError(f"{name} is {width}x{height}; {image_size}x{image_size} is needed", hint=size_hint)


def _to_array(image: Image.Image, name: str, channels: int, image_size: int) -> NDArray[np.uint8]:
    if image.mode in {"I", "F"} or image.mode.startswith("I;"):
        # Pillow would clip these to 255 instead of scaling them.
        raise DataError(
            f"{name} has more than 8 bits a channel (mode {image.mode})",
            hint="convert it to 8 bits a channel",
        )
    upright: Image.Image = ImageOps.exif_transpose(image) if "exif" in image.info else image
    converted = upright.convert("RGB" if channels == 3 else "L")
    if converted.size != (image_size, image_size):
        converted = _middle_square(converted).resize((image_size, image_size), Image.Resampling.BICUBIC)
    array = np.asarray(converted)
    return array.transpose(2, 0, 1) if channels == 3 else array[None]


def _middle_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
