from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from carso_cli.runs.intervals import wilson
from carso_cli.runs.records import Record
from carso_cli.runs.summary import attack_row, headline, job_health, worst_case

Made = Callable[..., Record]


@pytest.fixture
def made(record: Callable[..., Record]) -> Made:
    def make(job: str, index: int, selection: int, report: int, margin: float | None = 0.0) -> Record:
        counts = {"correct_selection": selection, "correct": report, "majority_correct": report > 10}
        return record(index, job=job, attack=job, margin=margin, **counts)

    return make


def test_a_row_counts_every_draw(made: Made) -> None:
    row = attack_row([made("a", 0, 20, 20), made("a", 1, 10, 13), made("a", 2, 0, 0), made("a", 3, 9, 10)])
    assert row["accuracy"] == pytest.approx((1 + 0.65 + 0 + 0.5) / 4)
    assert row["ci95"] == pytest.approx(wilson(2.15, 4))
    assert row["worst_of_draws"] == 0.25
    assert row["majority"] == 0.5
    assert (row["n_images"], row["attacked"], row["draws"]) == (4, 4, 20)


def test_the_worst_attack_is_chosen_on_one_set_and_counted_on_the_other(made: Made) -> None:
    # `b` is worse on the selection draws, `a` on the report draws: b's report stands.
    records = [made("a", 0, 12, 3), made("b", 0, 10, 14)]
    assert [record.job for record in worst_case(records)] == ["b"]
    found = headline(records, "adaptive")
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["picked"] == {"b": 1}


def test_ties_go_to_the_lower_margin(made: Made) -> None:
    records = [made("a", 0, 0, 2, -1.0), made("b", 0, 0, 1, -3.0), made("c", 0, 0, 0, None)]
    assert worst_case(records)[0].job == "b"


def test_choosing_among_equal_attacks_does_not_flatter_the_attacker(made: Made) -> None:
    # Twelve attacks that are equally strong: the truth is 0.5 whatever is chosen.
    source = random.Random(0)

    def tosses() -> int:
        return sum(source.random() < 0.5 for _ in range(20))

    records = [
        made(f"a{k}", image, tosses(), tosses(), source.random()) for image in range(400) for k in range(12)
    ]
    assert headline(records, "adaptive")["accuracy"] == pytest.approx(0.5, abs=0.02)
    naive = sum(min(r.correct for r in records if r.index == image) for image in range(400)) / 8000
    assert naive < 0.4


def test_health_is_weighted_by_the_number_of_gradients() -> None:
    def step(gradients: int, nan: float, loss: float | None) -> dict[str, float | None]:
        return {
            "gradients": gradients,
            "nan": nan,
            "inf": 0.0,
            "zero": 0.0,
            "unusable": nan,
            "saturated": None,
            "loss": loss,
        }

    lines = [
        {"job": "a", "seconds": 1.0, "steps": [step(30, 0.0, 1.0), step(30, 0.5, None)], "messages": ["x"]},
        {"job": "a", "seconds": 2.0, "steps": [step(10, 1.0, 3.0)], "messages": ["x"]},
        {"job": "b", "seconds": 9.0, "steps": [step(99, 1.0, 9.0)], "messages": []},
    ]
    found = job_health(lines, "a")
    assert found["gradients"] == 70
    assert found["nan"] == pytest.approx((15 + 10) / 70)
    assert found["steps"][0]["loss"] == pytest.approx((30 * 1 + 10 * 3) / 40)
    assert found["steps"][1]["loss"] is None
    assert found["saturated"] is None
    assert (found["seconds"], found["messages"]) == (3.0, ["x"])
