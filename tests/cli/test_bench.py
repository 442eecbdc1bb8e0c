from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FORWARD = ["bench", "--case", "classifier-forward", "--batch-size", "8", "--device", "cpu"]


@pytest.mark.slow
def test_shows_a_table_and_a_comparison(tmp_path: Path, carso: Any) -> None:
    result = carso(*FORWARD, "--json").json
    assert [case["name"] for case in result["cases"]] == ["classifier-forward"]
    stored = tmp_path / "old.json"
    result["cases"][0]["images_per_second"] = 1e-3
    stored.write_text(json.dumps(result))
    shown = carso(*FORWARD, "--compare", stored)
    for words in ("digits on cpu", "now over then", "speed-up"):
        assert words in shown.out
    assert max(map(len, shown.lines)) <= 80
    # Beside a comparison JSON stays alone on stdout.
    shown = carso(*FORWARD, "--json", "--compare", stored)
    assert shown.json["recipe"] == "digits"
    assert "now over then" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--case", "atack"], "there is no case 'atack'", 2),
        (["--batch-size", "7"], "'7' is not allowed; use a whole number from 8", 2),
        (["--compare", "absent.json"], "there is no file absent.json", 3),
        (["--set", "classifier.depth=15"], "15", 2),
        (["digits-adversarial", "--case", "training-step"], "timed on the paper's objective", 2),
    ],
)
def test_says_what_is_wrong(carso: Any, arguments: list[str], message: str, code: int) -> None:
    assert message in carso("bench", *arguments, code=code).err
