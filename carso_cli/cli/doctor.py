"""`carso doctor`: what works here, what is missing for which recipe, and how to get it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from carso_cli.cli import options
from carso_cli.cli.console import messages, output, print_plain, print_result, show_table, table
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import UsageError

# The exit code of `MissingError`.
_MISSING = 3


def command(
    recipe: options.RecipeArgument = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="First download what RECIPE needs and is published.")
    ] = False,
    overrides: options.SetOption = None,
    json: options.JsonOption = False,
) -> None:
    """Check the installation, and the data and weights of each recipe or of one RECIPE; say how to get them.

    Exit code 3 if RECIPE, or digits without one, cannot run. Only --fetch downloads anything; an interrupted
    download resumes when the command is run again.
    """
    from carso_cli.tools.doctor import doctor

    if fetch:
        _fetch(recipe, overrides or ())
    # Checksums of gigabytes may take a minute, in which nothing else is shown.
    messages().print("looking at libraries, devices, data and weights …", style="dim")
    found = doctor(recipe, overrides or ())
    print_result(found, lambda found: _show(found, detailed=recipe is not None), as_json=json)
    if not found["ready"]:
        raise typer.Exit(_MISSING)


def _fetch(recipe: str | None, overrides: Sequence[str]) -> None:
    if recipe is None:
        raise UsageError("--fetch needs a RECIPE: all of them together are many gigabytes")
    from carso_cli.tools.assets import fetch_missing

    fetched = fetch_missing(options.read_recipe(recipe, overrides), RichReporter())
    names = ", ".join(item.what for item in fetched)
    messages().print(f"downloaded: {names or 'nothing, everything is here already'}")


def _show(found: dict[str, Any], *, detailed: bool) -> None:
    _show_machine(found)
    recipes = found["recipes"]
    output().print()
    if detailed:
        print_plain(f"{recipes[0]['name']} needs:")
        for number, item in enumerate(recipes[0]["items"], start=1):
            _show_item(number, item)
    else:
        home = found["folders"][0]["path"]
        rows = [
            # The home folder by its name, since long paths would fold the table.
            [recipe["name"], _lacks(recipe), _short(recipe["next"].replace(home, "CARSO_HOME"))]
            for recipe in recipes
        ]
        show_table(("recipe", "lacks", "next"), rows)
    # Often all recipes fail for one reason, such as a broken library: it is said once.
    for error in dict.fromkeys(recipe["error"] for recipe in recipes if recipe["error"]):
        print_plain(f"{', '.join(recipe['name'] for recipe in recipes if recipe['error'] == error)}: {error}")
    _show_next(found)


def _show_machine(found: dict[str, Any]) -> None:
    broken = [entry for entry in found["libraries"] if entry["error"]]
    working = [f"{entry['name']} {entry['version']}" for entry in found["libraries"] if entry not in broken]
    active = [fault["name"] for fault in found["faults"] if fault["active"]]
    memory = found["memory"]
    rows = [
        ["carso", f"{found['carso']} on Python {found['python']}, {found['platform']}"],
        ["libraries", ", ".join(working)],
        *(["BROKEN", f"{entry['name']}: {entry['error']}"] for entry in broken),
        ["faults patched", ", ".join(active) or ("none is present" if found["faults"] else "not known")],
        ["memory", f"{_size(memory['total'])}, {_size(memory['available'])} available"],
        *(["device", _device(device)] for device in found["devices"]),
        *([folder["role"], _folder(folder)] for folder in found["folders"]),
    ]
    shown = table(("", ""), rows)
    shown.show_header = False
    shown.columns[0].min_width = max(len(name) for name, _ in rows)
    output().print(shown)


def _device(device: dict[str, Any]) -> str:
    parts = [f"{device['device']}: {device['name']}"]
    if "threads" in device:
        parts.append(f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}")
    if "memory" in device:
        parts.append(f"{_size(device['memory'])}, {_size(device['free'])} free")
    return ", ".join(parts)


def _folder(folder: dict[str, Any]) -> str:
    writable = "" if folder["writable"] else ", not writable"
    return f"{_short(folder['path'])}, {_size(folder['free'])} free{writable}"


def _lacks(recipe: dict[str, Any]) -> str:
    """Name what is missing that a recipe cannot run without: data, weights."""
    kinds = dict.fromkeys(
        "data" if item["role"] == "data" else "weights"
        for item in recipe["items"]
        if item["required"] and item["state"] != "present"
    )
    return "?" if recipe["error"] else ", ".join(kinds) or "nothing"


def _show_item(number: int, item: dict[str, Any]) -> None:
    """Show in full one thing that a recipe needs: state, place, source."""
    command = "reproduce" if item["role"] == "purifier" else "ablate"
    purpose = "" if item["required"] else f"; only `carso {command}` needs it"
    place = _short(item["place"])
    lines = [item["note"]] if item["note"] else []
    if item["state"] != "missing":
        lines.append(place)
    else:
        lines += [f"looked for {_short(looked)}" for looked in item["looked"]]
        lines += [f"from {item['source']}"] if item["source"] else []
        # What is published names its place, for those who must fetch it by hand on another machine.
        made_by_command = item["command"] and not item["download"]
        lines.append(f"$ {item['command']}" if made_by_command else f"to {place}")
    print_plain("\n   ".join([f"{number:>2} {item['what']}: {item['state']}{purpose}", *lines]))


def _show_next(found: dict[str, Any]) -> None:
    # What depends on a broken library fails after it, so the first is the one to repair.
    broken = next((entry["name"] for entry in found["libraries"] if entry["error"]), None)
    if broken is not None:
        print_plain(f"next:  pip install --force-reinstall {broken}")
        return
    if len(found["recipes"]) > 1:
        print_plain("carso doctor RECIPE says where files are looked for and what to fetch by hand")
    step = next(recipe["next"] for recipe in found["recipes"] if recipe["name"] == found["chosen"])
    if step:
        print_plain(f"next:  {_short(step)}")


def _short(text: str) -> str:
    """Write the user's own folder as `~`, except inside quotes, where a shell would not expand it."""
    # In a container the home may be `/`; every slash would then become `~/`.
    own = f"{Path.home()}/"
    return text if "'" in text or own == "//" else text.replace(own, "~/")


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**30:.1f} GB"
