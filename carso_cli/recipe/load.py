"""Reads recipes: YAML and `--set` in, a checked `Recipe` out. The one module that knows YAML.

A smaller YAML than PyYAML's: no tags, no merge keys, no dates, no `yes`/`no`, no base-60 or octal
numbers; `null`, `true`, `false` and decimal numbers are read as such, all else is text. A file may hold
at most 1 MB and expand, aliases included, to 10,000 values nested 20 deep.

A recipe with `extends: NAME` says only where it differs from the shipped recipe of that name; a run stores
the whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from carso_cli.errors import RecipeError
from carso_cli.io.files import read_limited
from carso_cli.recipe.checksum_line import verify_checksum_line
from carso_cli.recipe.document import Document, Key, Problem
from carso_cli.recipe.explain import HINT, explain, show
from carso_cli.recipe.schedule import scale_epochs
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.shipped import find_recipe, recipes_folder

DEFAULT_RECIPE = "digits"
MAX_BYTES = 1_000_000
MAX_VALUES = 10_000
MAX_DEPTH = 20

_OWN = ("name", "description", "reproduces")
"""What says which recipe this is: no other takes it over."""
_OF_A_RUN = "recipe.yaml"

_CORE = "tag:yaml.org,2002:"


class _TooLargeError(Exception):
    """A document that expands or nests beyond the limits."""


class _Loader(yaml.SafeLoader):
    """Composes nodes within the limits; values are built from them by `_Builder`."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute, replaced whole)
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
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?", list("-+.0123456789")),
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
        self.document.lines.setdefault(key, node.start_mark.line + 1)
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
            if name in values:
                first = self.document.lines[(*key, name)]
                self._problem((*key, name), f"this key is given twice, first on line {first}; keep one", line)
                continue
            self.document.lines[(*key, name)] = line
            values[name] = self.build(value_node, (*key, name))
        return values

    def _scalar(self, node: yaml.Node, key: Key) -> str | int | float | bool | None:
        kind = node.tag.removeprefix(_CORE)
        text = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
        if isinstance(node, yaml.ScalarNode):
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
                    pass
        self._problem(
            key,
            f"the tag {node.tag.replace(_CORE, '!!')} is not allowed; write the plain value",
            node.start_mark.line + 1,
        )
        return text

    def _problem(self, key: Key, text: str, line: int) -> None:
        self.document.problems.append(Problem(key, text, line))


def _read_yaml(text: str, document: Document) -> Any:  # noqa: ANN401
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _Builder(document).build(node)
    except (_TooLargeError, RecursionError):
        raise RecipeError(
            f"{document.source} expands to more than {MAX_VALUES:,} values or nests deeper than {MAX_DEPTH}"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reasons = "; ".join(part for part in (error.problem, error.context) if part)
        raise RecipeError(f"{document.source}{place}: this is not YAML: {reasons}") from None
    except yaml.reader.ReaderError as error:
        raise RecipeError(
            f"{document.source}: not a text file: character {error.position} cannot stand in YAML"
        ) from None


def _apply_override(document: Document, text: str) -> None:
    """Apply `section.key=value`, with the value read as YAML."""
    dotted, equals, value = text.partition("=")
    path = dotted.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(
            f"--set {text}: an override is written section.key=value, such as training.epochs=3",
            hint=f"`carso recipes show {DEFAULT_RECIPE}` shows the sections and keys",
        )
    scratch = Document(source=f"--set {text}")
    parsed = _read_yaml(value, scratch)
    document.problems += [Problem(tuple(path), problem.text) for problem in scratch.problems]
    document.override(path, parsed, text)


def _extend(document: Document, extending: tuple[str, ...] = ()) -> None:
    """Fill in what a recipe leaves out from the shipped one that it names in `extends`, if it names one.

    Raises:
        RecipeError: If there is no such recipe, or it extends itself.
    """
    if "extends" not in document.data:
        return
    reference = document.data.pop("extends")
    where = f"{document.source}, {document.place(('extends',))}, extends"
    if not isinstance(reference, str) or reference in extending:
        reason = (
            "give the name of a shipped recipe" if not extending else "recipes extend each other in a circle"
        )
        raise RecipeError(f"{where}: {show(reference)} is not allowed; {reason}", hint=HINT)
    try:
        path = find_recipe(reference)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from None
    base = Document(source=f"recipe '{reference}'")
    base.data = _read_yaml(_read_file(path), base)
    _extend(base, (*extending, reference))
    document.extend({key: value for key, value in base.data.items() if key not in _OWN})


def load_recipe_text(text: str, *, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as YAML text.

    Args:
        text: The YAML.
        source: Name to show in messages.
        overrides: `section.key=value` each; a number of epochs alone scales the schedules with it.

    Raises:
        RecipeError: With every problem found: place, dotted key, value, what is allowed, nearest known name.
    """
    document = Document(source=source)
    data = _read_yaml(text, document)
    if not isinstance(data, dict):
        found = "nothing" if data is None else "a list" if isinstance(data, list) else "a single value"
        raise RecipeError(
            f"{source}: a recipe is sections of keys and values, and this file holds {found}",
            hint=f"`carso recipes show {DEFAULT_RECIPE}` shows a complete recipe",
        )
    document.data = data
    _extend(document)
    for override in overrides:
        _apply_override(document, override)
    scale_epochs(document)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise explain(document, error.errors(include_url=False)) from None
    if document.problems:
        raise explain(document, [])
    return recipe


def _read_file(path: Path) -> str:
    if os.path.isfile(path / _OF_A_RUN):
        raise RecipeError(
            f"{path} is a run, not a recipe",
            hint=f"where a trained run is used, it is given with --run {path}",
        )
    try:
        raw = read_limited(path, MAX_BYTES)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text in UTF-8: byte {error.start} cannot be read") from None
    verify_checksum_line(text, str(path))
    return text


def locate_recipe(reference: str | None) -> Path:
    """Return the file behind a reference: a path, or the bare name of a shipped recipe (`digits` for None).

    A bare name means the shipped recipe even where a file or folder of that name lies in the working folder;
    write `./name` for those.

    Raises:
        RecipeError: If there is neither; the message names the nearest.
    """
    name = DEFAULT_RECIPE if reference is None else reference
    # These know of names that no file can have, at which those of `Path` raise.
    path = Path(os.path.expanduser(name))
    if name.endswith((".yaml", ".yml")) or name.startswith((".", "/", "~")):
        return path if os.path.exists(path) or path.is_absolute() or "/" in name else find_recipe(name)
    try:
        return find_recipe(name)
    except RecipeError:
        if os.path.isfile(path) or os.path.isfile(path / _OF_A_RUN):
            return path
        raise


def load_recipe(reference: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        reference: Path, or bare name of a shipped recipe; None means `digits`.
        overrides: `section.key=value` each, the value read as YAML (`training.epochs=3`, `data.root=../x`,
            `representation.layers=[a, b]`).

    Raises:
        RecipeError: If it cannot be found, read or carried out; all problems at once.
    """
    path = locate_recipe(reference)
    recipe = load_recipe_text(_read_file(path), source=str(path), overrides=overrides)
    return recipe if recipes_folder() in path.parents else recipe.read_from(path)


def read_recipe_file(reference: str | None) -> str:
    """Return the text of a recipe's file as it was written, comments included.

    Raises:
        RecipeError: If it cannot be found or read.
    """
    return _read_file(locate_recipe(reference))


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML with every default written out; it loads back equal."""
    # Escaped, since PyYAML writes some unescaped line separators that it reads back as spaces.
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=False, width=100)
