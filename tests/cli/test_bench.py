from __future__ import annotations

import json
from pathlib import Path

import pytest

from carso_cli.cli.app import run

FORWARD = ["bench", "--case", "classifier-forward", "--batch-size", "8", "--device", "cpu"]


def test_shows_a_table_and_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*FORWARD, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [case["name"] for case in result["cases"]] == ["classifier-forward"]
    stored = tmp_path / "old.json"
    result["cases"][0]["images_per_second"] = 1e-3
    stored.write_text(json.dumps(result))
    assert run([*FORWARD, "--compare", str(stored)]) == 0
    shown = capsys.readouterr()
    assert "digits on cpu" in shown.out
    assert "now over then" in shown.out
    assert "speed-up" in shown.out
    assert max(len(line) for line in shown.out.splitlines()) <= 80


def test_json_stays_alone_on_stdout_beside_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([*FORWARD, "--json"])
    stored = tmp_path / "old.json"
    stored.write_text(capsys.readouterr().out)
    assert run([*FORWARD, "--json", "--compare", str(stored)]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["recipe"] == "digits"
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
def test_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, code: int
) -> None:
    assert run(["bench", *arguments]) == code
    assert message in capsys.readouterr().err
