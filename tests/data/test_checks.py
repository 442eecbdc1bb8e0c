"""Checks between what was found and what was stated."""

from __future__ import annotations

import pytest

from carso_cli.data.checks import check_class_count, check_same_classes, name_some
from carso_cli.errors import DataError


def test_a_wrong_number_of_classes_names_place_and_both_numbers() -> None:
    check_class_count(("a", "b"), 2, where="images/test")
    with pytest.raises(DataError, match=r"images/test holds 2 classes \('a', 'b'\); 10 are stated") as caught:
        check_class_count(("a", "b"), 10, where="images/test")
    assert caught.value.hint.startswith("set data.classes=2")


def test_classes_missing_from_either_split_are_named() -> None:
    check_same_classes(("a", "b"), ("a", "b"))
    with pytest.raises(DataError, match=r"test/ lacks 'cat'; train/ lacks 'dog', 'eel'$"):
        check_same_classes(("ape", "cat"), ("ape", "dog", "eel"), train_source="train/", test_source="test/")
    with pytest.raises(DataError, match=r"the test split lacks 'cat'$"):
        check_same_classes(("ape", "cat"), ("ape",))
    with pytest.raises(DataError, match="the same names in another order"):
        check_same_classes(("a", "b"), ("b", "a"))


def test_long_lists_are_cut() -> None:
    assert name_some([]) == "none"
    assert name_some(list("abc"), limit=2) == "'a', 'b' and 1 more"
