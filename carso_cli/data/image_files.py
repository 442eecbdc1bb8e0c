"""Image files that a user names, as a batch of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from carso_cli.data.decode import decode_image
from carso_cli.errors import DataError, UsageError
from carso_cli.io.files import read_given

_MOST_SHOWN = 5


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
    arrays = []
    problems: list[DataError] = []
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
        except DataError as problem:
            problems.append(problem)
    if problems:
        raise _together(problems)
    return torch.from_numpy(np.stack(arrays)).to(torch.float32).div_(255.0)


def _together(problems: Sequence[DataError]) -> DataError:
    messages = [problem.message for problem in problems[:_MOST_SHOWN]]
    if len(problems) > _MOST_SHOWN:
        messages.append(f"and {len(problems) - _MOST_SHOWN} more files")
    hints = dict.fromkeys(problem.hint for problem in problems if problem.hint)
    return DataError("\n".join(messages), hint="; ".join(hints))
