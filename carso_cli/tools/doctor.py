"""What works on this machine, and what is missing for which recipe, as plain values.

Nothing outside the standard library is imported at module level, since any of it may be what is broken.
Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carso_cli import __version__
from carso_cli.errors import CarsoError

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

_LIBRARIES = {
    # import name: (name on PyPI, whether every recipe needs it)
    "numpy": ("numpy", True),
    "torch": ("torch", True),
    "torchvision": ("torchvision", False),
    "advertorch.attacks": ("advertorch", True),
    "pyautoattack": ("pyautoattack", True),
    "safetensors.torch": ("safetensors", True),
    "sklearn.datasets": ("scikit-learn", False),
    "scipy.stats": ("scipy", True),
    "matplotlib.figure": ("matplotlib", False),
    "PIL.Image": ("pillow", True),
    "pydantic": ("pydantic", True),
    "yaml": ("pyyaml", True),
}


def doctor(reference: str | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Look at libraries, devices, and what each recipe needs.

    Args:
        reference: A recipe; every shipped one when None, and `digits` is then the chosen one.
        overrides: `KEY=VALUE` for the recipe, or for all of them.

    Returns:
        `carso`, `python`, `platform`, `libraries`, `faults` (of the libraries, with `active`), `devices`,
        `folders`, `recipes` (each with `ready`, `items`, `error` and `next`, what to do next), `chosen` and
        `ready`, all JSON-serialisable.

    Raises:
        RecipeError: If the chosen recipe does not exist or does not load.
    """
    libraries = [_probe(module, *facts) for module, facts in _LIBRARIES.items()]
    broken = [library["name"] for library in libraries if library["needed"] and library["error"]]
    recipes = _recipes(reference, overrides, broken)
    chosen = recipes[0]["name"] if reference is not None else "digits"
    return {
        "carso": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": libraries,
        # One by one: what is broken must not hide what can still be said.
        "faults": _attempt(_faults)[0] or [],
        "devices": _attempt(_devices)[0] or [{"device": "cpu", "name": platform.machine()}],
        "memory": _memory(),
        "folders": _folders(),
        "recipes": recipes,
        "chosen": chosen,
        "ready": any(recipe["ready"] for recipe in recipes if recipe["name"] == chosen),
    }


def _probe(module: str, name: str, needed: bool) -> dict[str, Any]:
    """Import a library, patched as carso does it, and say which version it is or what went wrong."""
    try:
        version: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    return {"name": name, "version": version, "needed": needed, "error": _attempt(lambda: _import(module))[1]}


def _import(module: str) -> None:
    # These three have faults that carso patches before it imports them.
    if module.partition(".")[0] in ("torchvision", "advertorch", "pyautoattack"):
        from carso_cli.runtime import third_party

        third_party.prepare()
    # A warning, such as one of deprecation, says nothing about whether the library works.
    with warnings.catch_warnings(action="ignore"):
        importlib.import_module(module)


def _attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """Return the value of an action and, where it fails in whatever way, one line that says how."""
    try:
        return action(), ""
    except CarsoError as error:
        return None, "; ".join(filter(None, (error.message, error.hint)))
    except Exception as error:  # a broken installation may raise anything
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _faults() -> list[dict[str, Any]]:
    """Return every known fault of a library, and whether carso patches it here."""
    from carso_cli.runtime import third_party

    return [
        {"name": entry.name, "reason": entry.reason, "until": entry.until, "active": entry.active}
        for entry in third_party.patches()
    ]


def _devices() -> list[dict[str, Any]]:
    """Return what torch can compute on, the CPU first."""
    import torch

    threads = torch.get_num_threads()
    found: list[dict[str, Any]] = [{"device": "cpu", "name": platform.machine(), "threads": threads}]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append({"device": f"cuda:{index}", "name": name, "memory": total, "free": free})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


def _memory() -> dict[str, int | None]:
    """Return main memory in bytes: all of it, and what is available where the system says so."""
    try:
        pages: int | None = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        pages = None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        # /proc/meminfo counts in kB of 1024 bytes.
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return {"total": pages, "available": None}
    return {"total": pages, "available": available}


def _folders() -> list[dict[str, Any]]:
    from carso_cli.io.paths import home

    found = []
    for role, path in (("CARSO_HOME", home()), ("working folder", Path.cwd())):
        # CARSO_HOME may not exist yet; it will be made on the disk of its nearest parent.
        existing = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), None)
        free = shutil.disk_usage(existing).free if existing is not None else None
        writable = existing is not None and os.access(existing, os.W_OK)
        found.append({"role": role, "path": str(path), "free": free, "writable": writable})
    return found


def _recipes(reference: str | None, overrides: Sequence[str], broken: list[str]) -> list[dict[str, Any]]:
    # Without these two no recipe can be read at all.
    failing = [name for name in broken if name in ("pydantic", "pyyaml")]
    if failing:
        error = f"not looked at: {failing[0]} cannot be imported"
        return [{"name": reference or "digits", "ready": False, "items": [], "error": error, "next": ""}]
    from carso_cli.recipe.load import load_recipe
    from carso_cli.recipe.shipped import list_recipes

    if reference is not None:
        return [_stock(load_recipe(reference, overrides), broken, reference)]
    recipes = [load_recipe(str(shipped.path), overrides) for shipped in list_recipes()]
    # A recipe that starts from another recipe's purifier needs what that one needs.
    return [_stock(recipe, broken, None) for recipe in recipes if recipe.training.initial is None]


def _stock(recipe: Recipe, broken: list[str], reference: str | None) -> dict[str, Any]:
    result: dict[str, Any] = {"name": recipe.name, "description": recipe.description}
    if broken:
        # The first alone: libraries that depend on it fail because of it.
        error = f"not looked at: {broken[0]} cannot be imported"
        return {**result, "ready": False, "items": [], "error": error, "next": ""}

    items, error = _attempt(lambda: _items(recipe))
    lacking = [item for item in items or () if item["required"] and item["state"] != "present"]
    step = "" if error else _next(recipe.reference, lacking)
    return {**result, "ready": not error and not lacking, "items": items or [], "error": error, "next": step}


def _items(recipe: Recipe) -> list[dict[str, Any]]:
    from carso_cli.tools.assets import take_stock

    return [asdict(item) for item in take_stock(recipe)]


def _next(recipe: str, lacking: Sequence[dict[str, Any]]) -> str:
    """Return the next step for a recipe: a command, or a sentence where no command helps."""
    from carso_cli.io.download import fetch_command

    if not lacking:
        return "carso quickstart" if recipe == "digits" else f"carso train-purifier {recipe}"
    first = next((item for item in lacking if item["state"] == "damaged"), lacking[0])
    if first["state"] == "damaged":
        return f"remove {first['place']}: it is damaged"
    # One command downloads all that is published and missing, so it comes before what is made by hand.
    if any(item["download"] and item["state"] == "missing" for item in lacking):
        return fetch_command(recipe)
    if first["command"]:
        return str(first["command"])
    if first["role"] in ("at", "clean") and not first["looked"]:
        # An entry point lies nowhere; its note says what to do.
        return f"{first['note']}: {first['place']}"
    together = [item["what"] for item in lacking if item["role"] == first["role"]]
    return f"put {' and '.join(together)} into {Path(first['place']).parent}"
