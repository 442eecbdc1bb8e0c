"""The picture of one evaluation."""

from __future__ import annotations

from pathlib import Path

from carso_cli.io.json_files import read_json
from carso_cli.reports.plots import accuracy_plot

STORED = Path(__file__).resolve().parents[1] / "stored_run" / "run" / "evaluation" / "adaptive-df6611b3"


def test_accuracies_stand_with_their_intervals(tmp_path: Path) -> None:
    summary = read_json(STORED / "summary.json")
    plot = accuracy_plot(summary)
    (picture,) = plot.pictures
    classifier, defence = picture.curves
    assert [(point.x, point.y) for point in classifier.points] == [("clean", 1.0), ("aa", 0.75)]
    assert (defence.points[-1].x, defence.points[-1].y) == ("worst case", summary["headline"]["accuracy"])
    rows = [row for row in summary["results"] if row["target"] == "defence"]
    assert [[point.y, point.low, point.high] for point in defence.points[:-1]] == [
        [row["accuracy"], *row["ci95"]] for row in rows
    ]
    assert [path.suffix for path in plot.save(tmp_path)] == [".png", ".svg", ".pdf"]
