"""Random shifts and mirror images of training batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = 4
"""Largest shift, in pixels."""


def augment(images: Tensor, *, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels each way, filling with zeros, and mirror half of them.

    Args:
        images: (B, channels, H, W).
        flip: Mirror left and right with probability 1/2.
        generator: Source of the choices, on the CPU: they are the same wherever the images are.

    Returns:
        Same shape.
    """
    count, _, height, width = images.shape
    # Drawn before the mirror images: the switch `flip` leaves the shifts of a seed as they are.
    shifts = torch.randint(0, 2 * MARGIN + 1, (count, 2), generator=generator)
    padded = F.pad(images, (MARGIN,) * 4)
    # A start of 0 to 8 in the padded image is a shift of -4 to 4.
    rows = shifts[:, :1] + torch.arange(height)
    columns = shifts[:, 1:] + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        # Reversing the column numbers mirrors the shifted window while it is gathered.
        columns[mirrored] = columns[mirrored].flip(1)
    batch = torch.arange(count)[:, None, None]
    # Indexing three axes at once puts the channels last.
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
