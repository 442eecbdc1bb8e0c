"""The reporter: lines in a log, bars on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from carso_cli.cli.progress import SECONDS_BETWEEN_LINES, RichReporter
from carso_cli.runtime.reporter import Reporter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def logged() -> tuple[io.StringIO, Clock, RichReporter]:
    stream, clock = io.StringIO(), Clock()
    return stream, clock, RichReporter(Console(file=stream, width=40), clock=clock)


def test_it_is_a_reporter() -> None:
    reporter: Reporter = RichReporter()
    assert reporter is not None


def test_a_log_gets_a_line_every_few_seconds() -> None:
    stream, clock, reporter = logged()
    with reporter.progress("training", total=100) as task:
        for _ in range(10):
            clock.now += 2.0
            task.advance(10, loss=123.44, learning_rate=0.001)
    lines = stream.getvalue().splitlines()
    assert SECONDS_BETWEEN_LINES == 5.0
    assert lines == [
        "training: 30/100 images, 5 images/s, 14 s left, loss 123.4, learning rate 0.001",
        "training: 60/100 images, 5 images/s, 8 s left, loss 123.4, learning rate 0.001",
        "training: 90/100 images, 5 images/s, 2 s left, loss 123.4, learning rate 0.001",
        "training: 100/100 images, 5 images/s, took 20 s, loss 123.4, learning rate 0.001",
    ]


def test_a_terminal_gets_lines_that_are_wrapped_between_words_and_a_log_whole_ones() -> None:
    text = "the purifiers were trained on different numbers of images"
    stream, _, reporter = logged()
    reporter.warning(text)
    assert stream.getvalue() == f"warning: {text}\n"
    terminal = io.StringIO()
    RichReporter(Console(file=terminal, width=40, force_terminal=True, color_system=None)).warning(text)
    assert [line.rstrip() for line in terminal.getvalue().splitlines()] == [
        "warning: the purifiers were trained on",
        "different numbers of images",
    ]


def test_slow_work_is_told_in_seconds_each() -> None:
    stream, clock, reporter = logged()
    with reporter.progress("epochs", total=3, unit="epochs") as task:
        clock.now += 90.0
        task.advance()
    assert stream.getvalue().splitlines()[0] == "epochs: 1/3 epochs, 90 s each, 3 min 00 s left"


def test_nothing_done_yet_is_no_division_by_zero() -> None:
    stream, clock, reporter = logged()
    with reporter.progress("empty", total=0) as task:
        clock.now += 9.0
        task.advance(0)
    assert stream.getvalue().splitlines() == ["empty: 0/0 images", "empty: 0/0 images, took 9 s"]


def test_words_are_not_wrapped_or_read_as_markup() -> None:
    stream, _, reporter = logged()
    reporter.info("layers [a, b] " + "x" * 60)
    reporter.warning("[bold]masked")
    assert stream.getvalue().splitlines() == ["layers [a, b] " + "x" * 60, "warning: [bold]masked"]


def test_bars_nest_and_words_pass_between_them() -> None:
    stream = io.StringIO()
    reporter = RichReporter(Console(file=stream, force_terminal=True, width=120))
    with reporter.progress("epochs [all]", total=2, unit="epochs") as epochs:
        for _ in range(2):
            with reporter.progress("batches", total=3) as batches:
                for _ in range(3):
                    batches.advance(loss=123.44)
            reporter.info("between")
            epochs.advance()
    with reporter.progress("again", total=1) as again:
        again.advance()
    shown = stream.getvalue()
    assert "epochs [all]" in shown
    assert "2/2" in shown
    assert shown.count("between") == 2
    assert "again" in shown


def test_an_error_inside_ends_the_display() -> None:
    reporter = RichReporter(Console(file=io.StringIO(), force_terminal=True, width=80))
    for _ in range(2):
        try:
            with reporter.progress("work", total=2):
                raise KeyError("stop")
        except KeyError:
            continue
    assert reporter._bars is None
