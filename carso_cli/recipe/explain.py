"""Says in plain words what is wrong with a recipe: every problem at once, each with its place.

A problem reads `line 12, training.epochs: 'ten' is not allowed; use an integer from 1`.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from carso_cli.errors import RecipeError, nearest
from carso_cli.recipe.document import Document, Key, Problem
from carso_cli.recipe.number import parse_number
from carso_cli.recipe.schema import Recipe

HINT = "`carso recipes show digits --resolved` shows a complete recipe with every key"


def explain(document: Document, errors: Sequence[ErrorDetails]) -> RecipeError:
    """Turn what reading and pydantic found into one error.

    Args:
        document: The recipe as written, with the problems met while reading it.
        errors: pydantic's findings, against `Recipe`.
    """
    found = [*document.problems]
    already = {problem.key for problem in found}
    found += [problem for problem in map(_problem, errors) if problem.key not in already]
    found.sort(key=lambda problem: (problem.line or document.line(problem.key), problem.key != ()))
    lines = []
    for problem in found:
        place = f"line {problem.line}" if problem.line else document.place(problem.key)
        dotted = ".".join(str(part) for part in problem.key)
        where = ", ".join(part for part in (place, dotted) if part)
        lines.append(f"  {where}: {problem.text}" if where else f"  {problem.text}")
    count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    return RecipeError("\n".join([f"{document.source} has {count}:", *lines]), hint=HINT)


def _problem(error: ErrorDetails) -> Problem:
    key: Key = tuple(error["loc"])
    return Problem(key, _text(error, key))


def _text(error: ErrorDetails, key: Key) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return _unknown_key(str(key[-1]), _model_at(key[:-1]))
    allowed = _allowed(*_type_at(key))
    if kind == "missing":
        return f"is missing; give {allowed}"
    if kind == "value_error" and _model_at(key) is not None:
        return str(error["ctx"]["error"])
    seen = show(error["input"])
    reason = str(error["ctx"]["error"]) if kind == "value_error" else ""
    text = f"{seen} is not allowed{f' ({reason})' if reason else ''}; use {allowed}"
    choices = _choices(_type_at(key)[0])
    suggestion = nearest(str(error["input"]), [str(choice) for choice in choices]) if choices else ""
    return f"{text}; {suggestion}" if suggestion else text


def _unknown_key(name: str, model: type[BaseModel] | None) -> str:
    known = list(model.model_fields) if model else []
    suggestion = nearest(name, known)
    listed = f"known keys: {', '.join(known)}"
    return f"unknown key; {suggestion} {listed}" if suggestion else f"unknown key; {listed}"


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


def _type_at(key: Key) -> tuple[Any, tuple[Any, ...]]:
    """Return the annotation at a key and what qualifies it (bounds, description)."""
    annotation: Any = Recipe
    qualifiers: tuple[Any, ...] = ()
    for part in key:
        annotation = _without_none(annotation)
        if isinstance(part, int):
            annotation, qualifiers = _split(next(iter(get_args(annotation)), str))
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(part)
            if field is None:
                return str, ()
            annotation, qualifiers = field.annotation, (*field.metadata, field)
    return annotation, qualifiers


def _model_at(key: Key) -> type[BaseModel] | None:
    annotation = _without_none(_type_at(key)[0])
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _is_union(annotation: object) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _without_none(annotation: Any) -> Any:  # noqa: ANN401
    """Return the member of `X | None`, with its qualifiers stripped."""
    if _is_union(annotation):
        annotation = next(member for member in get_args(annotation) if member is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:  # noqa: ANN401
    """Separate an annotation from its qualifiers, those inside a pydantic `Field` included."""
    if get_origin(annotation) is not Annotated:
        return annotation, ()
    bare, *qualifiers = get_args(annotation)
    inner = [item for field in qualifiers if isinstance(field, FieldInfo) for item in field.metadata]
    return bare, (*qualifiers, *inner)


def _choices(annotation: Any) -> tuple[Any, ...]:  # noqa: ANN401
    bare = _without_none(annotation)
    return get_args(bare) if get_origin(bare) is Literal else ()


def _allowed(annotation: Any, qualifiers: tuple[Any, ...]) -> str:  # noqa: ANN401
    """Describe in words what a key takes."""
    if _is_union(annotation):
        members = [member for member in get_args(annotation) if member is not type(None)]
        bare, inner = _split(members[0])
        return f"{_allowed(bare, (*qualifiers, *inner))}, or null"
    described = next((item.description for item in qualifiers if isinstance(item, FieldInfo)), None)
    if described:
        return described
    if choices := _choices(annotation):
        return (
            "one of " + ", ".join(show(choice) for choice in choices)
            if len(choices) > 1
            else show(choices[0])
        )
    if annotation is bool:
        return "true or false"
    if annotation is float:
        example = ", such as 0.1, 1e-3 or 8/255" if _is_number(qualifiers) else ""
        return f"a number{_bounds(qualifiers)}{example}"
    if annotation is int:
        return f"an integer{_bounds(qualifiers)}"
    if get_origin(annotation) is tuple:
        item = _allowed(*_split(get_args(annotation)[0]))
        return f"a list{' of at least one' if _bound(qualifiers, 'min_length') else ''}, each item {item}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    return "text, not empty" if _bound(qualifiers, "min_length") else "text"


def _is_number(qualifiers: Iterable[Any]) -> bool:
    return any(isinstance(item, BeforeValidator) and item.func is parse_number for item in qualifiers)


def _bound(qualifiers: Iterable[Any], name: str) -> Any:  # noqa: ANN401
    return next((getattr(item, name) for item in qualifiers if getattr(item, name, None) is not None), None)


def _bounds(qualifiers: tuple[Any, ...]) -> str:
    low, high = _bound(qualifiers, "ge"), _bound(qualifiers, "le")
    above = _bound(qualifiers, "gt")
    words = f" above {above:g}" if above is not None else f" from {low:g}" if low is not None else ""
    below = _bound(qualifiers, "lt")
    if below is not None:
        return f"{words} to below {below:g}" if words else f" below {below:g}"
    if high is None:
        return words
    return f"{words} to {high:g}" if words else f" up to {high:g}"
