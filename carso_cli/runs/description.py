"""What a run stores about itself: its resolved recipe, and the versions and hardware it ran on."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carso_cli import __version__
from carso_cli.errors import RecipeError, StateError
from carso_cli.io.json_files import read_json, write_atomically, write_json
from carso_cli.recipe.identity import CLASSIFIER_KEYS, TRAINING_SECTIONS, add_checksum_line, differing_values
from carso_cli.recipe.load import dump_recipe, load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter

if TYPE_CHECKING:
    import torch

_LIBRARIES = (
    *("torch", "torchvision", "advertorch", "pyautoattack", "robustbench"),
    *("safetensors", "numpy", "scikit-learn"),
)


def describe_run(
    folder: RunFolder, recipe: Recipe, environment: Mapping[str, Any], reporter: Reporter
) -> None:
    """Store recipe and environment; of a resumed run, only what is damaged or missing, with a warning.

    Args:
        folder: The run, locked by this process.
        recipe: The resolved recipe.
        environment: See `describe_environment`.
        reporter: Where warnings go.

    Raises:
        CarsoError: If it cannot be written.
    """
    if not folder.recipe.is_file():
        write_json(folder.environment, environment)
        # Last, since the recipe makes the folder a run: a start that is cut short before can be repeated.
        write_recipe(folder, recipe)
        return
    try:
        # Read only to see whether it is whole: the versions of the first start stay, not those of this one.
        read_json(folder.environment)
    except StateError as error:
        reporter.warning(f"{error.message}; writing it again")
        write_json(folder.environment, environment)
    try:
        # Its checksum line is verified in loading.
        load_recipe(str(folder.recipe.resolve()))
    except RecipeError as error:
        reporter.warning(f"{error.message}; writing it again")
        write_recipe(folder, recipe)


def resumed_limit(
    folder: RunFolder, recipe: Recipe, limit: int | None, kind: str | None = None
) -> int | None:
    """Return the `--limit` of a training that is resumed; the one it was started with, where none is given.

    Args:
        folder: The run.
        recipe: The resolved recipe that it is to be resumed with.
        limit: Number of training images asked for.
        kind: `at` or `clean` where a classifier is trained; None for a purifier.

    Raises:
        StateError: If recipe or limit are others than at the first start, naming what differs.
    """
    try:
        stored = load_recipe(str(folder.recipe.resolve()))
        environment = read_json(folder.environment)
    except (RecipeError, StateError):
        # `describe_run` writes them again; the saved state tells by hashes whether it belongs to these.
        return limit
    found = differing_values(stored, recipe, CLASSIFIER_KEYS if kind else TRAINING_SECTIONS)
    # Runs from before it was stored do not say.
    started = environment.get("limit", limit)
    if limit not in (None, started):
        found.append(f"--limit was {'not given' if started is None else started}, now {limit}")
    if found:
        command = folder.resume_command(*(("train-classifier", "--kind", kind) if kind else ()))
        raise StateError(
            f"{folder.path} was started with other options: {'; '.join(found)}",
            hint=f"resume with the first start's: {command}",
        )
    return None if started is None else int(started)


def write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Write a run's resolved recipe, with its checksum.

    Raises:
        CarsoError: If it cannot be written.
    """
    write_atomically(folder.recipe, add_checksum_line(dump_recipe(recipe)))


def class_names(folder: RunFolder, recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the classes without opening the data: stored ones, or else their numbers."""
    numbers = tuple(str(label) for label in range(recipe.data.classes))
    try:
        stored = read_json(folder.environment).get("classes")
    except StateError:
        return numbers
    # Names must not be shifted against the labels.
    if not isinstance(stored, list) or len(stored) != len(numbers):
        return numbers
    return tuple(str(name) for name in stored)


def describe_environment(device: torch.device, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return versions and hardware as JSON-serialisable values, and `more` of them below."""
    # Not at the top: a report reads class names without loading torch.
    import torch

    versions: dict[str, str | None] = {}
    for library in _LIBRARIES:
        try:
            # From the package's metadata: to import it could take seconds, or fail.
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "carso": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": versions,
        "working_folder": os.getcwd(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        **more,
        **({"cuda": _describe_cuda()} if device.type == "cuda" else {}),
    }


def _describe_cuda() -> dict[str, Any]:
    """Return the versions that a GPU's speed and rounding depend on; None where one cannot be told."""
    import torch

    try:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except (AttributeError, RuntimeError, TypeError):
        # A build without it.
        nccl = None
    try:
        driver = re.search(r"Module\s+(\S+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        driver = None
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nccl": nccl,
        "driver": driver and driver[1],
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on the GPU, or resident in this process on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # The peak since the process started: a run cannot reset it.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in kB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
