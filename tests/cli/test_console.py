"""What is shown where: numbers, tables, JSON, errors on a terminal."""

from __future__ import annotations

import io
import json
import math
import re

import pytest
from rich.console import Console

from carso_cli.cli import console
from carso_cli.errors import CarsoError


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (123.44, "123.4"),
        (0.00123456, "0.001235"),
        (12345.6, "12,346"),
        (0, "0"),
        (math.nan, "nan"),
        (None, "–"),
    ],
)
def test_figures(value: float | None, shown: str) -> None:
    assert console.figure(value) == shown


def test_accuracies_carry_their_interval() -> None:
    assert console.accuracy(0.9449, (0.912, 0.968)) == "0.945 [0.91, 0.97]"
    assert console.accuracy(0.5) == "0.500"
    assert console.accuracy(None, (0, 1)) == "–"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (7265, "2 h 01 min")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert console.duration(seconds) == shown


def test_tables_fold_and_never_cut() -> None:
    stream = io.StringIO()
    long = "a-rather-long-name-of-a-thing" * 4
    shown = console.table(
        ("name", "accuracy"), [[long, "0.945 [0.91, 0.97]"], ["[b]", "–"]], numeric=("accuracy",)
    )
    Console(file=stream, width=60).print(shown)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    assert "0.945 [0.91, 0.97]" in stream.getvalue()
    assert "[b]" in stream.getvalue()
    folded = "".join(line[:40].strip() for line in lines[2:])
    assert long in folded.replace(" ", "")


def test_json_is_valid_whatever_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": [math.nan, 1.5, (math.inf, None)], "b": {"é": -math.inf}, 3: True})
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"a": [None, 1.5, [None, None]], "b": {"é": None}, "3": True}
    assert "é" in shown.out
    assert shown.err == ""


def test_errors_are_a_panel_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(
        console, "messages", lambda: Console(file=stream, force_terminal=True, width=60, color_system=None)
    )
    hint = f"resume with: carso train-purifier runs/x/recipe.yaml --run {'x' * 80} --resume"
    console.show_error(CarsoError("bad [thing]", hint=hint))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("╭─ error")
    assert "bad [thing]" in lines[1]
    # Outside the panel and in one line: it can be copied.
    assert lines[-1] == f"hint: {hint}"


def test_prose_wraps_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = "carso recipes show NAME prints one; carso recipes cp NAME copies one for you to change"
    console.print_text(text)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert " ".join(lines) == text


def test_nothing_in_a_text_acts_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    evil = "\x1b]0;x\x07a\x9b31m\x08b\tc\n[bold]d\r"
    for print_one in (
        console.output().print,
        console.print_plain,
        lambda text: console.output().print(console.table((text,), [[text]], title=text, caption=text)),
    ):
        print_one(evil)
        shown = capsys.readouterr().out
        assert "b" in shown
        assert "[bold]d" in shown
        without_styles = re.sub("\x1b\\[[0-9;]*m", "", shown)
        assert not set(without_styles) & set("\x00\x07\x08\r\x1b\x7f\x9b")
    console.show_error(CarsoError(evil, hint=evil))
    assert "\x9b" not in capsys.readouterr().err
    console.print_json({evil: evil})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {evil: evil}
    assert not set(shown) & set("\x1b\x9b")


def test_streams(capsys: pytest.CaptureFixture[str]) -> None:
    console.output().print("result")
    console.messages().print("note")
    assert capsys.readouterr() == ("result\n", "note\n")
