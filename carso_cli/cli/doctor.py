"""`carso doctor`: what works here, what is missing for which recipe, and how to get it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from carso_cli.cli.display import messages, output, print_json, table
from carso_cli.cli.options import JsonOption, RecipeArgument, SetOption

_MISSING = 3
_ROLES = (("data", "data"), ("at", "classifier"), ("clean", "clean classifier"))
_INDENT = "   "


def command(recipe: RecipeArgument = None, overrides: SetOption = None, json: JsonOption = False) -> None:
    """Say what works on this machine, what each recipe lacks, and how to get it.

    With a RECIPE, of that one only. Exit code 3 if it, or digits where none is
    given, cannot run. Nothing is downloaded.
    """
    from carso_cli.workflows.doctor import doctor

    messages().print("looking at libraries, devices, data and weights …", style="dim")
    found = doctor(recipe, overrides or ())
    if json:
        print_json(found)
    else:
        _show_machine(found)
        _show_recipes(found, detailed=recipe is not None)
    if not found["ready"]:
        raise typer.Exit(_MISSING)


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
    numbers = _numbered(recipes, detailed)
    rows = [[recipe["name"], *(_cell(recipe, role, numbers) for role, _ in _ROLES)] for recipe in recipes]
    output().print()
    output().print(table(("recipe", *(heading for _, heading in _ROLES)), rows))
    for error in dict.fromkeys(recipe["error"] for recipe in recipes if recipe["error"]):
        _line(f"{', '.join(recipe['name'] for recipe in recipes if recipe['error'] == error)}: {error}")
    items = {_key(item): item for recipe in recipes for item in recipe["items"]}
    for key, number in numbers.items():
        if detailed:
            _show_in_full(number, items[key])
        else:
            _show_in_short(number, items[key], Path(found["folders"][0]["path"]))
    _show_next(found)


def _key(item: dict[str, Any]) -> tuple[str, str]:
    return item["what"], item["place"]


def _numbered(recipes: list[dict[str, Any]], detailed: bool) -> dict[tuple[str, str], int]:
    """Number what is to be shown in full: what is not there, and for one recipe everything."""
    keys = dict.fromkeys(
        _key(item)
        for recipe in recipes
        for item in recipe["items"]
        if detailed or (item["required"] and item["state"] != "present")
    )
    return {key: number for number, key in enumerate(keys, start=1)}


def _cell(recipe: dict[str, Any], role: str, numbers: dict[tuple[str, str], int]) -> str:
    if recipe["error"]:
        return "?"
    items = [item for item in recipe["items"] if item["role"] == role]
    states = dict.fromkeys(item["state"] for item in items)
    found = []
    for state in states:
        here = [numbers.get(_key(item)) for item in items if item["state"] == state]
        listed = ", ".join(str(number) for number in here if number is not None)
        found.append(f"{state} ({listed})" if listed else state)
    return ", ".join(found) or "–"


def _show_in_short(number: int, item: dict[str, Any], home: Path) -> None:
    place = Path(item["place"])
    shown = str(place.relative_to(home)) if place.is_relative_to(home) else _short(item["place"])
    _line(f"{number:>2} {shown}" + (f"  ({item['note']})" if item["note"] else ""))
    if item["source"]:
        _line(f"{_INDENT}{item['source']}")
    elif item["command"]:
        _line(f"{_INDENT}$ {item['command']}")


def _show_in_full(number: int, item: dict[str, Any]) -> None:
    purpose = "" if item["required"] else "; only `carso ablate` needs it"
    _line(f"{number:>2} {item['what']}: {item['state']}{purpose}")
    if item["note"]:
        _line(f"{_INDENT}{item['note']}")
    if item["state"] == "present":
        _line(f"{_INDENT}{_short(item['place'])}")
        return
    for place in (item["place"],) if item["state"] == "damaged" else item["looked"]:
        _line(f"{_INDENT}{'looked for ' if item['state'] == 'missing' else ''}{_short(place)}")
    if item["source"] and item["source"] not in item["command"]:
        _line(f"{_INDENT}from {item['source']}")
    if item["command"]:
        # Broken where a shell takes the next line for a part of the command.
        lines = item["command"].replace(" && ", f" &&\n{_INDENT}  ")
        for option in (" http", " -O "):
            lines = lines.replace(option, f" \\\n{_INDENT} {option}")
        _line(f"{_INDENT}$ {_short(lines)}")
    else:
        _line(f"{_INDENT}to {_short(item['place'])}")


def _show_next(found: dict[str, Any]) -> None:
    ready = [recipe["name"] for recipe in found["recipes"] if recipe["ready"]]
    # What depends on a broken library fails after it, so the first is the one to mend.
    broken = next((entry["name"] for entry in found["libraries"] if entry["error"]), None)
    if broken is not None:
        _line(f"next:  pip install --force-reinstall {broken}")
        return
    if len(found["recipes"]) > 1:
        _line("places are below CARSO_HOME, or here; carso doctor RECIPE gives the commands")
    if ready:
        _line(f"ready: {', '.join(ready)}")
        first = ready[0] if "digits" not in ready else "digits"
        command = "carso quickstart" if first == "digits" else f"carso train-purifier {first}"
        _line(f"next:  {command}")


def _line(text: str) -> None:
    output().print(text, markup=False, soft_wrap=True)


def _short(text: str) -> str:
    """Write the user's own folder as `~`, except inside quotes, where a shell would not expand it."""
    own = f"{Path.home()}/"
    return text if "'" in text or own == "//" else text.replace(own, "~/")


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**30:.1f} GB"
