"""Curves and bars: accuracies, or anything else, against a setting or by a choice.

`render` puts one or several pictures on a canvas and returns the file's bytes, in a style for light or for
dark pages. Colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart;
every curve has its own marker and dash as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from math import isnan, nan
from typing import Any, NamedTuple

Axes = Any
KINDS = ("png", "svg", "pdf")
"""Formats in which every picture is written."""
_UNDATED = {"png": None, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
_WIDTH, _HEIGHT = 4.6, 3.1
_PIXELS_PER_INCH = 150
_DASHES = ("-", "--", "-.", ":", "-")
_MARKERS = ("o", "s", "^", "D", "v")


class Point(NamedTuple):
    """A value at a setting, which is a number or a name, with its interval, NaN where it has none."""

    x: Any
    y: float
    low: float = nan
    high: float = nan


@dataclass(frozen=True)
class Curve:
    """A named series of points, in the order in which they are joined."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Style:
    """Colours of a picture.

    Args:
        ink: Text.
        paper: Background.
        grid: Axes, and lines behind the data.
        colours: Curves, in order.
    """

    ink: str
    paper: str
    grid: str
    colours: tuple[str, ...]

    def parameters(self) -> dict[str, Any]:
        """Return the style as matplotlib's rcParams."""
        # In the function: matplotlib is slow to import, and most commands draw nothing.
        from matplotlib.rcsetup import cycler

        return {
            **{"figure.facecolor": self.paper, "axes.facecolor": self.paper, "axes.edgecolor": self.grid},
            **{"text.color": self.ink, "axes.labelcolor": self.ink, "axes.titlelocation": "left"},
            **{"xtick.color": self.ink, "ytick.color": self.ink, "axes.axisbelow": True},
            **{"axes.grid": True, "grid.color": self.grid, "grid.linewidth": 0.6},
            **{"axes.spines.top": False, "axes.spines.right": False},
            **{"legend.facecolor": self.paper, "legend.edgecolor": self.grid, "legend.framealpha": 0.85},
            **{"font.size": 9.0, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.0},
            **{"axes.titlesize": 10.0, "lines.linewidth": 1.6, "lines.markersize": 4.0},
            # The three cycle together, and matplotlib refuses lists of different lengths.
            "axes.prop_cycle": cycler(color=self.colours, linestyle=_DASHES, marker=_MARKERS),
            # Ids in an SVG are random without a salt; a dollar in a name starts no formula.
            **{"svg.hashsalt": "carso", "text.parse_math": False},
        }


LIGHT = Style("#1b1f24", "#ffffff", "#d5dbe1", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"))
DARK = Style("#e8ebee", "#14171a", "#39424a", ("#56b4e9", "#e69f00", "#2fc79a", "#cc79a7", "#f0e442"))


@dataclass(frozen=True)
class Picture:
    """One set of axes.

    Args:
        title: What it shows.
        curves: At least one.
        label: The setting with its unit; in a picture by choice the quantity.
        caption: What it was drawn from.
        scale: `linear`; `doubling` where the setting doubles from point to point, as numbers of samples do;
            or `choice` where it is a name: one row each, values to the right.
        quantity: Label of the values.
        limits: Range of the values; chosen by matplotlib if None.
    """

    title: str
    curves: Sequence[Curve]
    label: str
    caption: str = ""
    scale: str = "linear"
    quantity: str = ""
    limits: tuple[float, float] | None = None

    @property
    def settings(self) -> list[Any]:
        """Settings of all points, each once, in order."""
        found = dict.fromkeys(point.x for curve in self.curves for point in curve.points)
        return list(found) if self.scale == "choice" else sorted(found)

    def draw(self, axes: Axes) -> None:
        """Draw the curves, each with its intervals, on matplotlib axes."""
        from matplotlib.transforms import ScaledTranslation

        flat, settings = self.scale == "choice", self.settings
        for number, curve in enumerate(self.curves):
            places = [settings.index(point.x) if flat else point.x for point in curve.points]
            values = [point.y for point in curve.points]
            intervals = [
                ((place, place), (point.low, point.high))
                for place, point in zip(places, curve.points, strict=True)
                if not isnan(point.low)
            ]
            beside = axes.transData
            if intervals:
                # They would cover each other at one setting, so curves lie a few points (1/72 inch) apart.
                apart = 3.0 / 72.0 * (number - (len(self.curves) - 1) / 2)
                shift = (0.0, -2.0 * apart) if flat else (apart, 0.0)
                beside = axes.transData + ScaledTranslation(*shift, axes.figure.dpi_scale_trans)
            # Choices have no order, so no line joins them.
            looks: dict[str, Any] = {"linestyle": "none"} if flat else {}
            if len(values) > 40:
                looks["marker"] = ""  # markers of many points would merge into a band
            data = (values, places) if flat else (places, values)
            (line,) = axes.plot(*data, label=curve.name, transform=beside, **looks)
            bars = {"linestyle": "-", "linewidth": 1.0, "marker": "|" if flat else "_"}
            # One line per interval: a legend avoids lines, but neither error bars nor gaps in a line.
            for interval in intervals:
                ends = interval[::-1] if flat else interval
                # All three are given, or this would take the next curve's colour, dash and marker.
                axes.plot(*ends, color=line.get_color(), transform=beside, **bars)
            # matplotlib ignores shifted lines when it chooses a range: they might lie outside of it.
            axes.update_datalim([*zip(*data, strict=True)])
            for (place, _), bounds in intervals:
                axes.update_datalim([(end, place) if flat else (place, end) for end in bounds])
        axes.autoscale_view()
        if len(self.curves) > 1:
            axes.legend()
        if flat:
            axes.set_yticks(range(len(settings)), settings)
            # The first choice on top.
            axes.set(xlabel=self.label, xlim=self.limits, ylim=(len(settings) - 0.3, -0.7))
        else:
            axes.set(xlabel=self.label, ylabel=self.quantity, ylim=self.limits)
            self._set_settings_range(axes, settings)

    def _set_settings_range(self, axes: Axes, settings: Sequence[float]) -> None:
        # matplotlib ignores shifted lines when it chooses a range.
        first, last = settings[0], settings[-1]
        if self.scale == "doubling":
            axes.set_xscale("log", base=2)
            axes.set_xticks(settings, [f"{value:g}" for value in settings])
            # A log axis would add ticks of its own between the settings.
            axes.set_xticks([], minor=True)
            margin = (last / first) ** 0.05
            axes.set_xlim(first / margin, last * margin)
        else:
            # A single setting has no extent.
            margin = 0.05 * (last - first) or 0.5
            axes.set_xlim(first - margin, last + margin)
            # There is no half epoch and no half sample.
            if all(isinstance(value, int) for value in settings):
                axes.xaxis.get_major_locator().set_params(integer=True)


def render(
    pictures: Sequence[Picture], kind: str = "png", style: Style = LIGHT, *, titles: bool = True
) -> bytes:
    """Draw pictures on one canvas, two beside each other.

    Args:
        pictures: At least one.
        kind: `png`, `svg` or `pdf`.
        style: Colours.
        titles: Whether to write their titles above them.

    Returns:
        The content of a file; the same pictures always give the same bytes.
    """
    # Without pyplot: no global state, and no window system is needed.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(len(pictures), 2)
    lines = -(-len(pictures) // columns)
    rows = max(len(picture.settings) if picture.scale == "choice" else 0 for picture in pictures)
    size = (_WIDTH * columns, max(_HEIGHT, 0.3 * rows + 1.0) * lines)
    with rc_context(style.parameters()):
        figure = Figure(figsize=size, dpi=_PIXELS_PER_INCH, layout="constrained")
        # Half columns, so that a last picture without a neighbour stands in the middle.
        grid = figure.add_gridspec(lines, 2 * columns)
        for number, picture in enumerate(pictures):
            alone = columns == 2 and number == len(pictures) - 1 and number % 2 == 0
            first = 1 if alone else 2 * (number % columns)
            axes = figure.add_subplot(grid[number // columns, first : first + 2])
            picture.draw(axes)
            if titles:
                axes.set_title(picture.title)
        return figure_bytes(figure, kind)


def figure_bytes(figure: Any, kind: str) -> bytes:  # noqa: ANN401  (matplotlib's own type)
    """Return a matplotlib figure as the content of a file: `png`, `svg` or `pdf`."""
    buffer = BytesIO()
    # The date that matplotlib writes would make the same picture differ every time.
    figure.savefig(buffer, format=kind, metadata=_UNDATED[kind])
    return buffer.getvalue()
