"""Which of a recipe's data and weights are on this machine, whole, and how to get those that are not.

Nothing is downloaded, unpacked or loaded into a model here. `take_stock` is the way in; an `Item` is one
set of images or one weights file.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from shlex import quote
from typing import Literal

from carso_cli.classifiers.download import source_address
from carso_cli.classifiers.load import ENTRY_POINT_GROUP, find_weights, robustbench_places
from carso_cli.classifiers.registry import find_record
from carso_cli.classifiers.weights import read_tensors
from carso_cli.data.cifar import FOLDERS as CIFAR_FOLDERS
from carso_cli.data.cifar import cifar_class
from carso_cli.data.datasets import find_data
from carso_cli.data.download import file_md5
from carso_cli.data.tinyimagenet import MD5 as TINY_MD5
from carso_cli.data.tinyimagenet import NAME as TINY_NAME
from carso_cli.data.tinyimagenet import URL as TINY_URL
from carso_cli.data.zip_store import ZipStore
from carso_cli.errors import DataError, RecipeError, WeightsError
from carso_cli.home import data_home, weights_home
from carso_cli.recipe.schema import Recipe, Weights
from carso_cli.runs.files import file_sha256

State = Literal["present", "missing", "damaged"]
_PRESENT: State = "present"
_MISSING: State = "missing"
_DAMAGED: State = "damaged"

_KNOWN_FILES = {
    # file: (where it is published, its name there); no checksums are published
    "wang2023_tinyimagenet200_wrn28-10.pt": (
        "https://huggingface.co/wzekai99/DM-Improves-AT/tree/main/checkpoint",
        "tiny_linf_wrn28-10.pt",
    ),
}
_LEGACY_PICKLE = b"\x80\x02"
_results: dict[tuple[Callable[[Path], str], Path, int, int], str] = {}


@dataclass(frozen=True)
class Item:
    """One thing that a recipe needs.

    Args:
        role: `data`, `at` or `clean`.
        what: Its name for people.
        state: Whether it is there and whole.
        required: Whether the recipe cannot run without it; clean classifiers serve the ablation only.
        place: Where it lies or, where it is missing, belongs.
        looked: Every place looked at.
        note: What is wrong with it, or known about it.
        source: Address from which it comes, if there is one.
        command: Command that gets it, if there is one.
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


def take_stock(recipe: Recipe) -> list[Item]:
    """List everything a recipe needs, data first.

    Raises:
        RecipeError: If the recipe names a classifier that is not known.
    """
    items = _data(recipe)
    for kind, weights in (("at", recipe.classifier.at), ("clean", recipe.classifier.clean)):
        required = kind in (recipe.representation.kind, recipe.evaluation.second_kind)
        if weights is not None:
            items.append(_weights(recipe, kind, weights, required))
        elif required:
            raise RecipeError(f"recipe '{recipe.name}' names no weights for classifier.{kind}")
    return items


def _data(recipe: Recipe) -> list[Item]:
    root = (Path(recipe.data.root) if recipe.data.root else data_home()).expanduser()
    name = recipe.data.name
    if name == "digits":
        return [Item("data", "digits", _PRESENT, True, "scikit-learn", note="come with scikit-learn")]
    if name in CIFAR_FOLDERS:
        return [_cifar(name, root)]
    if name == "tinyimagenet200" and not (recipe.data.train or recipe.data.test):
        return [_tinyimagenet(root)]
    sources = dict.fromkeys(filter(None, (recipe.data.train, recipe.data.test)))
    return [_folder_or_zip(name, source, root) for source in sources]


def _cifar(name: str, root: Path) -> Item:
    facts = cifar_class(name)
    folder, archive = root / facts.base_folder, root / facts.filename
    members = [*facts.train_list, *facts.test_list, (facts.meta["filename"], facts.meta["md5"])]
    what = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
    looked = (str(folder), str(archive))
    note, place, state = "downloaded on first use", archive, _MISSING
    if folder.is_dir():
        bad = [file for file, md5 in members if not _has_md5(folder / file, md5)]
        note = f"missing or not of the published checksum: {', '.join(bad)}; remove the folder" if bad else ""
        place, state = folder, _DAMAGED if bad else _PRESENT
    elif archive.is_file():
        whole = _has_md5(archive, facts.tgz_md5)
        note = "unpacked on first use" if whole else "not of the published checksum; remove it"
        place, state = archive, _PRESENT if whole else _DAMAGED
    return Item("data", what, state, True, str(place), looked, note, facts.url, _curl(facts.url, archive))


def _curl(url: str, target: Path) -> str:
    return f"curl -L --create-dirs -o {quote(str(target))} {url}"


def _has_md5(path: Path, expected: str) -> bool:
    return path.is_file() and _once(file_md5, path) == expected


def _tinyimagenet(root: Path) -> Item:
    archive = root / f"{TINY_NAME}.zip"
    command = _curl(TINY_URL, archive)
    looked = (str(root / TINY_NAME), str(archive), str(root / f"{TINY_NAME}*.zip"))
    found = find_data("tinyimagenet200", root=root)
    what = "TinyImageNet-200"
    if found is None:
        note = "downloaded on first use"
        return Item("data", what, _MISSING, True, str(archive), looked, note, TINY_URL, command)
    problem = _once(_zip_problem, found)
    note = problem
    if not problem and found.is_file() and not _has_md5(found, TINY_MD5):
        note = "not the published file, perhaps a part of it: name it with any result"
    state = _DAMAGED if problem else _PRESENT
    return Item("data", what, state, True, str(found), looked, note, TINY_URL, command)


def _folder_or_zip(name: str, source: str, root: Path) -> Item:
    path = Path(source).expanduser()
    looked = (str(path),) if path.is_absolute() else (str(root / path), str(Path.cwd() / path))
    found = find_data(name, root=root, source=source)
    if found is None:
        note = "or elsewhere, with --set data.root=DIR"
        return Item("data", source, _MISSING, True, looked[0], looked, note)
    problem = _once(_zip_problem, found)
    return Item("data", source, _DAMAGED if problem else _PRESENT, True, str(found), looked, problem)


def _zip_problem(path: Path) -> str:
    """Say what is wrong with a zip file, checksums included; empty where nothing is, and for folders."""
    if path.is_dir():
        return ""
    try:
        ZipStore(path).close()
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except DataError as error:
        return error.message
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        return f"cannot be read: {error}"
    return f"{bad} in it is damaged" if bad else ""


def _weights(recipe: Recipe, kind: str, weights: Weights, required: bool) -> Item:
    if weights.source == "file":
        return _weights_file(recipe, kind, weights.file or "", required)
    name = weights.name or ""
    if weights.source == "entry-point":
        offered = name in {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
        note = "" if offered else "install the package that offers it into this environment"
        place = f"entry point {name} of {ENTRY_POINT_GROUP}"
        return Item(kind, name, _PRESENT if offered else _MISSING, required, place, note=note)
    record = find_record(weights.source, name, recipe.data.name)
    if weights.source == "shipped":
        there = record.file.is_file()
        whole = there and file_sha256(record.file) == record.sha256
        state = _PRESENT if whole else _DAMAGED if there else _MISSING
        note = "" if whole else "install carso again"
        return Item(kind, name, state, required, str(record.file), note=note)
    places = robustbench_places(record)
    found = next((path for path in places if path.is_file()), None)
    problem = _once(_weights_problem, found) if found is not None else ""
    return Item(
        kind,
        f"{name} ({recipe.data.name})",
        _MISSING if found is None else _DAMAGED if problem else _PRESENT,
        required,
        str(found or places[0]),
        tuple(str(path) for path in places),
        problem or ("" if found is None else "no checksum is published"),
        source_address(record.gdrive_id),
        f"mkdir -p {quote(str(places[0].parent))} && gdown {record.gdrive_id} -O {quote(str(places[0]))}",
    )


def _weights_file(recipe: Recipe, kind: str, file: str, required: bool) -> Item:
    looked = (str(Path(file).expanduser()), str(weights_home() / file))
    source, published_name = _KNOWN_FILES.get(file, ("", ""))
    command = "" if source else f"carso train-classifier {recipe.name} --kind {kind}"
    try:
        found = find_weights(file, command)
    except WeightsError:
        place = looked[1] if source else looked[0]
        note = f"there: {published_name}" if source else ""
        return Item(kind, file, _MISSING, required, place, looked, note, source, command)
    problem = _once(_weights_problem, found)
    state = _DAMAGED if problem else _PRESENT
    return Item(kind, file, state, required, str(found), looked, problem, source, command)


def _weights_problem(path: Path) -> str:
    """Say what is wrong with a weights file, without building a model; empty where nothing is.

    Our own files carry a checksum; a PyTorch file is a zip file, whose parts carry one each.
    """
    try:
        if path.suffix == ".safetensors":
            read_tensors(path)
            return ""
        with path.open("rb") as stream:
            start = stream.read(2)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            return f"{bad} in it is damaged" if bad else ""
    except WeightsError as error:
        return error.message
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        return f"cannot be read: {error}"
    return "" if start == _LEGACY_PICKLE else "no PyTorch file; perhaps the web page that offers it"


def _once(check: Callable[[Path], str], path: Path) -> str:
    """Return what a check of a file says, without reading again a file that several recipes share."""
    status = path.stat()
    key = (check, path, status.st_size, status.st_mtime_ns)
    if key not in _results:
        _results[key] = check(path)
    return _results[key]
