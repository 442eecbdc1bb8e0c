"""Recipes that are wrong in every way: a message that names file and key, soon, or a recipe that holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from carso_cli.errors import RecipeError
from carso_cli.recipe.load import dump_recipe, load_recipe_text, read_recipe_file
from carso_cli.recipe.schema import Recipe
from tests.hostile.conftest import Call

TEXT = read_recipe_file("digits")
VALUES: dict[str, Any] = yaml.safe_load(TEXT)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [] if not path else [path]
    return found + [place for key, item in items for place in places(item, (*path, key))]


PLACES = places(VALUES)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["8/0", "1e400", "-0", "os:system", "../../..", "!!python/name:os.system", "<script>", "0x10"]
    ),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def changed(path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> str:
    values = copy.deepcopy(VALUES)
    holder = values
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return yaml.safe_dump(values, sort_keys=False)


def load(text: str) -> Recipe | RecipeError:
    try:
        return load_recipe_text(text, source="mine.yaml")
    except RecipeError as error:
        return error


@given(path=st.sampled_from(PLACES), junk=JUNK)
def test_a_wrong_value_is_named_or_is_a_value(path: tuple[Any, ...], junk: Any) -> None:
    def put(holder: Any, key: Any) -> None:
        holder[key] = junk

    found = load(changed(path, put))
    if isinstance(found, Recipe):
        assert load_recipe_text(dump_recipe(found)) == found
    else:
        assert "mine.yaml" in found.message
        # Some rules join several keys, and name the section that holds them all.
        assert any(str(key) in found.message for key in path if isinstance(key, str)), found.message


@given(path=st.sampled_from(PLACES), typo=st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_a_wrong_or_missing_key_is_named(path: tuple[Any, ...], typo: str) -> None:
    def rename(holder: Any, key: Any) -> None:
        if isinstance(holder, dict):
            holder[typo] = holder.pop(key)
        else:
            holder.append(typo)

    found = load(changed(path, rename))
    if isinstance(found, RecipeError):
        assert "mine.yaml" in found.message
        assert typo in found.message or str(path[-1]) in found.message or str(path[0]) in found.message


@given(
    place=st.integers(0, len(TEXT.encode())),
    length=st.integers(0, 40),
    piece=st.binary(max_size=30)
    | st.sampled_from([b"\x00", b"&a *a", b"\t", b"- ", b"%YAML 9.9\n", b"!!", b"---\n"]),
)
def test_any_bytes_are_a_recipe_or_are_refused(
    carso: Call, tmp_path_factory: pytest.TempPathFactory, place: int, length: int, piece: bytes
) -> None:
    content = TEXT.encode()
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content[:place] + piece + content[place + length :])
    code, said = carso(["recipes", "validate", str(path)])
    assert code in (0, 2)
    assert code == 0 or "any.yaml" in said


def assert_refused(carso: Call, path: Path) -> None:
    code, said = carso(["recipes", "validate", str(path)])
    assert code == 2
    assert path.name in said


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "content",
    [
        bomb(12).encode(),
        b"[" * 100_000,
        b"{a: " * 50_000,
        b"- " * 200_000,
        b"a: &x [*x]",
        b"name: " + b"x" * 10_000_000,
        b"# nothing\n" * 1_000_000,
        b"\x00" * 10_000_000,
        bytes(range(256)) * 1000,
        TEXT.encode("utf-16"),
        TEXT.encode("utf-32"),
        "name: café".encode("latin-1"),
        b"",
        b"\xef\xbb\xbf",
        b"a: " + b"9" * 900_000,
        b"? " * 100_000,
        b"x: !!python/object/apply:os.system ['echo planted']",
        b"x: !!binary " + b"A" * 900_000,
        b"<<: {a: 1}\n",
        b"%TAG ! tag:yaml.org,2002:python/\n---\nx: !name:os.system",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_bombs_and_other_encodings_are_refused_soon(carso: Call, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_bytes(content)
    assert_refused(carso, path)


@pytest.mark.parametrize("kind", ["folder", "device"])
def test_what_is_no_file_is_refused(carso: Call, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.yaml"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert_refused(carso, path)
