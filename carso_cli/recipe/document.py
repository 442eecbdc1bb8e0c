"""A recipe as it was written: YAML in; plain values out, and for every value the place it was written at.

A smaller YAML than PyYAML's: no tags, no merge keys, no dates, no `yes`/`no`, no base-60 or octal
numbers; `null`, `true`, `false` and decimal numbers are read as such, all else is text. A file may hold
at most 1 MB and expand, aliases included, to 10,000 values nested 20 deep.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from carso_cli.errors import RecipeError

MAX_VALUES = 10_000
MAX_DEPTH = 20
Key = tuple[str | int, ...]
"""Path to a value: keys of mappings and positions in lists."""
_CORE = "tag:yaml.org,2002:"


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
    data: Any = None
    lines: dict[Key, int] = field(default_factory=dict)
    overrides: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def read(cls, text: str, source: str) -> Document:
        """Read YAML.

        Raises:
            RecipeError: If it is not YAML, or beyond the limits.
        """
        document = cls(source)
        try:
            node = _Loader(text).get_single_node()
            document.data = None if node is None else _Builder(document).build(node)
        except (_TooLargeError, RecursionError):
            raise RecipeError(
                f"{source} expands to more than {MAX_VALUES:,} values or nests deeper than {MAX_DEPTH}"
            ) from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            reasons = "; ".join(part for part in (error.problem, error.context) if part)
            raise RecipeError(f"{source}{place}: this is not YAML: {reasons}") from None
        except yaml.reader.ReaderError as error:
            raise RecipeError(
                f"{source}: not a text file: character {error.position} is not allowed in YAML"
            ) from None
        return document

    def origin(self, key: Key) -> tuple[int, str]:
        """Return where a value was written, as a number to sort by and in words: a line, or a `--set`."""
        # What is wrong with a section as a whole is most likely wrong since a `--set` changed a key in it.
        for changed, override in self.overrides.items():
            if override and key and changed[: len(key)] == key:
                return 1 << 30, f"--set {override}"  # after all lines
        # A missing key has no place of its own: it is that of the section around it.
        for length in range(len(key), 0, -1):
            if text := self.overrides.get(key[:length]):
                return 1 << 30, f"--set {text}"
            if line := self.lines.get(key[:length]):
                return line, f"line {line}"
        return 0, ""

    def override(self, path: Sequence[str], value: object, text: str) -> None:
        """Set one value as `--set` asks, or without text; sections that are absent or null are created."""
        # First, so that a problem met below is placed at this `--set`; a section's values stand there too.
        key = tuple(path)
        self.overrides[key] = text
        self.lines = {one: line for one, line in self.lines.items() if one[: len(key)] != key or one == key}
        section: dict[str, Any] = self.data
        for depth, part in enumerate(path[:-1], start=1):
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                holder = ".".join(path[:depth])
                words = f"'{holder}' is a value, not a section with keys of its own"
                self.problems.append(Problem(tuple(path), words))
                return
        section[path[-1]] = value


class _TooLargeError(Exception):
    """A document that expands or nests beyond the limits."""


class _Loader(yaml.SafeLoader):
    """Composes nodes within the limits; `_Builder` makes values of them."""

    # Emptied, and filled below: SafeLoader's own take `yes` for true and 1:30 for 90.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute, replaced whole)
    # Counted while composing, since a deep document would overflow the stack before any value is built.
    nodes = 0
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        self.nodes += 1
        self.depth += 1
        if self.nodes > MAX_VALUES or self.depth > MAX_DEPTH:
            raise _TooLargeError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,30})", list("-+0123456789")),
    # `1e-3` is none of these, by YAML 1.1; it stays text, which `parse_number` reads.
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?", list("-+.0123456789")),
    # Known only to be refused: as text, `<<` would be a key like any other.
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_CORE + _name, re.compile(rf"^(?:{_pattern})$"), _first)


class _Builder:
    """Turns nodes into plain values, keeping the line of each and every problem met."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = 0

    def build(self, node: yaml.Node, key: Key = ()) -> Any:  # noqa: ANN401
        """Return the value of a node and of all below it.

        Raises:
            _TooLargeError: If they are more, or deeper, than the limits allow.
        """
        self.values += 1
        # Aliases share nodes, so what they expand to is only known here.
        if self.values > MAX_VALUES or len(key) > MAX_DEPTH:
            raise _TooLargeError
        # Where its key stands, if it has one: the value may begin lines below.
        self.document.lines.setdefault(key, node.start_mark.line + 1)
        # Under a tag of its own, such as `!!set`, it goes on to `_scalar`, which refuses the tag.
        if isinstance(node, yaml.MappingNode) and node.tag == _CORE + "map":
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == _CORE + "seq":
            return [self.build(item, (*key, position)) for position, item in enumerate(node.value)]
        return self._scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode) or name_node.tag == _CORE + "merge":
                self._problem(key, "only plain keys are allowed, no merge keys (<<), lists or sections", line)
                continue
            name = str(name_node.value)
            # PyYAML would keep the last of them without a word.
            if name in values:
                first = self.document.lines[(*key, name)]
                self._problem((*key, name), f"this key is given twice, first on line {first}; keep one", line)
                continue
            self.document.lines[(*key, name)] = line
            values[name] = self.build(value_node, (*key, name))
        return values

    def _scalar(self, node: yaml.Node, key: Key) -> str | int | float | bool | None:
        kind, text = node.tag.removeprefix(_CORE), ""
        if isinstance(node, yaml.ScalarNode):
            text = str(node.value)
            if kind in ("str", "merge"):
                return text
            if kind == "null":
                return None
            if kind == "bool" and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if kind in ("int", "float"):
                try:
                    return int(text) if kind == "int" else float(text)
                except ValueError:
                    pass  # an explicit tag, such as `!!int ten`
        tag = node.tag.replace(_CORE, "!!")
        self._problem(key, f"the tag {tag} is not allowed; write the plain value", node.start_mark.line + 1)
        return text

    def _problem(self, key: Key, text: str, line: int) -> None:
        self.document.problems.append(Problem(key, text, line))
