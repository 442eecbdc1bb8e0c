"""Command lines of every kind: the right exit code and a message, never a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carso_cli.cli.app import COMMANDS
from tests.hostile.conftest import Call

WORDS = """-1 0 1e999 nan 8/0 é ../../../etc/passwd /dev/null -- = training.epochs training.epochs=
    training.epochs=[ training.epochs=1.5 x.y.z=1 seed=-1 data.root=/nowhere os:system [red] cuda:99 clasifier
    1,2,x file.yaml folder"""
JUNK = st.sampled_from(["", "\x00", "\udcff", "a" * 5000, *WORDS.split()]) | st.text(max_size=12)
OPTIONS = (
    *("--run", "--set", "--seed", "--device", "--limit", "--json", "--dry-run", "--resume", "--strict"),
    *("--attack", "--target", "--view", "--norm", "--eps", "--n-samples", "--aggregation", "--force"),
    *("--kind", "--layers", "--list", "--split", "--out", "--first", "--second", "--all", "--aggregations"),
    *("--adversarial-fraction", "--table", "--format", "--html", "--pictures", "--save", "--resize"),
    *("--recipe", "--resolved", "-h", "--version", "--atack", "-x"),
)
# These would do real work with what they are given here.
WORKING = {"quickstart", "bench"}


@pytest.fixture(scope="module", autouse=True)
def _in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before, folder = Path.cwd(), tmp_path_factory.mktemp("commands")
    (folder / "file.yaml").write_text("name: 1\n")
    (folder / "folder").mkdir()
    os.chdir(folder)
    yield
    os.chdir(before)


@given(
    command=st.sampled_from([name for name, _, _ in COMMANDS if name not in WORKING]),
    # Its weights and images are in no fresh home, so no command gets to work with it.
    recipe=st.sampled_from(["cifar10", "file.yaml", "folder", "no-such-recipe"]),
    options=st.lists(st.tuples(st.sampled_from(OPTIONS), st.none() | JUNK), max_size=4),
)
def test_options_in_any_order_with_any_value(
    carso: Call, command: str, recipe: str, options: list[tuple[str, str | None]]
) -> None:
    words = [word for option, value in options for word in (option, value) if word is not None]
    first = ["ls"] if command == "recipes" else [recipe]
    code, said = carso([command, *first, *words])
    assert code in (0, 1, 2, 3, 5)
    # The doctor's finding that something is missing is no error of its own.
    assert not code or "error: " in said or command == "doctor", said
    # 1 is for what the system refuses: a folder that cannot be made.
    assert code != 1 or "cannot write" in said, said


@given(words=st.lists(JUNK | st.sampled_from(OPTIONS), max_size=4))
def test_words_that_are_no_command(carso: Call, words: list[str]) -> None:
    first = next((word for word in words if not word.startswith("-")), None)
    if first in {name for name, _, _ in COMMANDS}:
        return
    code, said = carso(words)
    asked = {"-h", "--help", "--version"} & set(words)
    assert (code == 2 and ("error: " in said or not words)) or (asked and code == 0), said


@pytest.mark.parametrize("command", sorted(WORKING))
def test_working_commands_refuse_what_they_do_not_know(carso: Call, command: str) -> None:
    assert carso([command, "--atack", "x"])[0] == 2
    assert carso([command, "--help"])[0] == 0
