"""One thing that a recipe needs, and what the looking for data and for weights has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["present", "missing", "damaged"]
PRESENT: State = "present"
MISSING: State = "missing"
DAMAGED: State = "damaged"

_results: dict[tuple[Callable[[Path], str], Path, int, int], str] = {}


@dataclass(frozen=True)
class Item:
    """One thing that a recipe needs.

    Args:
        role: `data`, `at`, `clean`, or `start` for the purifier that training starts from.
        what: Its name for people.
        state: Whether it is there and whole.
        required: Whether the recipe cannot run without it; clean classifiers serve the ablation only.
        place: Where it lies or, where it is missing, belongs.
        looked: Every place looked at.
        note: What is wrong with it, or known about it.
        source: Address from which it comes, if there is one.
        command: Command that gets it, if there is one.
        download: Address of the file that belongs at `place`, if there is one.
        checksum: The file's published checksum, as `fetch` takes it.
    """

    role: str
    what: str
    state: State
    required: bool
    place: str
    looked: tuple[str, ...] = ()
    note: str = ""
    source: str = ""
    command: str = ""
    download: str = ""
    checksum: str = ""


def state_of(found: Path | None, problem: str) -> State:
    """Return the state of a thing by where it was found and what is wrong with it."""
    return MISSING if found is None else DAMAGED if problem else PRESENT


def once(check: Callable[[Path], str], path: Path) -> str:
    """Return what a check of a file says, without reading again a file that several recipes share."""
    status = path.stat()
    key = (check, path, status.st_size, status.st_mtime_ns)
    if key not in _results:
        _results[key] = check(path)
    return _results[key]
