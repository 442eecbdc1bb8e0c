"""Records as an evaluation writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from carso_cli.runs.records import Record

STORED: dict[str, Any] = {
    **{"job": "defence/pgd", "block": 0, "index": 0, "label": 1, "target": "defence", "attack": "pgd"},
    **{"part": "pgd", "view": "exact", "aggregation": "logit-mean", "n_samples": 8, "eps": 0.1},
    **{"norm": "linf", "seed": 0, "draws": 20, "correct": 13, "correct_selection": 12},
    **{"majority_correct": True, "margin": 0.25, "clean_margin": 1.5, "loss": 0.75, "distance": 0.1},
    **{"disagreements": 0, "certain": False, "settled": False, "settled_by": None},
}
"""The fields of a line of `records.jsonl`."""


@pytest.fixture(scope="session")
def record() -> Callable[..., Record]:
    """A record of an image, with some fields changed."""

    def make(index: int, **changes: Any) -> Record:
        return replace(Record.from_dict(STORED), index=index, **changes)

    return make
