"""What must hold between the images found and the images a recipe states."""

from __future__ import annotations

from collections.abc import Sequence

from carso_cli.errors import DataError


def check_class_count(found: Sequence[str], expected: int, *, where: str) -> None:
    """Check that a split holds as many classes as stated.

    Raises:
        DataError: If it does not.
    """
    if len(found) != expected:
        raise DataError(
            f"{where} holds {len(found)} classes ({name_some(found)}); {expected} are stated",
            hint=f"set data.classes={len(found)}, or put the folders in order",
        )


def check_same_classes(
    train: Sequence[str],
    test: Sequence[str],
    *,
    train_source: str = "the training split",
    test_source: str = "the test split",
) -> None:
    """Check that both splits hold the same classes in the same order.

    Args:
        train: Class names of the training split, in label order.
        test: Class names of the test split, in label order.
        train_source: Where the training split lies, for the message.
        test_source: Where the test split lies, for the message.

    Raises:
        DataError: Naming the classes that either split lacks.
    """
    if tuple(train) == tuple(test):
        return
    lacks = [
        f"{source} lacks {name_some(missing)}"
        for source, missing in (
            (test_source, [name for name in train if name not in set(test)]),
            (train_source, [name for name in test if name not in set(train)]),
        )
        if missing
    ]
    raise DataError(
        "the splits hold different classes: " + ("; ".join(lacks) or "the same names in another order"),
        hint="every class needs images in both splits: add what is missing or remove it from the other split",
    )


def name_some(names: Sequence[str], limit: int = 5) -> str:
    """List a few names for a message, with a count of the rest."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "none"
