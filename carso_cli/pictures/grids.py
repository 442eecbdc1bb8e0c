"""Grids of images, and single images, as files."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from torch import Tensor

from carso_cli.errors import UsageError
from carso_cli.io.json_files import write_atomically

_INCHES = 1.1
_PIXELS_PER_INCH = 120
_FONT = 11
_LONGEST = 9


def amplified(change: Tensor, largest: float) -> Tensor:
    """Show a perturbation around mid-grey, its largest allowed value at black and white.

    Args:
        change: (B, channels, H, W), perturbed minus clean.
        largest: Change of a pixel that becomes black or white, above 0.

    Returns:
        Same shape, in [0, 1].
    """
    return (0.5 + change / (2.0 * largest)).clamp(0.0, 1.0)


def decision_caption(label: str, decision: str) -> str:
    """Write label and decision to stand above an image: no wider than a dozen letters, or they would meet."""
    names = (label, decision)
    first, second = (name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names)
    return f"{first} > {second}" if len(first) + len(second) <= _LONGEST else f"{first}\n> {second}"


def render_grid(
    rows: Sequence[tuple[str, Tensor]],
    captions: Sequence[str] = (),
    kind: str = "png",
    *,
    ink: str = "#000000",
    paper: str = "#ffffff",
) -> bytes:
    """Draw a grid of images.

    Args:
        rows: Heading and images (B, channels, H, W) in [0, 1] of each row; 1 or 3 channels.
        captions: A few characters above each column, such as a label; none when empty.
        kind: `png` or `svg`.
        ink: Colour of the text.
        paper: Colour of the background.

    Returns:
        The content of a file.

    Raises:
        UsageError: If the rows differ in length, or there is nothing to show.
    """
    lengths = {len(images) for _, images in rows}
    if len(lengths) != 1 or 0 in lengths or (captions and len(captions) not in lengths):
        raise UsageError(f"a picture needs rows of one length, not {sorted(lengths)}")
    # Without pyplot: no global state, and no window system is asked for.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = lengths.pop()
    above = 0.1 + 0.2 * max((caption.count("\n") + 1 for caption in captions), default=0)
    # One column more than there are images, for the headings on the left.
    size = (_INCHES * (columns + 1), _INCHES * len(rows) + above)
    # Ids in an SVG are random without a salt; a dollar in a class name starts no formula.
    with rc_context({"svg.hashsalt": "carso", "text.parse_math": False}):
        figure = Figure(figsize=size, dpi=_PIXELS_PER_INCH, facecolor=paper)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for line, (heading, images) in zip(axes, rows, strict=True):
            pixels = images.detach().cpu().clamp(0.0, 1.0).permute(0, 2, 3, 1).numpy()
            for place, (axis, picture) in enumerate(zip(line, pixels, strict=True)):
                # `imshow` takes (H, W) for one channel and stretches its contrast unless told the range.
                shown = picture.squeeze(2) if picture.shape[2] == 1 else picture
                axis.imshow(shown, cmap="gray", vmin=0, vmax=1)
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
                if place == 0:
                    axis.set_ylabel(heading, rotation=0, ha="right", va="center", fontsize=_FONT, color=ink)
        for axis, caption in zip(axes[0], captions, strict=False):
            axis.set_title(caption, fontsize=_FONT, color=ink)
        figure.subplots_adjust(
            left=1.0 / (columns + 1),
            right=0.995,
            top=1.0 - above / size[1],
            bottom=0.01,
            wspace=0.05,
            hspace=0.05,
        )
        buffer = BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def save_grid(path: Path, rows: Sequence[tuple[str, Tensor]], captions: Sequence[str] = ()) -> None:
    """Write a grid of images as a PNG, atomically; see `render_grid`.

    Raises:
        UsageError: If the rows differ in length, or there is nothing to show.
        CarsoError: If the file cannot be written.
    """
    write_atomically(path, render_grid(rows, captions))


def save_image(path: Path, image: Tensor) -> None:
    """Write one image (channels, H, W) in [0, 1] as a PNG of its own size, atomically.

    Raises:
        CarsoError: If the file cannot be written.
    """
    from PIL import Image

    # Rounded, since `byte` cuts fractions off: an image read and written again would grow darker.
    pixels = image.detach().cpu().clamp(0.0, 1.0).mul(255.0).round().byte().permute(1, 2, 0).numpy()
    buffer = BytesIO()
    # Pillow takes (H, W) for grey, not (H, W, 1).
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
