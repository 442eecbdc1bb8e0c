"""`carso doctor`: what works here, what is missing for which recipe, and how to get it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from carso_cli.cli.display import messages, output, print_json, table
from carso_cli.cli.options import JsonOption, RecipeArgument, SetOption, read_recipe
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import UsageError

_MISSING = 3
_INDENT = "   "


def command(
    recipe: RecipeArgument = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="First download what RECIPE needs and is published.")
    ] = False,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Say what works on this machine, what each recipe lacks, and how to get it.

    With a RECIPE, of that one only. Exit code 3 if it, or digits where none is
    given, cannot run. Only --fetch downloads anything; interrupted, it goes on
    where it stopped when it is called again.
    """
    from carso_cli.tools.doctor import doctor

    if fetch:
        _fetch(recipe, overrides or ())
    messages().print("looking at libraries, devices, data and weights …", style="dim")
    found = doctor(recipe, overrides or ())
    if json:
        print_json(found)
    else:
        _show_machine(found)
        _show_recipes(found, detailed=recipe is not None)
    if not found["ready"]:
        raise typer.Exit(_MISSING)


def _fetch(recipe: str | None, overrides: Sequence[str]) -> None:
    if recipe is None:
        raise UsageError("--fetch needs a RECIPE: all of them together are many gigabytes")
    from carso_cli.tools.assets import fetch_missing

    fetched = fetch_missing(read_recipe(recipe, overrides), RichReporter())
    messages().print(f"downloaded: {', '.join(item.what for item in fetched) or 'nothing, it is all here'}")


def _show_machine(found: dict[str, Any]) -> None:
    broken = [entry for entry in found["libraries"] if entry["error"]]
    whole = [f"{entry['name']} {entry['version']}" for entry in found["libraries"] if entry not in broken]
    active = [fault["name"] for fault in found["faults"] if fault["active"]]
    memory = found["memory"]
    rows = [
        ["carso", f"{found['carso']} on Python {found['python']}, {found['platform']}"],
        ["libraries", ", ".join(whole)],
        *(["BROKEN", f"{entry['name']}: {entry['error']}"] for entry in broken),
        ["faults mended", ", ".join(active) or ("none is present" if found["faults"] else "not known")],
        ["memory", f"{_size(memory['total'])}, {_size(memory['available'])} available"],
        *(["device", _device(device)] for device in found["devices"]),
        *([folder["role"], _folder(folder)] for folder in found["folders"]),
    ]
    width = max(len(name) for name, _ in rows)
    shown = table(("", ""), rows)
    shown.show_header = False
    shown.columns[0].min_width = width
    output().print(shown)


def _device(device: dict[str, Any]) -> str:
    parts = [f"{device['device']}: {device['name']}"]
    if "threads" in device:
        parts.append(f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}")
    if "memory" in device:
        parts.append(f"{_size(device['memory'])}, {_size(device['free'])} free")
    return ", ".join(parts)


def _folder(folder: dict[str, Any]) -> str:
    return f"{_short(folder['path'])}, {_size(folder['free'])} free" + (
        "" if folder["writable"] else ", not writable"
    )


def _show_recipes(found: dict[str, Any], *, detailed: bool) -> None:
    recipes = found["recipes"]
    output().print()
    if detailed:
        _show_items(recipes[0])
    else:
        rows = [[recipe["name"], _lacks(recipe), _at_home(recipe["next"], found)] for recipe in recipes]
        output().print(table(("recipe", "lacks", "next"), rows))
    for error in dict.fromkeys(recipe["error"] for recipe in recipes if recipe["error"]):
        _line(f"{', '.join(recipe['name'] for recipe in recipes if recipe['error'] == error)}: {error}")
    _show_next(found)


def _lacks(recipe: dict[str, Any]) -> str:
    """Name what a recipe cannot run without and is not here: data, weights."""
    kinds = dict.fromkeys(
        "data" if item["role"] == "data" else "weights"
        for item in recipe["items"]
        if item["required"] and item["state"] != "present"
    )
    return "?" if recipe["error"] else ", ".join(kinds) or "nothing"


def _at_home(text: str, found: dict[str, Any]) -> str:
    return _short(text.replace(found["folders"][0]["path"], "CARSO_HOME"))


def _show_items(recipe: dict[str, Any]) -> None:
    """Show everything that one recipe needs, whatever its state."""
    _line(f"{recipe['name']} needs:")
    for number, item in enumerate(recipe["items"], start=1):
        _show_in_full(number, item)


def _show_in_full(number: int, item: dict[str, Any]) -> None:
    purpose = "" if item["required"] else "; only `carso ablate` needs it"
    _line(f"{number:>2} {item['what']}: {item['state']}{purpose}")
    if item["note"]:
        _line(f"{_INDENT}{item['note']}")
    if item["state"] != "missing":
        _line(f"{_INDENT}{_short(item['place'])}")
        return
    for place in item["looked"]:
        _line(f"{_INDENT}looked for {_short(place)}")
    if item["source"]:
        _line(f"{_INDENT}from {item['source']}")
    if item["download"] or not item["command"]:
        _line(f"{_INDENT}to {_short(item['place'])}")
    else:
        _line(f"{_INDENT}$ {item['command']}")


def _show_next(found: dict[str, Any]) -> None:
    # What depends on a broken library fails after it, so the first is the one to mend.
    broken = next((entry["name"] for entry in found["libraries"] if entry["error"]), None)
    if broken is not None:
        _line(f"next:  pip install --force-reinstall {broken}")
        return
    if len(found["recipes"]) > 1:
        _line("carso doctor RECIPE says where things are looked for, and what to fetch by hand")
    step = next(recipe["next"] for recipe in found["recipes"] if recipe["name"] == found["chosen"])
    if step:
        _line(f"next:  {_short(step)}")


def _line(text: str) -> None:
    output().print(text, soft_wrap=True)


def _short(text: str) -> str:
    """Write the user's own folder as `~`, except inside quotes, where a shell would not expand it."""
    own = f"{Path.home()}/"
    return text if "'" in text or own == "//" else text.replace(own, "~/")


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**30:.1f} GB"
