"""Which evaluations make a curve, and which are not comparable."""

from __future__ import annotations

from typing import Any

from carso_cli.pictures.curves import Point
from carso_cli.reports.plots import caption_of, comparable, eps_curves, sample_curves, training_pictures
from carso_cli.runs.intervals import wilson


def outcomes(attacked: int) -> dict[tuple[str, str, str | None], list[int]]:
    return {
        ("defence", "none", None): [2, 2],
        ("defence", "noise", None): [2, 1],
        ("defence", "pgd", "exact"): [attacked, 0],
    }


def test_accuracy_against_eps_with_the_noise_baseline(write: Any) -> None:
    path = write.run()
    for eps, right in ((0.2, 0), (0.05, 2), (0.1, 1)):
        write.evaluation(path, "pgd", outcomes(right), eps=eps)
    write.evaluation(path, "pgd", outcomes(2), eps=0.3, seed=4)
    attacked, noise = eps_curves(comparable(write.read(path), "eps"))
    assert attacked.name == "defence, attacked (pgd)"
    assert [(point.x, point.y) for point in attacked.points] == [
        (0.0, 1.0),
        (0.05, 0.5),
        (0.1, 0.25),
        (0.2, 0.0),
    ]
    assert attacked.points[1] == Point(0.05, 0.5, *wilson(1.0, 2))
    assert [point.y for point in noise.points] == [1.0, 0.75, 0.75, 0.75]


def test_accuracy_against_samples(write: Any) -> None:
    path = write.run()
    for samples in (8, 1, 2):
        write.evaluation(path, "pgd", outcomes(1), n_samples=samples)
    clean, attacked = sample_curves(comparable(write.read(path), "n_samples"))
    assert [(point.x, point.y) for point in clean.points] == [(1.0, 1.0), (2.0, 1.0), (8.0, 1.0)]
    assert [point.y for point in attacked.points] == [0.25, 0.25, 0.25]


def test_one_point_is_no_curve(write: Any) -> None:
    path = write.run()
    write.evaluation(path, "pgd", outcomes(1))
    write.evaluation(path, "pgd", outcomes(1), eps=0.2, images="others")
    run = write.read(path)
    assert comparable(run, "eps") == comparable(run, "n_samples") == []


def test_the_longest_set_wins_then_the_one_with_most_images(write: Any) -> None:
    path = write.run()
    more = {job: counts * 2 for job, counts in outcomes(1).items()}
    for eps in (0.1, 0.2):
        write.evaluation(path, "pgd", outcomes(1), eps=eps)
        write.evaluation(path, "pgd", more, eps=eps)
    found = comparable(write.read(path), "eps")
    assert [one.identity["n_images"] for one in found] == [4, 4]
    assert caption_of(found).startswith("4 images, seed 3, bars: 95% Wilson intervals. From pgd-")


METRICS: list[dict[str, Any]] = [
    {"epoch": epoch, "loss": 900.0 / (epoch + 1), "bce": 890.0 / (epoch + 1), "kl": 3.0, "beta": 0.1 * epoch}
    | {"learning_rate": 1e-3, "defence_clean_accuracy": 0.5 + 0.04 * epoch}
    for epoch in range(10)
]


def test_training_curves_show_every_quantity_from_epoch_one() -> None:
    pictures = training_pictures(METRICS)
    assert [picture.title.split()[0] for picture in pictures] == [
        *("Loss", "KL", "Weight", "Learning", "Accuracy")
    ]
    for curve, key in zip(pictures[0].curves, ("loss", "bce"), strict=True):
        assert [point[:2] for point in curve.points] == [(row["epoch"] + 1, row[key]) for row in METRICS]


def test_no_epochs_no_pictures_and_no_held_out_images_no_accuracy() -> None:
    assert training_pictures([]) == []
    without = [line | {"defence_clean_accuracy": None} for line in METRICS]
    assert [picture.title for picture in training_pictures(without)][-1] == "Learning rate"
