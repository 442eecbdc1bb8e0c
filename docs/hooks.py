"""What the site takes from the code: the options of every command, and the keys of a recipe."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import typer
from pydantic import BaseModel

from carso_cli.cli.app import COMMANDS, build_app
from carso_cli.recipe.schema import Recipe


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:  # noqa: ANN401  (a class of mkdocs)
    """Fill the generated part of a page, where its marker stands; drop the note that it is to be filled."""
    markdown = re.sub(r"^> This page is filled when the site is built.*\n", "", markdown, flags=re.M)
    for marker, generate in (
        ("<!-- list of commands -->", commands),
        ("<!-- options of commands -->", options),
        ("<!-- keys of a recipe -->", keys),
    ):
        if marker in markdown:
            markdown = markdown.replace(marker, "\n".join(generate()))
    return markdown


def commands() -> Iterator[str]:
    """List the commands, each with what it does."""
    yield "| command | does |\n| --- | --- |"
    for name, _, summary in COMMANDS:
        yield f"| [`{name}`](#carso-{name}) | {cell(summary)} |"


def options() -> Iterator[str]:
    """Describe each command with its arguments and options, as `--help` does."""
    for name, *_ in COMMANDS:
        command = typer.main.get_command(build_app([name])).commands[name]  # type: ignore[attr-defined]
        yield from describe(f"carso {name}", command)
        for child, subcommand in getattr(command, "commands", {}).items():
            yield from describe(f"carso {name} {child}", subcommand)


def describe(title: str, command: Any) -> Iterator[str]:  # noqa: ANN401  (a class of click)
    """Describe one command in Markdown."""
    text = re.sub(r"\[/?[a-z ]*\]", "", command.help or "")
    yield from (f"\n## `{title}`\n", text, "")
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    if shown:
        yield "| option | meaning |\n| --- | --- |"
    for parameter in shown:
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        if parameter.param_type_name == "argument":
            names = f"`{parameter.name.upper()}`"
        yield f"| {names} | {cell(getattr(parameter, 'help', None) or '')} |"


def keys() -> Iterator[str]:
    """Describe each section of a recipe with its keys, what they may be, and their defaults."""
    schema = Recipe.model_json_schema()
    sections = [("", schema, Recipe)]
    for title, section, model in sections:
        yield f"\n## {f'`{title}`' if title else 'Top level'}\n"
        yield section["description"].splitlines()[0]
        yield "\n| key | value | default | |\n| --- | --- | --- | --- |"
        said = docstrings(model)
        for name, key in section["properties"].items():
            path = f"{title}.{name}".lstrip(".")
            if inner := re.findall(r"#/\$defs/(\w+)", str(key)):
                part = next(
                    c for c in subsections(model.model_fields[name].annotation) if c.__name__ == inner[0]
                )
                sections.append((path, schema["$defs"][inner[0]], part))
                yield f"| `{name}` | [keys below](#{path.replace('.', '')}) | | {cell(said.get(name, ''))} |"
                continue
            required = name in section.get("required", ())
            default = "required" if required else f"`{json.dumps(key.get('default'), ensure_ascii=False)}`"
            yield f"| `{name}` | {cell(allowed(key))} | {cell(default)} | {cell(said.get(name, ''))} |"


def allowed(key: dict[str, Any]) -> str:
    """Say which values a key takes, from its JSON schema."""
    if "anyOf" in key:
        return " or ".join(allowed(part) for part in key["anyOf"])
    if "enum" in key:
        return ", ".join(f"`{value}`" for value in key["enum"])
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {key[name]:g}" for name, sign in bounds.items() if name in key]
    kind = key.get("type", "value")
    if kind == "array":
        kind = f"list of {allowed(key.get('items', {}))}"
    return ", ".join([kind, *limits])


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return what the source says below each field of a section, or of one that it inherits from."""
    found: dict[str, str] = {}
    for part in reversed([c for c in model.__mro__ if issubclass(c, BaseModel) and c is not BaseModel]):
        (node,) = ast.parse(inspect.getsource(part)).body
        for field, text in itertools.pairwise(getattr(node, "body", ())):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    found[name] = said
    return found


def subsections(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the sections that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from subsections(part)


def cell(text: str) -> str:
    """Return text that a cell of a Markdown table can hold."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
