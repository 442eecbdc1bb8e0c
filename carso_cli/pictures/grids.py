"""Grids of images, and single images, as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from carso_cli.errors import UsageError
from carso_cli.io.json_files import write_atomically
from carso_cli.pictures.curves import KINDS, figure_bytes

_INCHES = 1.1
# Below an image, for a decision; around an image.
_BELOW, _GAP = 0.2, 0.04
_PIXELS_PER_INCH = 120
_FONT = 10
_LONGEST = 11
# Okabe and Ito (2008): told apart with any colour vision, and never by colour alone.
_RIGHT, _WRONG, _PERTURBED = "#009e73", "#d55e00", "#d55e00"


def amplified(change: Tensor, largest: float) -> Tensor:
    """Show a perturbation around mid-grey, its largest allowed value at black and white.

    Args:
        change: (B, channels, H, W), perturbed minus clean.
        largest: Change of a pixel that becomes black or white, above 0.

    Returns:
        Same shape, in [0, 1].
    """
    return (0.5 + change / (2.0 * largest)).clamp(0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a grid.

    Args:
        heading: What it shows, on the left.
        images: (B, channels, H, W) in [0, 1]; 1 or 3 channels.
        decisions: Names of the classes that a model takes them for, below the images; none when empty.
        perturbed: Whether they are perturbed: these rows have a coloured frame.
    """

    heading: str
    images: Tensor
    decisions: Sequence[str] = ()
    perturbed: bool = False


def shortened(name: str) -> str:
    """Return a class name no wider than an image."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def marked(label: str | None, decision: str) -> tuple[str, str | None]:
    """Return a decision with a mark for right or wrong, and its colour; without a label neither."""
    if label is None:
        return shortened(decision), None
    right = label == decision
    return f"{'✓' if right else '✗'} {shortened(decision)}", _RIGHT if right else _WRONG


def render_grid(
    rows: Sequence[Row],
    labels: Sequence[str] = (),
    kind: str = "png",
    *,
    ink: str = "#000000",
    paper: str = "#ffffff",
) -> bytes:
    """Draw a grid of images.

    Args:
        rows: At least one, all of one length.
        labels: Name of the class above each column; decisions below images are marked as right or wrong by
            it. Unknown when empty.
        kind: `png`, `svg` or `pdf`.
        ink: Colour of the text.
        paper: Colour of the background.

    Returns:
        The content of a file; the same rows always give the same bytes.

    Raises:
        UsageError: If the rows differ in length, or there is nothing to show.
    """
    lengths = {len(row.images) for row in rows} | {len(row.decisions) for row in rows if row.decisions}
    if len(lengths) != 1 or 0 in lengths or (labels and len(labels) not in lengths):
        raise UsageError(f"a picture needs rows of one length, not {sorted(lengths)}")
    # Without pyplot: no global state, and no window system is asked for.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = lengths.pop()
    above = 0.35 if labels else 0.1
    heights = [_INCHES + (_BELOW if row.decisions else 0.0) for row in rows]
    # One column more than there are images, for the headings on the left.
    width, height = _INCHES * (columns + 1), above + sum(heights)
    # Ids in an SVG are random without a salt; a dollar in a class name starts no formula.
    with rc_context({"svg.hashsalt": "carso", "text.parse_math": False}):
        figure = Figure(figsize=(width, height), dpi=_PIXELS_PER_INCH, facecolor=paper)

        def write(x: float, y: float, text: str, **looks: Any) -> None:  # noqa: ANN401  (matplotlib's own)
            """Write a text at a place in inches from the lower left corner."""
            figure.text(x / width, y / height, text, **{"ha": "center", "fontsize": _FONT, **looks})

        for column, label in enumerate(labels):
            write((column + 1.5) * _INCHES, height - 0.22, shortened(label), color=ink)
        for number, row in enumerate(rows):
            bottom = height - above - sum(heights[:number]) - _INCHES
            heading = {"ha": "right", "va": "center", "color": _PERTURBED if row.perturbed else ink}
            write(_INCHES - 0.08, bottom + _INCHES / 2, row.heading, **heading)
            pixels = row.images.detach().cpu().clamp(0.0, 1.0).permute(0, 2, 3, 1).numpy()
            for column, picture in enumerate(pixels):
                left, side = (column + 1) * _INCHES + _GAP, _INCHES - 2 * _GAP
                place = (left / width, (bottom + _GAP) / height, side / width, side / height)
                _draw_image(figure.add_axes(place), picture, framed=row.perturbed)
                if row.decisions:
                    text, colour = marked(labels[column] if labels else None, row.decisions[column])
                    below = bottom - 0.14
                    write(left + side / 2, below, text, color=colour or ink, fontsize=_FONT - 1)
        return figure_bytes(figure, kind)


def _draw_image(axes: Any, picture: Any, *, framed: bool) -> None:  # noqa: ANN401  (matplotlib's, numpy's)
    # `imshow` takes (H, W) for one channel and stretches its contrast unless told the range.
    shown = picture.squeeze(2) if picture.shape[2] == 1 else picture
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(visible=framed, color=_PERTURBED, linewidth=2.0)


def save_grid(path: Path, rows: Sequence[Row], labels: Sequence[str] = ()) -> None:
    """Write a grid of images as a PNG, and as SVG and PDF beside it, atomically; see `render_grid`.

    Args:
        path: The PNG.
        rows: See `render_grid`.
        labels: See `render_grid`.

    Raises:
        UsageError: If the rows differ in length, or there is nothing to show.
        CarsoError: If a file cannot be written.
    """
    for kind in KINDS:
        write_atomically(path.with_suffix(f".{kind}"), render_grid(rows, labels, kind))


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
