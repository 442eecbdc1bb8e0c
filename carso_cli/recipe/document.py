"""A recipe as it was written: plain data, and for every value the place it was written at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str | int, ...]
"""Path to a value: keys of mappings and positions in lists."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe."""

    key: Key
    text: str
    """What is wrong and what is allowed, without the place."""
    line: int | None = None
    """Line in the file, from 1, where it differs from the line of `key`."""


@dataclass
class Document:
    """Values of a recipe before they are checked.

    Attributes:
        source: File name to show in messages.
        data: Plain values: text, numbers, true and false, null, lists, sections.
        lines: Line of every value in the file, from 1.
        overrides: The `--set` text that a value came from, by key.
        problems: What reading has found so far.
    """

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Key, int] = field(default_factory=dict)
    overrides: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def extend(self, base: dict[str, Any]) -> None:
        """Take what this document leaves out from another's values: sections are joined, lists are not."""
        self.data = _joined(base, self.data)

    def place(self, key: Key) -> str:
        """Return where a value was written: a `--set`, a line, or nothing for one that is absent."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.overrides:
                return f"--set {self.overrides[key[:length]]}"
            if key[:length] in self.lines:
                return f"line {self.lines[key[:length]]}"
        return ""

    def line(self, key: Key) -> int:
        """Return a value's line for sorting: overrides come last."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.overrides:
                return 1 << 30
            if key[:length] in self.lines:
                return self.lines[key[:length]]
        return 0

    def override(self, path: Sequence[str], value: object, text: str) -> None:
        """Set one value as `--set` asks; sections that are absent or null are created."""
        section: dict[str, Any] = self.data
        for depth, part in enumerate(path[:-1], start=1):
            below = section.setdefault(part, {})
            if below is None:
                below = section[part] = {}
            if not isinstance(below, dict):
                holder = ".".join(path[:depth])
                self.overrides[tuple(path)] = text
                self.problems.append(
                    Problem(tuple(path), f"'{holder}' is a value, not a section with keys of its own")
                )
                return
            section = below
        section[path[-1]] = value
        self.overrides[tuple(path)] = text


def _joined(base: Any, own: Any) -> Any:  # noqa: ANN401
    # Weights are one value: the name of the base's would be no part of the file that takes their place.
    if not isinstance(base, dict) or not isinstance(own, dict) or "source" in own:
        return own
    return base | {name: _joined(base.get(name), value) for name, value in own.items()}
