"""Points with intervals: what a picture of accuracies is drawn from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A value with its interval; the interval is None where nothing is known of it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """A named series of points, in the order in which they are joined."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Bar:
    """A named accuracy in [0, 1] with its interval."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
