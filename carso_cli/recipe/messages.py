"""Error messages of recipes: every problem at once, each with its place and what is allowed.

A problem reads `line 12, training.epochs: 'ten' is not allowed; use an integer from 1`. What is allowed is
read from the JSON schema that pydantic makes of `Recipe`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from carso_cli.errors import RecipeError, nearest
from carso_cli.recipe.document import Document, Key, Problem
from carso_cli.recipe.schema import Recipe

HINT = "`carso recipes show digits --resolved` shows a complete recipe with every key"
Schema = Mapping[str, Any]


def explain(document: Document, errors: Sequence[ErrorDetails]) -> RecipeError:
    """Turn what reading and pydantic found into one error.

    Args:
        document: The recipe as written, with the problems met while reading it.
        errors: pydantic's findings, against `Recipe`.
    """
    # A key given twice or with a tag has its own problem; what pydantic says of its value would only follow.
    already = {problem.key for problem in document.problems}
    found = [Problem(tuple(error["loc"]), _text(error, document.data)) for error in errors]
    found = [*document.problems, *(problem for problem in found if problem.key not in already)]
    # At one place, what concerns the recipe as a whole comes first.
    found.sort(key=lambda problem: (problem.line or document.origin(problem.key)[0], problem.key != ()))
    lines = []
    for problem in found:
        place = f"line {problem.line}" if problem.line else document.origin(problem.key)[1]
        where = ", ".join(filter(None, (place, ".".join(map(str, problem.key)))))
        lines.append(f"  {where}: {problem.text}" if where else f"  {problem.text}")
    count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    return RecipeError("\n".join([f"{document.source} has {count}:", *lines]), hint=HINT)


def blame_overrides(error: RecipeError, source: str) -> RecipeError:
    """Return an error about a recipe as one about the `--set` that alone caused it."""
    counted, _, rest = error.message.removeprefix(f"{source} has ").partition("\n")
    return RecipeError(f"--set has {counted.rstrip(':')} with {source}:\n{rest}", hint=error.hint)


def _text(error: ErrorDetails, written: Any) -> str:  # noqa: ANN401
    key, kind = tuple(error["loc"]), error["type"]
    if kind == "extra_forbidden":
        known = list(_without_null(_schema_at(key[:-1])).get("properties", ()))
        suggestion = nearest(str(key[-1]), known)
        return f"unknown key; {suggestion}{' ' if suggestion else ''}known keys: {', '.join(known)}"
    schema = _schema_at(key)
    if kind == "missing":
        return f"is missing; give {_allowed(schema)}"
    reason = str(error["ctx"]["error"]) if kind == "value_error" else ""
    # A section's own validator compares its keys and says all that there is to say.
    if reason and "properties" in _without_null(schema):
        return reason
    # Not `error["input"]`: of a number out of bounds that is the parsed one.
    for part in key:
        written = written[part]
    text = f"{show(written)} is not allowed{f' ({reason})' if reason else ''}; use {_allowed(schema)}"
    suggestion = nearest(str(written), map(str, _without_null(schema).get("enum", ())))
    return f"{text}; {suggestion}" if suggestion else text


def show(value: object) -> str:
    """Return a value the way a recipe writes it, cut to 60 characters."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case dict():
            return "a section"
        case list() | tuple():
            text = f"[{', '.join(show(item) for item in value)}]"
        case _:
            text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@functools.cache
def _recipe_schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _schema_at(key: Key) -> Schema:
    """Return the schema of the value at a key; that of any text where there is no such key."""
    found: Schema = _recipe_schema()
    for part in key:
        found = _without_null(found)
        found = found["items"] if isinstance(part, int) else found.get("properties", {}).get(part, {})
        found = _section(found)
    return found


def _section(schema: Schema) -> Schema:
    """Follow the reference to a section; some releases of pydantic wrap it in `allOf`."""
    reference = next(iter(schema.get("allOf", ())), schema).get("$ref")
    found: Schema = _recipe_schema()["$defs"][reference.rpartition("/")[2]] if reference else schema
    return found


def _without_null(schema: Schema) -> Schema:
    """Return the schema of X for `X | None`."""
    # pydantic puts X first, and null after it.
    return _section(schema["anyOf"][0]) if "anyOf" in schema else schema


def _allowed(schema: Schema) -> str:
    """Describe in words what a key takes."""
    if "anyOf" in schema:
        return f"{_allowed(_without_null(schema))}, or null"
    if "properties" in schema:
        return f"a section with the keys {', '.join(schema['properties'])}"
    # Before the type: words written for the reader say more than a pattern.
    if "description" in schema:
        return str(schema["description"])
    if "enum" in schema:
        return f"one of {', '.join(map(show, schema['enum']))}"
    match schema.get("type"):
        case "boolean":
            return "true or false"
        case "integer":
            return f"an integer{_bounds(schema)}"
        case "number":
            return f"a number{_bounds(schema)}, such as 0.1, 1e-3 or 8/255"
        case "array":
            least = " of at least one" if "minItems" in schema else ""
            return f"a list{least}, each item {_allowed(schema['items'])}"
    return "text, not empty" if "minLength" in schema else "text"


def _bounds(schema: Schema) -> str:
    words = ""
    if "exclusiveMinimum" in schema:
        words = f" above {schema['exclusiveMinimum']:g}"
    elif "minimum" in schema:
        words = f" from {schema['minimum']:g}"
    if "exclusiveMaximum" in schema:
        return f"{words}{' to' if words else ''} below {schema['exclusiveMaximum']:g}"
    if "maximum" in schema:
        return f"{words} {'to' if words else 'up to'} {schema['maximum']:g}"
    return words
