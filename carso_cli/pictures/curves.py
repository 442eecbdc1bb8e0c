"""Curves and bars: training, accuracy against a setting, accuracy by a choice.

A `Picture` knows how to draw itself on axes; `render` puts one or several on a canvas and returns the file's
bytes, in a style for light or for dark pages. Colours are those of Okabe and Ito (2008), which people with
any colour vision can tell apart; every series has its own marker and dash as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from carso_cli.io.json_files import write_atomically
from carso_cli.pictures.points import Bar, Curve

Axes = Any
_WIDTH, _HEIGHT = 4.6, 3.1
_PIXELS_PER_INCH = 150
_MARKERS = ("o", "s", "^", "D", "v")
_DASHES = ("-", "--", "-.", ":", "-")


@dataclass(frozen=True)
class Style:
    """Colours of a picture.

    Args:
        ink: Text and axes.
        paper: Background.
        grid: Lines behind the data.
        colours: Series, in order.
    """

    ink: str
    paper: str
    grid: str
    colours: tuple[str, ...]


LIGHT = Style("#1b1f24", "#ffffff", "#d5dbe1", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"))
DARK = Style("#e8ebee", "#14171a", "#39424a", ("#56b4e9", "#e69f00", "#2fc79a", "#cc79a7", "#f0e442"))


@dataclass(frozen=True)
class Picture:
    """One set of axes.

    Args:
        name: Stem of its file name.
        title: What it shows.
        draw: Draws it on matplotlib axes.
        caption: What it was drawn from.
        rows: Height, in rows of bars; 0 for the usual one.
    """

    name: str
    title: str
    draw: Callable[[Axes, Style], None]
    caption: str = ""
    rows: int = 0


def training_pictures(metrics: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Return the course of a purifier's training: loss and BCE, KL, beta, rate, held-out accuracy.

    Args:
        metrics: Lines of `metrics.jsonl`; empty for no pictures.
    """
    if not metrics:
        return []
    epochs = [line["epoch"] + 1 for line in metrics]

    def course(name: str, title: str, keys: Mapping[str, str]) -> Picture | None:
        """Return lines of `keys`, label to key; None where no epoch has any of them."""
        found = {label: [line.get(key) for line in metrics] for label, key in keys.items()}
        shown = {label: values for label, values in found.items() if any(v is not None for v in values)}
        if not shown:
            return None

        def draw(axes: Axes, style: Style) -> None:
            """Draw the lines against the epoch."""
            for place, (label, values) in enumerate(shown.items()):
                axes.plot(epochs, values, label=label, **_looks(style, place, many=len(epochs) > 40))
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            if len(shown) > 1:
                _legend(axes, style)
            if name == "accuracy":
                known = [value for values in shown.values() for value in values if value is not None]
                axes.set_ylim(min(0.9, *known) - 0.03, 1.01)

        return Picture(f"training-{name}", title, draw)

    whole = "whole" if "accuracy" in metrics[-1] else "BCE + beta KL"
    accuracies = {"clean": "defence_clean_accuracy", "attacked": "defence_attacked_accuracy"}
    found = [
        course("loss", "Loss an image", {whole: "loss", "BCE": "bce"}),
        course("kl", "KL an image, in nats", {"KL": "kl"}),
        course("beta", "Weight beta of the KL", {"beta": "beta"}),
        course("rate", "Learning rate", {"rate": "learning_rate"}),
        course("accuracy", "Accuracy of the defence, held out", accuracies),
    ]
    return [picture for picture in found if picture is not None]


def curves_picture(
    name: str, title: str, curves: Sequence[Curve], *, label: str, caption: str = "", doubling: bool = False
) -> Picture:
    """Return accuracies against a setting, with their intervals.

    Args:
        name: Stem of the file name.
        title: What it shows.
        curves: Accuracies in [0, 1].
        label: The setting, with its unit.
        caption: What it was drawn from.
        doubling: Whether the setting doubles from point to point, as numbers of samples do.
    """

    def draw(axes: Axes, style: Style) -> None:
        """Draw the curves side by side, intervals upright."""
        for place, curve in enumerate(curves):
            looks = _looks(style, place)
            # A few points to the side, so that intervals at one place do not cover each other.
            beside = _shifted(axes, 3.0 * (place - (len(curves) - 1) / 2))
            for point in curve.points:
                if point.low is not None and point.high is not None:
                    ends = {"linewidth": 1.0, "marker": "_", "markersize": 5, "transform": beside}
                    axes.plot([point.x] * 2, [point.low, point.high], color=looks["color"], **ends)
            xs, ys = [point.x for point in curve.points], [point.y for point in curve.points]
            axes.plot(xs, ys, label=curve.name, transform=beside, **looks)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy")
        _span(axes, sorted({point.x for curve in curves for point in curve.points}), doubling)
        _legend(axes, style)

    return Picture(name, title, draw, caption)


def bars_picture(
    name: str, title: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, label: str, caption: str = ""
) -> Picture:
    """Return accuracies by a choice, such as the layers that are used, as points with intervals.

    Args:
        name: Stem of the file name.
        title: What it shows.
        groups: Name and bars of each group, such as clean and attacked; bars of one name share a line.
        label: What the accuracies are.
        caption: What it was drawn from.
    """
    names = list(dict.fromkeys(bar.name for _, bars in groups for bar in bars))

    def draw(axes: Axes, style: Style) -> None:
        """Draw the points one name a line, intervals flat."""
        for place, (group, bars) in enumerate(groups):
            looks = _looks(style, place) | {"linestyle": "none"}
            # Groups lie a little above each other on their common line.
            lines = [
                len(names) - 1 - names.index(bar.name) + 0.12 * (len(groups) - 1 - 2 * place) for bar in bars
            ]
            for line, bar in zip(lines, bars, strict=True):
                if bar.low is not None and bar.high is not None:
                    axes.plot([bar.low, bar.high], [line, line], color=looks["color"], linewidth=1.4)
            axes.plot([bar.value for bar in bars], lines, label=group, **looks)
        axes.set_yticks(range(len(names)), names[::-1])
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_xlabel(label)
        _legend(axes, style)

    return Picture(name, title, draw, caption, rows=len(names))


def render(
    pictures: Sequence[Picture], kind: str = "png", style: Style = LIGHT, *, titles: bool = True
) -> bytes:
    """Draw pictures on one canvas, two beside each other.

    Args:
        pictures: At least one.
        kind: `png` or `svg`.
        style: Colours.
        titles: Whether to write their titles above them.

    Returns:
        The content of a file; the same pictures always give the same bytes.
    """
    # Without pyplot: no global state, and no window system is asked for.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(len(pictures), 2)
    lines = -(-len(pictures) // columns)
    height = max(_HEIGHT, *(0.3 * picture.rows + 1.0 for picture in pictures))
    # A fixed salt, since ids in an SVG are random otherwise; a dollar in a name starts no formula.
    with rc_context({"svg.hashsalt": "carso", "font.size": 9.0, "text.parse_math": False}):
        figure = Figure(
            figsize=(_WIDTH * columns, height * lines), dpi=_PIXELS_PER_INCH, facecolor=style.paper
        )
        figure.set_layout_engine("constrained")
        spots = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
        for axes, picture in zip(spots, pictures, strict=False):
            _dress(axes, style)
            picture.draw(axes, style)
            if titles:
                axes.set_title(picture.title, color=style.ink, fontsize=10, loc="left")
        for axes in spots[len(pictures) :]:
            axes.set_axis_off()
        buffer = BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def save_pictures(folder: Path, name: str, pictures: Sequence[Picture]) -> list[Path]:
    """Write pictures on one canvas as `NAME.png` and `NAME.svg`, atomically; return the paths.

    Raises:
        CarsoError: If they cannot be written.
    """
    paths = []
    for kind in ("png", "svg"):
        path = folder / f"{name}.{kind}"
        write_atomically(path, render(pictures, kind))
        paths.append(path)
    return paths


def _looks(style: Style, place: int, *, many: bool = False) -> dict[str, Any]:
    place %= len(style.colours)
    looks = {"color": style.colours[place], "linestyle": _DASHES[place], "linewidth": 1.6}
    return looks if many else {**looks, "marker": _MARKERS[place], "markersize": 4}


def _dress(axes: Axes, style: Style) -> None:
    axes.set_facecolor(style.paper)
    axes.grid(color=style.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=style.ink, labelsize=8.5)
    axes.xaxis.label.set_color(style.ink)
    axes.yaxis.label.set_color(style.ink)
    for side, spine in axes.spines.items():
        spine.set_color(style.grid)
        spine.set_visible(side in ("left", "bottom"))


def _legend(axes: Axes, style: Style) -> None:
    legend = axes.legend(fontsize=8, framealpha=0.85, facecolor=style.paper, edgecolor=style.grid)
    for text in legend.get_texts():
        text.set_color(style.ink)


def _shifted(axes: Axes, points: float) -> Any:  # noqa: ANN401  (matplotlib is not typed here)
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(points / 72.0, 0.0, axes.figure.dpi_scale_trans)


def _span(axes: Axes, values: Sequence[float], doubling: bool) -> None:
    """Let the horizontal axis reach from the first value to the last; shifted lines do not stretch it."""
    if not doubling:
        margin = 0.05 * (values[-1] - values[0])
        axes.set_xlim(values[0] - margin, values[-1] + margin)
        return
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(values), [f"{value:g}" for value in values])
    margin = (values[-1] / values[0]) ** 0.05
    axes.set_xlim(values[0] / margin, values[-1] * margin)
