"""Which of a recipe's weights are on this machine, and whole. None is loaded into a model."""

from __future__ import annotations

import zipfile
import zlib
from importlib.metadata import entry_points
from pathlib import Path

from carso_cli.classifiers.load import ENTRY_POINT_GROUP, robustbench_places, weights_places
from carso_cli.classifiers.registry import PUBLISHED_FILES, Published, find_record
from carso_cli.classifiers.weights import read_tensors, require_uncompressed
from carso_cli.errors import WeightsError
from carso_cli.io.checksum import file_digest
from carso_cli.io.download import fetch_command, recorded_problem
from carso_cli.recipe.schema import Recipe, Weights
from carso_cli.tools.asset import DAMAGED, MISSING, PRESENT, Item, once, state_of

_LEGACY_PICKLE = b"\x80\x02"


def weights_item(recipe: Recipe, kind: str, weights: Weights, required: bool) -> Item:
    """Describe the weights of one kind of training.

    Raises:
        RecipeError: If the recipe names a classifier that is not known.
    """
    if weights.source == "file":
        return _weights_file(recipe, kind, weights.file or "", required)
    name = weights.name or ""
    if weights.source == "entry-point":
        offered = name in {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
        note = "" if offered else "install the package that offers it into this environment"
        place = f"entry point {name} of {ENTRY_POINT_GROUP}"
        return Item(kind, name, PRESENT if offered else MISSING, required, place, note=note)
    record = find_record(weights.source, name, recipe.data.name)
    if weights.source == "shipped":
        there = record.file.is_file()
        whole = there and file_digest(record.file) == record.sha256
        state = PRESENT if whole else DAMAGED if there else MISSING
        note = "" if whole else "install carso again"
        return Item(kind, name, state, required, str(record.file), note=note)
    places = robustbench_places(record)
    shown = f"{name} ({recipe.data.name})"
    return _published(recipe, kind, shown, required, places, places[0], record.published)


def _published(
    recipe: Recipe,
    kind: str,
    what: str,
    required: bool,
    places: tuple[Path, ...],
    belongs: Path,
    published: Published,
) -> Item:
    """Describe weights that are looked for in some places, belong at one, and can be downloaded."""
    found = next((path for path in places if path.is_file()), None)
    problem = once(_weights_problem, found) if found is not None else ""
    return Item(
        kind,
        what,
        state_of(found, problem),
        required,
        str(found or belongs),
        tuple(str(path) for path in places),
        problem,
        published.page or published.url,
        fetch_command(recipe.reference),
        published.url,
    )


def _weights_file(recipe: Recipe, kind: str, file: str, required: bool) -> Item:
    places = weights_places(file, recipe.classifier.family)
    if file in PUBLISHED_FILES:
        return _published(recipe, kind, file, required, places, places[1], PUBLISHED_FILES[file])
    found = next((path for path in places if path.is_file()), None)
    problem = once(_weights_problem, found) if found is not None else ""
    trainable = recipe.classifier.family == "wide-resnet"
    return Item(
        kind,
        file,
        state_of(found, problem),
        required,
        str(found or places[0 if trainable else 1]),
        tuple(str(path) for path in places),
        problem,
        command=f"carso train-classifier {recipe.reference} --kind {kind}" if trainable else "",
    )


def _weights_problem(path: Path) -> str:
    """Say what is wrong with a weights file, without building a model; empty where nothing is.

    Our own files carry a checksum, and downloads come with one; a PyTorch file is a zip file, whose parts
    carry one each.
    """
    try:
        if problem := recorded_problem(path):
            return problem
        if path.suffix == ".safetensors":
            read_tensors(path)
            return ""
        with path.open("rb") as stream:
            start = stream.read(2)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                require_uncompressed(archive, path)
                bad = archive.testzip()
            return f"{bad} in it is damaged" if bad else ""
    except WeightsError as error:
        return error.message
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        return f"cannot be read: {error}"
    return "" if start == _LEGACY_PICKLE else "no PyTorch file; perhaps the web page that offers it"
