"""The first line of a recipe that a run has stored: a checksum of the others."""

from __future__ import annotations

import hashlib

from carso_cli.errors import RecipeError

_FIRST = "# written by a run; sha256 of the lines below: "


def add_checksum_line(text: str) -> str:
    """Return a recipe's text with a first line that holds its checksum."""
    return f"{_FIRST}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def verify_checksum_line(text: str, source: str) -> None:
    """Hold a recipe's text against the checksum in its first line, if it has one.

    Raises:
        RecipeError: If the text has changed since a run wrote it.
    """
    first, _, rest = text.partition("\n")
    if first.startswith(_FIRST) and add_checksum_line(rest) != text:
        raise RecipeError(
            f"{source} has changed since its run wrote it: it does not match the checksum in its first line",
            hint="--resume of its training writes it anew; to use it as a recipe of your own, copy it "
            "elsewhere without its first line",
        )
